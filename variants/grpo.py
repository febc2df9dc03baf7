"""PPO without a critic: an answer is judged by the other answers to its prompt (RLOO, GRPO).

    python -m variants.grpo    GRPO (Shao et al. 2024), four answers to each prompt
    python -m variants.grpo --advantage rloo    RLOO (Ahmadian et al. 2024)
    python -m variants.grpo --no-divide_by_std --no-divide_by_length    Dr. GRPO (Liu et al. 2025)

Three networks: policy, reference and reward model. A whole answer is one action here: all of its tokens share
what it earned, and there is nothing for a critic to predict. Rollout, KL penalty, clipped loss and β are
those of ppo.py, and so are the five steps; the third is another one.
"""
import time
from dataclasses import dataclass

import torch

from data import answers
from data.loading import load_prompts
from data.tokenizer import Tokenizer
from ppo import AdaptiveKL, OnPolicy, approximate_kl, kl_rewards, masked_mean, policy_loss, rollout
from runtime.compute import Meter, select
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.rewards import find_reward
from runtime.run import Run


@dataclass
class Config(OnPolicy):
    out: str = flag("out/grpo", "folder that the run writes")
    advantage: str = flag("grpo", "how an answer is judged by others", choices=("grpo", "rloo"))
    group: int = flag(4, "answers per prompt", 2)
    divide_by_std: bool = flag(True, "with grpo: divide advantages by their group's standard deviation")
    divide_by_length: bool = flag(True, "with grpo: each answer counts alike, not each token")

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.group:
            raise ValueError(f"--batch {self.batch} is not a multiple of --group {self.group}")


def rloo(returns, group):
    """REINFORCE, leave one out (Kool et al. 2019; Ahmadian et al. 2024): how much better each answer
    did than the other answers to its prompt, on average,

        A_i = R_i − (Σ_{j≠i} R_j) / (k − 1)

    returns (B,): what whole answers earn, the k = group answers to one prompt after each other. Returns (B,).

    A baseline that does not depend on the action leaves the policy gradient as it is on average, and takes
    noise from it. Others' returns are such a baseline; with one's own among them it would not be."""
    R = returns.view(-1, group)
    return (R - (R.sum(1, keepdim=True) - R) / (group - 1)).flatten()


def grpo(returns, group, lengths, divide_by_std=True, divide_by_length=True):
    """Group-relative advantages (GRPO: Shao et al. 2024, section 4.1.2): A_i = (R_i − mean R) / std R, over
    the answers to a prompt. returns, lengths (B,), in groups as in `rloo`. Returns (B,).

    Two biases are part of it (Liu et al. 2025, "Dr. GRPO", which is left with both switched off). Divided by
    the standard deviation, prompts whose answers earn almost the same count as much as those where there is
    something to learn. Divided by its own length, as a mean over each answer's tokens is, a long bad answer
    is punished less per token than a short one, and answers that fail grow.

    As published the KL is a term of the loss, estimated by k3 (see approximate_kl). Its gradient is that of
    the KL the other way round, KL(π_ref ‖ π). Here it is part of the reward for all kinds of advantage."""
    R = returns.view(-1, group)
    advantages = R - R.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (R.std(1, keepdim=True) + 1e-4)
    if divide_by_length:                # the loss is a mean over all tokens; so each answer counts alike
        lengths = lengths.to(R.dtype)
        advantages = advantages * (lengths.mean() / lengths).view(-1, group)
    return advantages.flatten()


def update(run, batch, actor, optimizer):
    """ppo.update without a critic."""
    cfg = run.cfg
    factor, seen, updates = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay), [], 0
    for rows in [rows for _ in range(cfg.epochs)
                 for rows in torch.randperm(len(batch["tokens"])).chunk(cfg.minibatches)]:
        minibatch, stats = select(batch, rows), Meter()
        for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
            logprobs, entropy = actor.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                               entropy_grad=cfg.entropy_coef > 0)
            loss, clipped = policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"], cfg.clip)
            entropy = masked_mean(entropy, b["mask"])
            (share * (loss - cfg.entropy_coef * entropy)).backward()
            stats.add(share, policy_loss=loss, entropy=entropy, clipped=clipped,
                      approx_kl=approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
        seen.append(stats.means())
        if cfg.update_kl > 0 and seen[-1]["approx_kl"] > cfg.update_kl:
            optimizer.zero_grad()
            break
        run.optimizer_step(optimizer, cfg.lr * factor, seen[-1]["policy_loss"], f"answers {rows.tolist()}")
        updates += 1
    return {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]} | {"updates": updates}


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    actor = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    prompts = load_prompts(cfg, tokenizer, actor.config.block_size - cfg.max_new_tokens)
    reward = find_reward(cfg.reward, tokenizer)
    run = Run(cfg, cfg.steps)
    run.place(actor, reference, *reward.networks)
    optimizer = make_optimizer(actor, cfg.lr, eps=1e-5)
    beta = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(controller=beta, actor=actor, optimizer=optimizer)
    while run.step < cfg.steps:
        began, chosen = time.time(), run.rng.choices(prompts, k=cfg.batch // cfg.group)
        chosen = [prompt for prompt in chosen for _ in range(cfg.group)]        # a group stands together

        # 1. rollout
        batch = rollout(run, actor, reference, tokenizer, chosen)
        mask, texts = batch["mask"], answers.texts(tokenizer, batch)

        # 2. rewards
        scores, signs = reward(run, batch, chosen, texts)
        if scores is None:
            break
        batch["scores"] = torch.where(batch["ended"], scores, cfg.no_end_score)
        earned = kl_rewards(batch["scores"], batch["old_logprobs"], batch["ref_logprobs"], mask, beta.coef)

        # 3. advantages
        if cfg.advantage == "rloo":
            advantages = rloo(earned.sum(1), cfg.group)
        else:
            advantages = grpo(earned.sum(1), cfg.group, mask.sum(1), cfg.divide_by_std, cfg.divide_by_length)
        batch |= {"rewards": earned, "advantages": advantages[:, None] * mask}

        # 4. update
        stats = update(run, batch, actor, optimizer)

        # 5. β
        metrics = answers.metrics(batch, chosen, texts, began) | {"kl_coef": beta.coef} | stats | signs
        if cfg.adaptive_kl:
            beta.update(metrics["kl"], cfg.batch)           # before run.log, which saves what a resume reads

        answers.keep_rollout(run, tokenizer, chosen, batch)
        run.warn(answers.policy_warnings(cfg, metrics))
        run.log(metrics)
    run.finish(actor, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
