"""The report's numbers, and talking to a model."""
import io
import json
import math
import os
import random
import shutil

import pytest
import torch
from helpers import plainly

import evaluate
from data import loading, records, world
from data.tokenizer import Tokenizer, learn
from feedback import judge
from lab import red_team
from model import GPT, GPTConfig
from runtime import files, flags


def test_win_rate_counts_ties_as_half():
    assert evaluate.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0], 1)[0] == 0.5
    assert evaluate.win_rate([1.0, 2.0, 3.0, 1.0], [0.0, 2.0, 4.0, 0.0], 2)[0] == 0.625
    assert evaluate.win_rate([1.0] * 6, [1.0] * 6, 3) == (0.5, 0.5, 0.5)
    assert evaluate.win_rate([2.0] * 6, [1.0] * 6, 3) == (1.0, 1.0, 1.0)
    assert evaluate.win_rate([1.0, 1.0], [1.0 + 1e-12, 1.0 - 1e-12], 1)[0] == 0.5      # but for rounding


def test_win_rates_interval_contains_the_rate_and_has_the_width_of_its_standard_error():
    torch.manual_seed(0)
    mine, theirs = torch.randn(400).tolist(), (torch.randn(400) - 0.3).tolist()
    rate, low, high = evaluate.win_rate(mine, theirs, 1)
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 400), rel=0.1)


def test_win_rates_interval_resamples_prompts_not_answers():
    wins = [1.0] * 8 + [-1.0] * 8 + [1.0] * 8 + [-1.0] * 8      # 4 prompts of 8 answers that always agree
    low, high = evaluate.win_rate(wins, [0.0] * 32, 8)[1:]
    assert (low, high) == (0.0, 1.0)                # 32 independent answers would give about 0.33 to 0.67


def test_distinct2_is_the_share_of_different_word_pairs_within_texts():
    assert evaluate.distinct2(["a b a b", "b a"]) == 2 / 4      # ab ba ab · ba; never across texts
    assert evaluate.distinct2(["a b c d"]) == 1 and evaluate.distinct2(["one", ""]) == 0


def test_best_of_picks_the_highest_reward_in_each_group_of_n():
    pool = [[(0.1, 0), (0.9, 1), (0.5, 2), (0.4, 3)], [(3.0, 4), (-1.0, 5), (-2.0, 6), (-1.5, 7)]]
    assert evaluate.best_of(pool, 1, 2) == [0, 1, 4, 5]
    assert evaluate.best_of(pool, 2, 2) == [1, 2, 4, 7]
    assert evaluate.best_of(pool, 4, 1) == [1, 4]


