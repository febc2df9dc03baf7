"""Stage 3, PPO: optimise the learned reward, and stay close to the answers that it has been learnt from.

    python ppo.py                                                     on the embedded world (data/world.py)
    python ppo.py --kl_coef 0 --no-adaptive_kl --out out/ppo_no_kl    the same with nothing to hold it back
    python ppo.py --reward data/world.py:exact --data out/world/checkable.jsonl --out out/checked
                                                                      a program in the reward model's place

Four networks. The policy π ("actor") and the frozen reference π_ref both start as the model of supervised
fine-tuning (SFT). The frozen reward model scores answers. The critic V predicts what an answer will earn, and
starts as a copy of the reward model: that already knows good answers from bad ones, while the SFT model has
never seen a score. An action is one token, a state all tokens before it. One step, as in `train`:

    1. rollout      the policy answers a batch of prompts
    2. rewards      each token earns −β·(log π − log π_ref), a KL penalty; the last one also earns the score
    3. advantages   compare what followed each token with what the critic expected (GAE)
    4. update       a few epochs of clipped optimiser steps on these answers
    5. β            adapts, so that π stays about `kl_target` nats per answer away from π_ref

Why stay close at all? The reward model has learnt from answers like the SFT model's. Far from them its score
is a guess, and a policy that climbs it finds the places where the guess is too high: the score goes up while
the answers get worse (reward hacking). The KL penalty keeps the policy where the score means something.

Every (B, T) array is right-padded; column t belongs to the choice of tokens[:, t], made in the state
tokens[:, :t]; `mask` (B, T) is true on the tokens that the policy chose; log-probabilities and values are 0
elsewhere. Which implementation details are here, and which are not: docs/details.md.
"""
import time
from dataclasses import dataclass

import torch

from data import answers
from data.loading import WORLD, load_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Meter, select
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.rewards import find_reward
from runtime.run import Run


