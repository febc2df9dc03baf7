"""One line of Markdown per report.json, for the table of seeds in the README: see `make seeds`."""
import json
import sys

HEADS = ["seed", "SFT: judge", "reward model: accuracy, of the best possible", "DPO: judge, wins",
         "PPO: judge, wins, KL", "with the KL penalty: reward, judge", "without: reward, judge", "seconds"]

rows = [HEADS, ["---"] * len(HEADS)]
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as f:
        report = json.load(f)
    learnt = report["reward_model"]
    sft, dpo, ppo, free = (report["models"][name] for name in ("sft", "dpo", "ppo", "ppo_no_kl"))
    rows.append([str(report["seed"]), f"{sft['judge']:.2f}",
                 f"{learnt['accuracy']:.1%} of {learnt['ceiling']:.1%}",
                 f"{dpo['judge']:.2f}, {dpo['win_rate']:.1%}",
                 f"{ppo['judge']:.2f}, {ppo['win_rate']:.1%}, {ppo['kl']:.1f}",
                 f"{ppo['reward']:.2f}, {ppo['judge']:.2f}", f"{free['reward']:.2f}, {free['judge']:.2f}",
                 f"{report['seconds']['total']:.0f}"])
print("\n".join(f"| {' | '.join(row)} |" for row in rows))