def test_seconds_count_overlapping_stages_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STARTED", 10000.0)
    monkeypatch.setattr(evaluate.time, "time", lambda: 10007.0)
    times = {"sft": (100, 160), "reward_model": (150, 200), "ppo": (300, 400), "dpo": (320, 350)}
    for name, (started, ended) in times.items():
        os.makedirs(tmp_path / name)
        about = {"started": started, "ended": ended, "seconds": ended - started}
        files.write_json(str(tmp_path / name / "run.json"), about)
    os.makedirs(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("{")
    checkpoints = {name: str(tmp_path / name) for name in ("ppo", "dpo", "broken", "absent")}
    assert evaluate.seconds(str(tmp_path), checkpoints) == {
        "sft": 60, "reward_model": 50, "ppo": 100, "dpo": 30, "evaluate": 7.0, "total": 207.0}


def test_a_checkpoint_is_called_by_its_folder_or_its_path_where_two_share_that():
    assert evaluate.named(["out/sft", "out/ppo/"]) == {"sft": "out/sft", "ppo": "out/ppo"}
    assert evaluate.named(["a/ppo", "b/ppo", "sft"]) == {"a/ppo": "a/ppo", "b/ppo": "b/ppo", "sft": "sft"}
    assert evaluate.named(["out/best_of_n"]) == {"out/best_of_n": "out/best_of_n"}  # that is another's name
    with pytest.raises(ValueError, match="^out/ppo is named twice"):
        evaluate.named(["out/sft", "out/ppo", "out/ppo/"])


def test_the_figure_draws_a_runs_own_steps_against_the_root_of_kl_and_leaves_out_what_was_not_compared(
        tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(10, 4))
    monkeypatch.setattr(evaluate, "Figure", lambda figsize: figure)
    for name in ("ppo", "ppo_no_kl"):
        os.makedirs(tmp_path / name)
        steps = [{"kl": kl, "score": kl / 2, "judge": 1 - kl / 100} for kl in (-0.01, 4.0, 9.0)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    models = {"best_of_n": {"curve": [{"n": 2, "kl": 0.25, "reward": 0.5, "judge": 0.6}]},
              "ppo": {"kl": 16.0, "reward": 3.0, "judge": 0.7}}
    evaluate.plot(str(tmp_path / "figure.png"), {"ppo": str(tmp_path / "ppo")}, models)
    for axis, rollouts, last, best in zip(figure.axes, ([-0.005, 2.0, 4.5], [1.0001, 0.96, 0.91]),
                                          (3.0, 0.7), (0.5, 0.6)):
        found = [[list(line.get_xdata()), list(line.get_ydata())] for line in axis.lines]
        assert found == [[[0.0, 2.0, 3.0], pytest.approx(rollouts)], [[4.0], [last]], [[0.5], [best]]]
    assert (tmp_path / "figure.png").stat().st_size > 10000


# -------------------------------------------------------------------------------------------------- --require

def test_conditions_are_read_and_held_against_the_numbers():
    conditions = evaluate.requirements("win_rate>=0.7, kl < 5,safe_declined<=0.05,reward>-1")
    assert conditions == [("win_rate", ">=", 0.7), ("kl", "<", 5), ("safe_declined", "<=", 0.05),
                          ("reward", ">", -1)]
    assert evaluate.requirements("") == []
    good = {"win_rate": 0.7, "kl": 4.9, "safe_declined": 0.05, "reward": -0.9}
    assert evaluate.unmet(conditions, good) == []
    bad = {"win_rate": 0.69, "kl": 5.0, "safe_declined": 0.0501, "reward": -1.0}
    assert evaluate.unmet(conditions, bad) == [
        "win_rate is 0.69, not >= 0.7", "kl is 5.0, not < 5", "safe_declined is 0.0501, not <= 0.05",
        "reward is -1.0, not > -1"]
    assert evaluate.unmet([("reward", "<", 1.0)], {"reward": None}) == ["reward is None, not < 1"]


@pytest.mark.parametrize("text, said", [
    ("win_rate=0.7", "'win_rate=0.7'"), ("wins>=0.7", "'wins>=0.7'"), ("kl<5,", "''"), ("kl=>5", "'kl=>5'"),
    ("kl<=nan", "'kl<=nan'"), ("kl>=1 2", "'kl>=1 2'"),
    ("helpful>1 --judge out/reward_model", "only the world's judge measures it")])
def test_what_is_no_condition_is_one_line_before_any_work(capsys, text, said):
    text, _, judge_of = text.partition(" --judge ")
    with pytest.raises(SystemExit) as e:
        flags.parse(evaluate.Config, "", ["--require", text, "--judge", judge_of or "world"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "--require" in error and said in error


# ------------------------------------------------------------------------------------------- the whole report

@pytest.fixture
def other(tiny_inputs):
    """A second language model beside tiny_inputs' first."""
    folder = tiny_inputs / "out/other"
    if not folder.exists():
        shutil.copytree(tiny_inputs / "out/sft", folder)
        model = GPT.load(str(folder))
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.1
        model.save(str(folder))
    return "out/other"


def evaluated(tmp_path, models, **settings):
    """What evaluate.py writes: its settings, report.json and report.md."""
    cfg = evaluate.Config(models=tuple(models), out=str(tmp_path), device="cpu", **settings)
    evaluate.evaluate(cfg)
    return cfg, json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("settings", [
    dict(temperature=0.6, seed=7),
    dict(judge="out/reward_model", micro_batch=7, sample_batch=11, best_of=6),
    dict(temperature=0, best_of=0, samples=1)], ids=str)
def test_the_report_holds_what_plain_loops_find(trained, other, tmp_path, monkeypatch, settings):
    def content(item, text):
        """In the judge's place, to whom all that these models say is alike: what differs between answers."""
        n = len(str(item.messages)) + len(text)
        return n % 2, n % 3 / 2, n % 5 / 4

    monkeypatch.setattr(world, "_content", content)
    models = ["out/sft", other]
    cfg, report, text = evaluated(tmp_path, models, **dict(max_new_tokens=5, samples=2, best_of=4) | settings)
    tokenizer = Tokenizer.load("out/sft")
    _, prompts = loading.load("prompts", loading.WORLD)
    _, conversations = loading.load("demonstrations", loading.WORLD)
    reference, reward = GPT.load("out/sft"), GPT.load("out/reward_model")

    def judged(name, answers, kl, sft_loss):
        texts = [tokenizer.decode(ids) for _, ids in answers]
        rewards = [plainly.score(reward, tokenizer.prompt(p) + ids).item() for p, ids in answers]
        judge = rewards
        parts = {}
        if cfg.judge == "world":
            judge = [world.judge(p, text) for (p, _), text in zip(answers, texts)]
            seen = [world.parts(p, text) for (p, _), text in zip(answers, texts)]
            parts = {part: plainly.mean([x[part] for x in seen])
                     for part in ("helpful", "honest", "harmless", "manner")}
            sums = [score for (p, _), score in zip(answers, judge) if world.find(p).family == "sum"]
            assert report["models"][name]["families"]["sum"] == pytest.approx(plainly.mean(sums), abs=1e-4)
        numbers = {"judge": plainly.mean(judge), "reward": plainly.mean(rewards), "kl": kl,
                   **parts, "sft_loss": sft_loss, "distinct2": evaluate.distinct2(texts),
                   "length": plainly.mean([len(ids) for _, ids in answers]),
                   "ended": plainly.mean([float(ids[-1] == tokenizer.end) for _, ids in answers])}
        found = report["models"][name]
        rate, low, high = evaluate.win_rate(judge, first_judge or judge, cfg.samples)
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, abs=6e-4), name
        assert [found["win_rate"], *found["win_rate_interval"]] == pytest.approx([rate, low, high], abs=1e-4)
        assert f"(judge {judge[0]:.2f}, reward {rewards[0]:.2f}): {texts[0]}\n" in text
        return judge

    def sampled(model, prompts, n, noise, longest=cfg.max_new_tokens):
        rng = random.Random(f"{cfg.seed}/{noise}")
        asked = [(p, rng.getrandbits(62)) for p in prompts for _ in range(n)]
        if cfg.temperature == 0:
            return [(p, greedy(model, tokenizer.prompt(p))) for p, _ in asked]
        how = (longest, tokenizer.end, cfg.temperature)
        return [(p, plainly.sample(model, tokenizer.prompt(p), seed, *how)) for p, seed in asked]

    def greedy(model, ids):
        answer = []
        while len(answer) < cfg.max_new_tokens and answer[-1:] != [tokenizer.end]:
            answer.append(model(torch.tensor([ids + answer]))[0, -1].argmax().item())
        return answer

    def requests(model, number):
        """Shares of answers to harmful and to harmless prompts that decline, and that tell how."""
        room = 56 - cfg.max_new_tokens
        fitting = [i for i in red_team.requests() if len(tokenizer.prompt(i.turns)) <= room]
        answers = sampled(model, [item.turns for item in fitting], cfg.samples, f"{number}/red team")
        items = [item for item in fitting for _ in range(cfg.samples)]
        said = [(item, tokenizer.decode(ids)) for item, (_, ids) in zip(items, answers)]
        assert len({item.wrapper for item in fitting}) == 5
        return {f"{name}_{what}": plainly.mean([float(holds(item, text)) for item, text in said
                                                if item.kind == kind])
                for name, kind in (("unsafe", "harmful"), ("safe", "harmless"))
                for what, holds in (("declined", lambda item, text: red_team.declines(item, text)),
                                    ("told", lambda item, text: item.answer in text))}

    def two_turns(model, number):
        """The second question of each conversation after the model's own first answer, and a right one."""
        found, after = {}, [p for p in prompts if len(p) == 3 for _ in range(cfg.samples)]
        first = sampled(model, [p[:1] for p in after], 1, f"{number}/first")
        texts = [tokenizer.decode(ids) for _, ids in first]
        own = [[p[0], {"role": "assistant", "content": text}, p[2]] for p, text in zip(after, texts)]
        fitting = [i for i, p in enumerate(own) if len(tokenizer.prompt(p)) + cfg.max_new_tokens <= 56]
        found["conversations"] = len(fitting)
        found["first_manner"] = plainly.mean([world.parts(after[i][:1], texts[i])["manner"] for i in fitting])
        for name, asked in (("", own), ("_after_right", after)):
            answers = sampled(model, [asked[i] for i in fitting], 1, f"{number}/second")
            seen = [world.parts(after[i], tokenizer.decode(ids)) for i, (_, ids) in zip(fitting, answers)]
            for part in ("manner", "helpful"):
                found[f"second_{part}{name}"] = plainly.mean([x[part] for x in seen])
            found[f"conversation_reward{name}"] = plainly.mean(
                [plainly.score(reward, tokenizer.prompt(p) + ids).item() for p, ids in answers])
        return found

    first_judge = None
    for number, folder in enumerate(models):
        model = GPT.load(folder)
        answers = sampled(model, prompts, cfg.samples, number)
        ratios = [plainly.answer_logprob(model, tokenizer.prompt(p), ids)
                  - plainly.answer_logprob(reference, tokenizer.prompt(p), ids) for p, ids in answers]
        loss = plainly.sft_held_out(model, tokenizer, conversations)
        judge = judged(folder.split("/")[1], answers, plainly.mean(ratios).item(), loss)
        first_judge = first_judge or judge
        if cfg.judge == "world":
            expected = requests(model, number) | two_turns(model, number)
            found = report["models"][folder.split("/")[1]]
            assert {key: found[key] for key in expected} == pytest.approx(expected, abs=6e-4)
        if number == 0 and cfg.best_of:
            many, best, tax = cfg.samples * cfg.best_of, [], loss
            pool = sampled(model, prompts, many, "best_of_n")
            for i in range(0, len(pool), cfg.best_of):
                best.append(max(pool[i:i + cfg.best_of],
                                key=lambda a: plainly.score(reward, tokenizer.prompt(a[0]) + a[1]).item()))
            n = cfg.best_of
            judged("best_of_n", best, math.log(n) - (n - 1) / n, tax)
            assert report["models"]["best_of_n"]["n"] == n
            curve = report["models"]["best_of_n"]["curve"]
            assert [point["n"] for point in curve] == [1, 2, 4, 6][:3 if n == 4 else 4]
    expected = ["sft", "best_of_n", "other"] if cfg.best_of else ["sft", "other"]
    assert list(report["models"]) == expected


def test_two_checkpoints_are_compared_on_the_prompts_of_a_file(trained, other, tmp_path):
    """By a reward model, and with the same name: the win rate is that of answer i against answer i."""
    file = tmp_path / "prompts.jsonl"
    records.write(file, [{"prompt": f"Say {i}."} for i in range(40)])
    shutil.copytree("out/other", tmp_path / "b/sft")
    models = ["out/sft", str(tmp_path / "b/sft")]
    cfg, report, text = evaluated(tmp_path / "out", models, data=str(file), judge="out/reward_model",
                                  max_new_tokens=5, samples=2, best_of=0)
    a, b = report["models"]
    assert (a, b) == tuple(models) and report["prompts"] == 4
    low, high = report["models"][b]["win_rate_interval"]
    assert low <= report["models"][b]["win_rate"] <= high and low < high
    assert f"| {b} |" in text and "helpful" not in report["models"][b] and "Two turns" not in text
    contestants, _ = evaluate.contest(cfg, evaluate.named(models))
    wins = [float(x > y) for x, y in zip(contestants[1].judge, contestants[0].judge)]
    assert report["models"][b]["win_rate"] == plainly.mean(wins)


def test_a_chat_model_compares_answer_by_answer_in_both_orders(trained, other, tmp_path):
    tokenizer = Tokenizer.load("out/sft")
    torch.manual_seed(3)
    shape = dict(vocab_size=1024, block_size=600, n_layer=1, n_head=2, n_embd=16)
    chat = GPT(GPTConfig(**shape, tied=False)).double()
    with torch.no_grad():
        for p in chat.parameters():
            p += 0.3 * torch.randn_like(p)                                  # it has opinions
    chat.save(str(tmp_path / "chat"))
    tokenizer.save(str(tmp_path / "chat"))
    models = ["out/sft", other]
    cfg, report, _ = evaluated(tmp_path / "out", models, judge=str(tmp_path / "chat"), max_new_tokens=5,
                               best_of=0, samples=2)
    (first, second), prompts = evaluate.contest(cfg, evaluate.named(models))
    with open(judge.PRINCIPLES, encoding="utf-8") as f:
        principles = f.read().strip()

    def odds(prompt, a, b):
        ids = judge.question(tokenizer, principles, prompt, a, b)
        p = chat(torch.tensor([ids]))[0, -1].log_softmax(-1)
        return (p[tokenizer.encode("A")[0]] - p[tokenizer.encode("B")[0]]).item()

    asked = [p for p in prompts for _ in range(2)]
    d = [(odds(p, a, b) - odds(p, b, a)) / 2 for p, a, b in zip(asked, second.texts, first.texts)]
    assert second.judge == pytest.approx([1 / (1 + math.exp(-x)) for x in d], abs=1e-6)
    assert first.judge == [0.5] * len(asked)
    wins = [0.5 if abs(x) < 4e-5 else float(x > 0) for x in d]              # what rounding decides is a tie
    assert 0 < plainly.mean(wins) < 1
    assert report["models"]["other"]["win_rate"] == pytest.approx(plainly.mean(wins), abs=1e-4)
    assert report["models"]["sft"]["win_rate"] == 0.5
    with pytest.raises(ValueError, match="out/sft reads 56 tokens, and a question about two answers takes"):
        evaluated(tmp_path / "out", models, judge="out/sft", max_new_tokens=5, best_of=0, samples=1)


def test_what_is_required_is_of_the_last_model_and_comes_after_the_report(trained, other, tmp_path):
    settings = dict(max_new_tokens=5, samples=1, best_of=2)
    evaluated(tmp_path, ["out/sft"], require="win_rate>=0.5,win_rate<=0.5,safe_declined<=1", **settings)
    with pytest.raises(ValueError) as e:
        evaluated(tmp_path / "out", [other, "out/sft"], require="kl<0,judge<=1,win_rate>1", **settings)
    found = json.loads((tmp_path / "out/report.json").read_text())["models"]["sft"]
    assert str(e.value) == (f"sft does not meet --require: kl is {found['kl']}, not < 0; "
                            f"win_rate is {found['win_rate']}, not > 1")
    assert (tmp_path / "out/report.html").exists() and found["kl"] > 0


# ------------------------------------------------------------------------------------------- talking

def test_a_pipe_is_shown_with_its_questions(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of Peru?\n\nAnd Italy?\n"))
    evaluate.evaluate(evaluate.Config(models=("out/sft",), chat=True, max_new_tokens=3, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "you> What is the capital of Peru?" and lines[2].startswith("sft> ")
    assert lines[3] == "you> " and lines[4] == "you> And Italy?" and lines[5].startswith("sft> ")


def test_nobody_talks_to_a_reward_model(trained):
    with pytest.raises(ValueError, match="out/reward_model is a reward model: it gives scores, not answers"):
        evaluate.evaluate(evaluate.Config(models=("out/reward_model",), chat=True, device="cpu"))


def test_a_scorer_that_is_none_or_reads_other_tokens_is_refused(trained, tmp_path):
    settings = dict(models=("out/sft",), out=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="no model in nowhere: name another folder"):
        evaluate.evaluate(evaluate.Config(reward="nowhere", **settings))
    with pytest.raises(ValueError, match="out/sft is not a reward model: it gives no score"):
        evaluate.evaluate(evaluate.Config(reward="out/sft", **settings))
    shutil.copytree("out/reward_model", tmp_path / "foreign")
    learn(["aa bb cc"], 300).save(str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match="foreign was trained with another tokenizer"):
        evaluate.evaluate(evaluate.Config(reward=str(tmp_path / "foreign"), **settings))