@dataclass
class OnPolicy(Training):
    """The flags of stages that learn from the policy's own answers: this one, and grpo.py."""
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    reward: str = flag("out/reward_model", "what scores answers: see runtime/rewards.py")
    data: str = flag(WORLD, "prompts: a folder of the world\'s, or a file (.json, .jsonl)")
    steps: int = flag(54, "steps of rollout and update", 1)
    batch: int = flag(128, "answers per rollout", 2)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    temperature: float = flag(1.0, "of sampling, and of the answers' log-probabilities", 0.01)
    no_end_score: float = flag(-3.0, "score of an answer that does not end, in place of any other")
    epochs: int = flag(2, "passes over a rollout", 1)
    minibatches: int = flag(2, "optimiser steps per epoch", 1)
    lr: float = flag(1e-3, "the policy's peak learning rate", 0)
    warmup: int = flag(3, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of learning rates", choices=("constant", "linear", "cosine"))
    kl_coef: float = flag(0.1, "β, the KL penalty; where it starts if it adapts", 0)
    adaptive_kl: bool = flag(True, "adapt β, to keep the KL near kl_target")
    kl_target: float = flag(3.5, "nats per answer between policy and reference", 1e-6)
    kl_horizon: int = flag(1000, "answers over which β adapts", 1)
    clip: float = flag(0.2, "ε: π/π_old of a token may be pushed this far from 1", 0)
    entropy_coef: float = flag(0.0, "bonus per nat of entropy", 0)
    update_kl: float = flag(0.1, "nats per token from π_old at which an update stops; 0 never stops it", 0)

    def __post_init__(self):
        if 0.2 * self.batch >= self.kl_horizon:
            raise ValueError("--kl_horizon must exceed --batch/5, or β could turn negative")


@dataclass
class Config(OnPolicy):
    out: str = flag("out/ppo", "folder that the run writes")
    critic_lr: float = flag(1e-3, "the critic's peak learning rate", 0)
    gamma: float = flag(1.0, "discount per token", 0, 1)
    lam: float = flag(0.95, "λ of GAE: 1 trusts what followed, 0 the critic", 0, 1)
    value_clip: float = flag(0.2, "a value may be pushed this far from the old one", 0)
    whiten_rewards: bool = flag(False, "scale rewards around their mean to standard deviation 1")
    whiten_advantages: bool = flag(True, "give advantages mean 0 and standard deviation 1")


def masked_mean(x, mask):
    """Mean of x where the mask is true: a scalar, whatever x is elsewhere."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Give x (B, T) standard deviation 1 over the mask, and mean 0 unless shift_mean is false; 0 outside it.

    For advantages both: an action is good or bad compared with the batch's average, and the size of a step
    does not depend on the scale of rewards. Rewards keep their mean. Each further token earns it once more,
    so it decides whether long answers pay, and with another mean another policy would be best."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)


# --------------------------------------------------------------------------------------- 1. rollout

def rollout(run, actor, reference, tokenizer, prompts):
    """Let the policy answer the prompts (message lists). Returns a dict of tensors, a row per answer: (B, T)
    tokens, mask, old_logprobs, ref_logprobs; (B,) lengths (prompt and answer, in tokens), ended (whether the
    end token is there)."""
    cfg = run.cfg
    batch = run.sample(actor, [tokenizer.prompt(p) for p in prompts], run.seeds(len(prompts)),
                       cfg.max_new_tokens, cfg.temperature, stop_token=tokenizer.end)
    # π_old is the policy that sampled. At temperature τ that is softmax(logits/τ): log-probabilities at
    # another temperature would be those of another policy.
    batch["old_logprobs"] = batch.pop("logprobs")

    def read(b):
        found = {"ref_logprobs": reference.logprobs(b["tokens"], b["mask"], cfg.temperature)}
        if run.bfloat16:
            # Sampling one token at a time rounds differently from reading whole answers, as the update does.
            # In float32 that is nothing, in bfloat16 a percent or so: π/π_old would not be 1 before the
            # first step. Compute π_old once more, in the way that π will be.
            found["old_logprobs"] = actor.logprobs(b["tokens"], b["mask"], cfg.temperature)
        return found
    return batch | run.map(read, batch)


# --------------------------------------------------------------------------------------- 2. rewards

def kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """What each action earns: −β·(log π − log π_ref), and the last one also the score.

    scores (B,); logprobs, ref_logprobs (B, T) in nats, of the chosen tokens; mask (B, T) bool; kl_coef is β.
    Returns (B, T), 0 outside the mask (Ziegler et al. 2019, eq. 2).

    KL(π ‖ π_ref) is the mean of log π/π_ref over what π samples. So the log-ratios of sampled tokens, added
    up over an answer, estimate it without bias. Paid token by token, not in one sum at the end, each action
    answers for its own part, and nobody has to find out whose it was. Why a reward, and not a term of the
    loss? The gradient of a sampled log π/π_ref is ∇log π, with mean 0 under π wherever π_ref is. As a reward
    it reaches the policy through the advantages, and so does what an action will cost later."""
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    column = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * column).argmax(dim=1)                # the last true column of each row
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores * mask.any(dim=1)
    return rewards


# ------------------------------------------------------------------------------------ 3. advantages

def state_values(critic, tokens, mask):
    """V of the state in which each action is chosen, (B, T). The critic's output at column t − 1 has read
    tokens[:, :t], the state of column t; its output at t has seen the action itself. So outputs move one
    column to the right (column 0 has no state, and no action)."""
    out = critic(tokens)
    return torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1) * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards over each row's actions:

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    return_t = A_t + V_t

    rewards, values, mask (B, T); values[:, t] is that of the state in which action t is chosen. After the
    last action it is 0, for nothing more is earned. Returns advantages and returns, both (B, T), 0 outside
    the mask, without a graph. The return is what the critic learns to predict.

    The score comes at the end of an answer: which token earned it? λ = 1 credits each action with all that
    followed: right on average, but as noisy as the rest of the answer. λ = 0 asks the critic what the next
    state is worth: hardly any noise, but wrong by as much as the critic is."""
    rewards, values = torch.where(mask, rewards.detach(), 0), torch.where(mask, values.detach(), 0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # Rows of your own may have gaps in their mask (several turns, say): columns between two actions are
        # skipped.
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)


# ---------------------------------------------------------------------------------------- 4. update

def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised: −E[min(ρA, clip(ρ, 1 ± ε)·A)],
    with ρ = π/π_old per token.

    All (B, T), gradients flow through logprobs alone. Returns the scalar mean over the mask's tokens, and the
    fraction of them where the clipped term is the one that counts.

    At the first step ρ is 1, nothing is clipped, and the gradient is the plain policy gradient −E[A·∇log π].
    Later tokens still come from π_old; a token that π now chooses more often counts that much more, by ρ, so
    that one rollout serves for several steps. But −ρA alone pushes good actions (A > 0) up and bad ones down
    without end, though answers of π_old say little about a policy far from it. Hence the clip:

        A > 0, ρ > 1 + ε   or   A < 0, ρ < 1 − ε    pushed far enough: the clipped term counts, gradient 0
        A > 0, ρ < 1 − ε   or   A < 0, ρ > 1 + ε    moved the wrong way: ρA counts, and keeps its gradient
    """
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    advantages = advantages.detach()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)
    return loss, masked_mean((clipped < unclipped).float(), mask).detach()


def value_loss(values, old_values, returns, mask, clip):
    """½·mean of the larger of (V − return)² and (V_clipped − return)², with V_clipped at most `clip` away
    from the old value (OpenAI's PPO; Huang et al. 2024). All (B, T), gradients flow through values alone.

    Of two errors the larger counts, as the smaller of two gains does for the policy. A value that has moved
    more than `clip` towards its return gets no gradient; one that has moved away from it, or well past it,
    still does."""
    old_values, returns = torch.where(mask, old_values.detach(), 0), torch.where(mask, returns.detach(), 0)
    values = torch.where(mask, values, 0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def approximate_kl(logprobs, old_logprobs, mask):
    """KL(π_old ‖ π) per token, from tokens that π_old sampled: mean of ρ − 1 − log ρ, k3 in Schulman (2020).

    The KL is by definition the mean of −log ρ under π_old. Adding ρ − 1 does not change it, for E[ρ] = 1
    there. But −log ρ is negative on about half of the tokens, and between two policies so close its noise
    drowns the KL; k3 is never negative, and far less noisy."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    return masked_mean(log_ratio.exp() - 1 - log_ratio, mask)


def update(run, batch, nets, optimizers, also=None):
    """A few epochs of optimiser steps on a rollout with its advantages and returns. Returns {name: mean over
    steps}, and "updates", the number taken. also: see train.

    A step that would start more than update_kl from the policy that sampled is not taken, and ends the
    update. The clip does not prevent that: it takes away a token's own gradient, but what other tokens teach
    moves its ρ further."""
    cfg, actor, critic = run.cfg, nets["actor"], nets["critic"]
    factor, seen, updates = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay), [], 0
    for rows in [rows for _ in range(cfg.epochs)
                 for rows in torch.randperm(len(batch["tokens"])).chunk(cfg.minibatches)]:
        # One network after the other: what a backward pass needs is in memory for one of them at a time.
        minibatch, stats = select(batch, rows), Meter()
        weights = minibatch["mask"].sum(1)              # each token counts alike, whichever rows it is with
        for b, share in run.micro_batches(minibatch, weights):
            logprobs, entropy = actor.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                               entropy_grad=cfg.entropy_coef > 0)
            loss, clipped = policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"], cfg.clip)
            entropy = masked_mean(entropy, b["mask"])
            (share * (loss - cfg.entropy_coef * entropy)).backward()
            stats.add(share, policy_loss=loss, entropy=entropy, clipped=clipped,
                      approx_kl=approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
        for b, share in run.micro_batches(minibatch, weights):
            values = state_values(critic, b["tokens"], b["mask"])
            loss = value_loss(values, b["old_values"], b["returns"], b["mask"], cfg.value_clip)
            (share * loss).backward()
            beyond = ((values - b["old_values"]).abs() > cfg.value_clip).float()
            stats.add(share, value_loss=loss, value_clipped=masked_mean(beyond, b["mask"]))
        seen.append(stats.means())
        if cfg.update_kl > 0 and seen[-1]["approx_kl"] > cfg.update_kl:
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            break
        if also:
            also(run, actor)
        for name, lr, loss in (("actor", cfg.lr, "policy_loss"), ("critic", cfg.critic_lr, "value_loss")):
            run.optimizer_step(optimizers[name], lr * factor, seen[-1][loss], f"{name} on {rows.tolist()}")
        updates += 1
    return {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]} | {"updates": updates}


