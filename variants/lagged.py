"""PPO whose answers are older than its weights: those of step t were sampled before update t − lag.

    python -m variants.lagged                           one step of lag
    python -m variants.lagged --lag 4 --no-correct      four, as if the answers were fresh
    python -m variants.lagged --lag 0                   the weights of ppo.py, bit for bit

Large systems sample and train at the same time, on different GPUs. The answers are then by a policy μ that is
some updates behind. Here both happen in one process, one after the other: nothing gets faster, but one sees
what the lag does to learning.

Three policies meet. μ sampled; π_old is the policy at the start of the update; π is being updated. The ratio
ρ = π/π_old must not contain the lag, or the clip would hold back tokens on which μ and π_old already differ.
A weight on each token corrects for its having been chosen by μ (decoupled PPO: Hilton et al. 2022,
arXiv 2110.00641; AReaL: Fu et al. 2025, arXiv 2505.24298):

    w = min(π_old/μ, w_max),        loss = −E[w·min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A)]

What came before the token and what follows it is still μ's: the whole correction would be a product of ratios
over the answer, and far too noisy. A single ratio can be as large as 1/μ. The cut at w_max limits its noise,
and is a bias (truncated importance sampling: Ionides 2008). The log has the mean weight, the share of weights
that were cut, and the share of the n tokens that would tell as much with equal weights, (Σw)²/(n·Σw²). Its
`kl` is the mean of log π_old − log π_ref over μ's answers, and so only nearly the KL that β controls.

Is it faster? With sampling S, reading R and updates U in seconds on all N devices, a step takes S + R + U.
Side by side, n devices sample: a step takes the longer of S·N/n and (R + U)·N/(N − n). The best n makes both
equal, and they are S + R + U again. Running both at once helps only where a part scales badly, as sampling
few rows on many devices does.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
class Config(ppo.Config):
    out: str = flag("out/lagged", "folder that the run writes")
    lag: int = flag(1, "updates between the policy that answers and the one that learns from it", 0)
    correct: bool = flag(True, "weight tokens by π_old/μ", needs="lag")
    max_weight: float = flag(2.0, "largest weight of a token", 1, needs="correct")


def importance_weights(old_logprobs, behaviour_logprobs, mask, most):
    """w = min(π_old/μ, most) of tokens that μ sampled. All (B, T); w is 0 outside the mask. Also returns
    {metric: scalar}."""
    ratio = torch.where(mask, old_logprobs - behaviour_logprobs, 0).exp()
    w = ratio.clamp(max=most) * mask
    return w, {"weight": ppo.masked_mean(w, mask), "weights_cut": ((ratio > most) & mask).sum() / mask.sum(),
               "effective": w.sum() ** 2 / (mask.sum() * (w ** 2).sum())}


class Waiting(dict):
    """{slot: rollout that waits for its update}, as a part of the checkpoint."""

    def state_dict(self):
        return {"state": self}


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    prompts = load_prompts(cfg, tokenizer, policy.config.block_size - cfg.max_new_tokens)
    reward = find_reward(cfg.reward, tokenizer)
    critic = load(reward.folder or cfg.init, "scalar")
    run = Run(cfg, cfg.steps)
    run.place(policy, *reward.networks, critic, reference=reference)
    policy_optimizer = make_optimizer(policy, cfg.lr, eps=1e-5)
    critic_optimizer = make_optimizer(critic, cfg.critic_lr, eps=1e-5)
    controller = ppo.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)

    width = max(len(tokenizer.prompt(p)) for p in prompts) + cfg.max_new_tokens

    def fresh():
        chosen = run.rng.choices(range(len(prompts)), k=cfg.batch)
        batch = ppo.rollout(run, tokenizer, [prompts[i] for i in chosen], policy, reference)[1]
        if cfg.lag > 0:             # what waits has one width, as checkpoints demand
            batch = {name: F.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x
                     for name, x in batch.items()}
        return batch | {"prompt": torch.tensor(chosen, device=run.device)}
    waiting = Waiting({slot: fresh() for slot in range(cfg.lag)})
    run.resume(policy=policy, critic=critic, policy_optimizer=policy_optimizer,
               critic_optimizer=critic_optimizer, controller=controller, waiting=waiting)
    run.show_answers(policy, tokenizer, prompts)
    while run.step < cfg.steps:
        # 1. Rollout. The new one takes the place of the one that has waited longest.
        batch = fresh()
        if cfg.lag > 0:
            slot = run.step % cfg.lag
            batch, waiting[slot] = select(waiting[slot], range(cfg.batch)), batch       # without padding
        mask, mu = batch["mask"], batch["old_logprobs"]
        asked = [prompts[i] for i in batch["prompt"].tolist()]
        answers = [tokenizer.decode(ids[row].tolist()) for ids, row in zip(batch["tokens"], mask)]
        if cfg.lag > 0:             # π_old is no longer μ
            batch["old_logprobs"] = run.logprobs(policy, batch, cfg.temperature)

        # 2. Rewards
        scores = torch.where(batch["ended"], reward(run, asked, answers, batch), cfg.no_end_score)
        rewards = ppo.kl_rewards(scores, batch["old_logprobs"], batch["ref_logprobs"], mask, controller.coef)
        rewards = ppo.whiten(rewards, mask, shift_mean=False) if cfg.whiten_rewards else rewards

        # 3. Advantages. A weight is at least 0, so it may go into them: w·min(ρA, ...) = min(ρ·wA, ...).
        batch |= run.map(lambda b: {"old_values": ppo.state_values(critic, b["tokens"], b["mask"])}, batch)
        advantages, returns = ppo.gae(rewards, batch["old_values"], mask, cfg.gamma, cfg.lam)
        advantages = ppo.whiten(advantages, mask) if cfg.whiten_advantages else advantages
        weights, lag_metrics = importance_weights(batch["old_logprobs"], mu, mask, cfg.max_weight)
        if cfg.correct:
            advantages = advantages * weights
        batch |= {"scores": scores, "rewards": rewards, "advantages": advantages, "returns": returns}

        # 4. Update
        lr_factor = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
        history, updates = [], 0
        for rows in ppo.minibatches(cfg):
            minibatch, stats = select(batch, rows), Meter()
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                logprobs, entropy = policy.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                                    entropy_grad=cfg.entropy_coef > 0)
                loss, clip_fraction = ppo.policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"],
                                                      cfg.clip)
                entropy = ppo.masked_mean(entropy, b["mask"])
                (share * (loss - cfg.entropy_coef * entropy)).backward()
                stats.add(share, policy_loss=loss, entropy=entropy, clip_fraction=clip_fraction,
                          approx_kl=ppo.approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                values = ppo.state_values(critic, b["tokens"], b["mask"])
                loss = ppo.value_loss(values, b["old_values"], b["returns"], b["mask"], cfg.value_clip)
                (share * loss).backward()
                stats.add(share, value_loss=loss)
            means = stats.means()
            history.append(means)
            if cfg.update_kl > 0 and means["approx_kl"] > cfg.update_kl:
                policy_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                break
            loss = means["policy_loss"] - cfg.entropy_coef * means["entropy"]
            run.optimizer_step(policy_optimizer, cfg.lr * lr_factor, loss, f"policy on rows {rows.tolist()}")
            run.optimizer_step(critic_optimizer, cfg.critic_lr * lr_factor, means["value_loss"],
                               f"critic on rows {rows.tolist()}")
            updates += 1

        kl = (batch["old_logprobs"] - batch["ref_logprobs"]).sum(1).mean().item()
        metrics = {"score": scores.mean(), **answer_metrics(batch, asked, answers),
                   "kl": kl, "kl_coef": controller.coef, **lag_metrics,
                   **{name: sum(m[name] for m in history) / len(history) for name in history[0]},
                   "updates": updates}
        run.write_examples("rollout", rollout_examples(tokenizer, asked, batch))

        # 5. β
        if cfg.adaptive_kl:
            controller.update(kl, cfg.batch)
        run.log(metrics)
    run.show_answers(policy, tokenizer, prompts)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
