"""GRPO and RLOO: PPO without a critic. An answer's advantage comes from the other answers to its prompt.

    python -m variants.grpo                             GRPO (Shao et al. 2024), four answers to each prompt
    python -m variants.grpo --advantage rloo            RLOO (Ahmadian et al. 2024)
    python -m variants.grpo --no-divide_by_std --no-divide_by_length        Dr. GRPO (Liu et al. 2025)

There are three networks: policy, reference and reward model. The whole answer is one action: all its tokens
share one advantage, and no critic is needed to predict the value of single tokens. Rollout, KL penalty,
clipped loss and β are taken from ppo.py, and so are the five parts of a step; the third one differs.
"""
from dataclasses import dataclass

import torch

import ppo
from data.answers import answer_metrics, rollout_examples
from data.loading import load_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Meter, select
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.rewards import find_reward
from runtime.run import Run


@dataclass
class Config(ppo.OnPolicy):
    out: str = flag("out/grpo", "folder that the run writes")
    advantage: str = flag("grpo", "how an answer is compared with its group", choices=("grpo", "rloo"))
    group: int = flag(4, "answers per prompt", 2)
    divide_by_std: bool = flag(True, "with grpo: divide advantages by their group's standard deviation")
    divide_by_length: bool = flag(True, "with grpo: give each answer the same weight, not each token")

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.group:
            raise ValueError(f"--batch {self.batch} is not a multiple of --group {self.group}")
        if self.advantage == "rloo" and not (self.divide_by_std and self.divide_by_length):
            raise ValueError("--no-divide_by_std and --no-divide_by_length do nothing with --advantage rloo")


def rloo(returns, group):
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): an answer's return minus the mean
    return of the other answers to its prompt,

        A_i = R_i − (Σ_{j≠i} R_j) / (k − 1)

    returns (B,): the sum of each answer's rewards; the k = group answers to one prompt are adjacent. Returns
    (B,).

    A baseline that does not depend on the answer leaves the expected policy gradient unchanged and reduces
    its noise. The mean of the others is such a baseline, because answers are sampled independently. With the
    answer's own return in it, as in `grpo`, the gradient is smaller by the factor (k − 1)/k."""
    R = returns.view(-1, group)
    return (R - (R.sum(1, keepdim=True) - R) / (group - 1)).flatten()


def grpo(returns, group, lengths, divide_by_std=True, divide_by_length=True):
    """Group-relative advantages (Shao et al. 2024, section 4.1.2): A_i = (R_i − mean R) / std R over the
    answers to one prompt. returns (B,): as in `rloo`; lengths (B,): tokens of each answer. Returns (B,).

    GRPO has two biases; without both it is "Dr. GRPO" (Liu et al. 2025). Dividing by the standard deviation
    gives prompts with nearly equal returns the same weight as prompts whose returns differ much. And GRPO
    averages the loss over each answer's own tokens first: a token of a long bad answer is then punished less
    than a token of a short one, and bad answers grow longer.

    In the paper the KL is a term of the loss, the mean of ρ − log ρ − 1 with ρ = π_ref/π (k3). Its expected
    gradient is that of KL(π_ref ‖ π), not of KL(π ‖ π_ref). Here the KL is in the reward, as in ppo.py."""
    R = returns.view(-1, group)
    advantages = R - R.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (R.std(1, keepdim=True) + 1e-4)
    if divide_by_length:                # in a mean over all tokens of the batch, each answer counts alike
        lengths = lengths.to(R.dtype)
        advantages = advantages * (lengths.mean() / lengths).view(-1, group)
    return advantages.flatten()


def advantages_in_groups(returns, mask, cfg):
    """What the flags say: (B,), from returns (B,) and the mask (B, T) of the answers."""
    if cfg.advantage == "rloo":
        return rloo(returns, cfg.group)
    return grpo(returns, cfg.group, mask.sum(1), cfg.divide_by_std, cfg.divide_by_length)


