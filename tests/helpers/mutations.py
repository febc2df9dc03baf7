"""Plant classic RLHF mistakes one at a time, and see whether the fast tests notice.

    python tests/mutations.py               all of them (minutes); ends with status 1 if one goes unnoticed
    python tests/mutations.py gae kl        those whose names contain a word

Each works on a copy of the project in a temporary folder; the checkout is never touched.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = ["tests/test_losses.py", "tests/test_tokenizer.py", "tests/test_model.py", "tests/test_known_answers.py"]

# mistake, file, the right code, the wrong code
MUTATIONS = [
    ("log-probabilities of the state after the token", "model.py",
     "self.hidden(tokens)[:, :-1][mask[:, 1:]]", "self.hidden(tokens)[:, 1:][mask[:, 1:]]"),
    ("KL reward with the wrong sign", "ppo.py", "-kl_coef * (logprobs - ref_logprobs)", "kl_coef * (logprobs - ref_logprobs)"),
    ("mean per row in place of per token", "ppo.py", "return torch.where(mask, x, 0).sum() / mask.sum()",
     "return (torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()"),
    ("SFT loss as a mean per row", "sft.py", "return -torch.where(mask, logprobs, 0).sum() / mask.sum()",
     "return -(torch.where(mask, logprobs, 0).sum(-1) / mask.sum(-1)).mean()"),
    ("score added on the padding", "ppo.py", "last = (mask * column).argmax(dim=1)", "last = (mask * 0 + column).argmax(dim=1)"),
    ("advantages not detached", "ppo.py", "    advantages = advantages.detach()\n", ""),
    ("old log-probabilities recomputed", "ppo.py", 'policy_loss(logprobs, b["logprobs"]', "policy_loss(logprobs, logprobs"),
    ("value of the state after the action", "ppo.py",
     "return torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1) * mask", "return out * mask"),
    ("temperature missing from the new log-probabilities", "ppo.py",
     'nets["actor"].logprobs(b["tokens"], mask, cfg.temperature, entropy=True)',
     'nets["actor"].logprobs(b["tokens"], mask, entropy=True)'),
    ("temperature missing from the sampled log-probabilities", "model.py", "logits.div(temperature or 1.0).log_softmax",
     "logits.log_softmax"),
    ("DPO with chosen and rejected swapped", "dpo.py", "    h = chosen - rejected\n", "    h = rejected - chosen\n"),
    ("reward model with chosen and rejected swapped", "reward_model.py", "-F.logsigmoid(chosen - rejected - margin)",
     "-F.logsigmoid(rejected - chosen - margin)"),
    ("ranking upside down", "reward_model.py", "(ranks[:, :, None] < ranks[:, None, :]) & (ranks > 0)[:, :, None]",
     "(ranks[:, :, None] > ranks[:, None, :]) & (ranks > 0)[:, None, :]"),
    ("reference left trainable", "dpo.py", "policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()",
     "policy_chosen - ref_chosen, policy_rejected - ref_rejected"),
    ("loss on the prompt", "data/tokenizer.py", '[message["role"] == "assistant"] * len(content)', "[True] * len(content)"),
    ("end token left out of the SFT mask", "data/tokenizer.py", '[message["role"] == "assistant"] * len(content)',
     '[message["role"] == "assistant"] * (len(content) - 1) + [False]'),
    ("end token left out of the rollout's mask", "model.py", "mask = (column >= lengths[:, None]) & (column < ends[:, None])",
     "mask = (column >= lengths[:, None]) & (column < ends[:, None] - 1)"),
    ("advantage that looks back in place of ahead", "ppo.py", "for t in reversed(range(rewards.shape[1])):",
     "for t in range(rewards.shape[1]):"),
    ("GAE without λ", "ppo.py", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    ("clipping the wrong way", "ppo.py", "-masked_mean(torch.min(free, clipped), mask)", "-masked_mean(torch.max(free, clipped), mask)"),
    ("value loss takes the smaller error", "ppo.py", "0.5 * masked_mean(torch.max(", "0.5 * masked_mean(torch.min("),
    ("β adapts the wrong way", "ppo.py", "min(max(kl / self.target - 1, -0.2), 0.2)", "min(max(1 - kl / self.target, -0.2), 0.2)"),
    ("a cached row reads another row's position", "model.py", "future = torch.arange(keys.shape[2], device=q.device) > positions ",
     "future = torch.arange(keys.shape[2], device=q.device) > positions[:1] "),
]


def main(words):
    missed = []
    chosen = [m for m in MUTATIONS if not words or any(word in m[0] for word in words)]
    for name, path, right, wrong in chosen:
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "project")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))
            target = os.path.join(copy, path)
            with open(target, encoding="utf-8") as f:
                code = f.read()
            if code.count(right) != 1:
                sys.exit(f"mutations.py: {name}: {path} has {code.count(right)} places that read {right!r}, not one")
            with open(target, "w", encoding="utf-8") as f:
                f.write(code.replace(right, wrong))
            started = time.time()
            done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *TESTS], cwd=copy, capture_output=True, text=True)
        caught = done.returncode == 1                               # 1: a test failed; 2 and more: pytest could not run
        by = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), f"pytest's status {done.returncode}")
        print(f"{'caught' if caught else 'MISSED'}  {name}  ({time.time() - started:.0f} s; {by.split(' - ')[0]})", flush=True)
        missed += [] if caught else [name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mistakes caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