# --------------------------------------------------------------------------------------------- 5. β

class AdaptiveKL:
    """A proportional controller of β (Ziegler et al. 2019, section 2.2):
    e = clip(KL/target − 1, −0.2, 0.2),  β ← β·(1 + e·episodes/horizon).

    Which β leads to which KL depends on the reward model; the KL that one wants is easier to name in advance.
    The clip keeps one odd batch from throwing β off. β is multiplied: it moves in proportion, as fast at 0.01
    as at 1, and stays positive, if horizon > 0.2·episodes."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        """kl: nats per answer, measured on this many answers."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon


# ----------------------------------------------------------------------------------------- the loop

def train(cfg, reward=None, also=None):
    """reward: in the place of --reward (runtime/rewards.py). also: a function (run, actor) that adds to the
    policy's gradient before each of its steps. Both are for variants/."""
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    actor = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    prompts = load_prompts(cfg, tokenizer, actor.config.block_size - cfg.max_new_tokens)
    reward = reward or find_reward(cfg.reward, tokenizer)
    critic = load(reward.folder or cfg.init, "scalar")
    run = Run(cfg, cfg.steps)
    run.place(actor, reference, *reward.networks, critic)
    nets = {"actor": actor, "critic": critic}
    optimizers = {name: make_optimizer(net, cfg.lr, eps=1e-5) for name, net in nets.items()}
    beta = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(controller=beta, **nets, **{f"{name}_optimizer": x for name, x in optimizers.items()})
    while run.step < cfg.steps:
        began, chosen = time.time(), run.rng.choices(prompts, k=cfg.batch)

        # 1. rollout
        batch = rollout(run, actor, reference, tokenizer, chosen)
        mask, texts = batch["mask"], answers.texts(tokenizer, batch)

        # 2. rewards
        scores, signs = reward(run, batch, chosen, texts)
        if scores is None:                                          # nothing that it could say counts
            break
        # The reward model has never seen an answer without an end: its score there is a guess, and if that
        # were high the policy would learn to go on for ever. A fixed low score teaches it to end.
        batch["scores"] = torch.where(batch["ended"], scores, cfg.no_end_score)
        earned = kl_rewards(batch["scores"], batch["old_logprobs"], batch["ref_logprobs"], mask, beta.coef)
        if cfg.whiten_rewards:
            earned = whiten(earned, mask, shift_mean=False)

        # 3. advantages
        batch |= run.map(lambda b: {"old_values": state_values(critic, b["tokens"], b["mask"])}, batch)
        advantages, returns = gae(earned, batch["old_values"], mask, cfg.gamma, cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        batch |= {"rewards": earned, "advantages": advantages, "returns": returns}

        # 4. update
        stats = update(run, batch, nets, optimizers, also)

        # 5. β
        metrics = answers.metrics(batch, chosen, texts, began) | {"kl_coef": beta.coef} | stats | signs
        metrics["explained_variance"] = answers.explained_variance(batch["old_values"], returns, mask)
        if cfg.adaptive_kl:
            beta.update(metrics["kl"], cfg.batch)           # before run.log, which saves what a resume reads

        answers.keep_rollout(run, tokenizer, chosen, batch)
        run.warn(answers.policy_warnings(cfg, metrics))
        run.log(metrics)
    run.finish(actor, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