def rollout(run, tokenizer, prompts, policy, reference):
    """Draw prompts, and sample a group of answers to each. Returns the prompts, one for each answer, with the
    texts and the batch of ppo.rollout. The answers to one prompt stand together."""
    asked = run.rng.choices(prompts, k=run.cfg.batch // run.cfg.group)
    asked = [prompt for prompt in asked for _ in range(run.cfg.group)]
    return asked, *ppo.rollout(run, tokenizer, asked, policy, reference)


def train(cfg, reward=None, policy_loss=ppo.policy_loss, advantages_of=advantages_in_groups, rollout=rollout):
    """reward: as in ppo.train. policy_loss, advantages_of, rollout: functions to use in place of these three,
    which variants beside this one bring."""
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    prompts = load_prompts(cfg, tokenizer, policy.config.block_size - cfg.max_new_tokens)
    reward = reward or find_reward(cfg.reward, tokenizer)
    run = Run(cfg, cfg.steps)
    run.place(policy, *reward.networks, reference=reference)
    optimizer = make_optimizer(policy, cfg.lr, eps=1e-5)
    controller = ppo.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(policy=policy, optimizer=optimizer, controller=controller)
    run.show_answers(policy, tokenizer, prompts)
    while run.step < cfg.steps:
        # 1. Rollout: several answers to each prompt
        asked, answers, batch = rollout(run, tokenizer, prompts, policy, reference)
        mask = batch["mask"]

        # 2. Rewards
        scores = torch.where(batch["ended"], reward(run, asked, answers, batch), cfg.no_end_score)
        rewards = ppo.kl_rewards(scores, batch["old_logprobs"], batch["ref_logprobs"], mask, controller.coef)

        # 3. Advantages: from whole answers, the same for each of an answer's tokens.
        advantages = advantages_of(rewards.sum(1), mask, cfg)
        batch |= {"scores": scores, "rewards": rewards, "advantages": advantages[:, None] * mask}

        # 4. Update
        lr_factor = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
        history, updates = [], 0
        for rows in ppo.minibatches(cfg):
            minibatch, stats = select(batch, rows), Meter()
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                logprobs, entropy = policy.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                                    entropy_grad=cfg.entropy_coef > 0)
                loss, clip_fraction = policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"],
                                                  cfg.clip)
                entropy = ppo.masked_mean(entropy, b["mask"])
                (share * (loss - cfg.entropy_coef * entropy)).backward()
                stats.add(share, policy_loss=loss, entropy=entropy, clip_fraction=clip_fraction,
                          approx_kl=ppo.approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
            means = stats.means()
            history.append(means)
            if cfg.update_kl > 0 and means["approx_kl"] > cfg.update_kl:
                optimizer.zero_grad()
                break
            loss = means["policy_loss"] - cfg.entropy_coef * means["entropy"]
            run.optimizer_step(optimizer, cfg.lr * lr_factor, loss, f"rows {rows.tolist()}")
            updates += 1

        kl = (batch["old_logprobs"] - batch["ref_logprobs"]).sum(1).mean().item()
        metrics = {"score": scores.mean(), **answer_metrics(batch, asked, answers),
                   "kl": kl, "kl_coef": controller.coef,
                   **{name: sum(m[name] for m in history) / len(history) for name in history[0]},
                   "updates": updates}
        run.warn_if(metrics["entropy"] < 0.01, "entropy is near 0: raise --entropy_coef or --kl_coef")
        run.warn_if(cfg.adaptive_kl and kl > 4 * cfg.kl_target, "KL is far above its target: lower --lr")
        run.warn_if(metrics["ended"] < 0.1, "few answers end: raise --max_new_tokens, lower --no_end_score")
        run.write_examples("rollout", rollout_examples(tokenizer, asked, batch))

        # 5. β
        if cfg.adaptive_kl:
            controller.update(kl, cfg.batch)    # before run.log: its checkpoint holds the next step's β
        run.log(metrics)
    run.show_answers(policy, tokenizer, prompts)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
