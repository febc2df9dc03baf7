"""Stage 3, PPO: optimise the learned reward, and stay close to the answers that it has been learnt from.

    python ppo.py                                                     on the embedded world (data/world.py)
    python ppo.py --kl_coef 0 --no-adaptive_kl --out out/ppo_no_kl    the same with nothing to hold it back
    python ppo.py --advantage rloo --out out/rloo                     without a critic (or: grpo)
    python ppo.py --reward data/world.py:exact --data out/world/checkable.jsonl --out out/checked
                                                                      a program in the reward model's place

Four networks. The policy π ("actor") and the frozen reference π_ref both start as the model of supervised
fine-tuning (SFT). The frozen reward model scores answers. The critic V predicts what an answer will earn, and
starts as a copy of the reward model: that already knows good answers from bad ones, while the SFT model has
never seen a score. An action is one token, a state all tokens before it. One step, as in this file:

    1. rollout      the policy answers a batch of prompts, and the other networks read the answers
    2. rewards      each token earns −β·(log π − log π_ref), a KL penalty; the last one also earns the score
    3. advantages   compare what followed each token with what the critic expected (GAE), or each answer with
                    others to the same prompt (RLOO, GRPO: no critic is made)
    4. update       a few epochs of clipped optimiser steps on these answers
    5. β            adapts, so that π stays about `kl_target` nats per answer away from π_ref

Why stay close at all? The reward model has learnt from answers like the SFT model's. Far from them its score
is a guess, and a policy that climbs it finds the places where the guess is too high: the score goes up while
the answers get worse (reward hacking). The KL penalty keeps the policy where the score means something.

Every (B, T) array is right-padded; column t belongs to the choice of tokens[:, t], made in the state
tokens[:, :t]; `mask` (B, T) is true on the tokens that the policy chose; log-probabilities and values are 0
elsewhere.

Of the implementation details that Huang et al. list (2024, arXiv 2403.17031, and its 2023 precursor), here
are: critic from the reward model, no dropout, scores normalised on SFT samples (by reward_model.py), the
temperature in the log-probabilities of answers, KL in the reward per token, a fixed score for an answer
without an end, rewards whitened without moving their mean, advantages whitened, both clipped losses, Adam's ε
of 1e-5, a decaying learning rate, adaptive KL. Left out: padding on the left, rejection of answers without a
given token (here they end with <|im_end|>), and a trunk that policy and value share.
"""
import time
from dataclasses import dataclass

import torch

import uncertainty
from data import loading, world
from data.answers import check, opened
from data.batches import encode_demonstrations, fit_prompts
from data.tokenizer import Tokenizer
from runtime import Run, Training, flag, load, load_reward_model, main, make_optimizer, pad, schedule, select
from runtime.models import load_rewards


@dataclass
class Config(Training):
    out: str = flag("out/ppo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    reward: str = flag("out/reward_model", "reward model, where the critic starts too; or a Python function, "
                       "file.py:name; or both, with a comma between")
    reward_model_coef: float = flag(1.0, "weight of the reward model's score beside a function's", 0)
    data: str = flag("world", "prompts: world, or a file (.json, .jsonl, .jsonl.gz)")
    steps: int = flag(54, "steps of rollout and update", 1)
    batch: int = flag(128, "answers per rollout", 2)
    advantage: str = flag("gae", "judge an action by a critic, or an answer among others to its prompt",
                          choices=("gae", "rloo", "grpo"))
    group: int = flag(None, "answers per prompt; none is 1 with gae, 4 with rloo and grpo", 1)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    temperature: float = flag(1.0, "of sampling, and of the answers' log-probabilities", 0.01)
    no_end_score: float = flag(-3.0, "score of an answer that does not end, in place of any other")
    epochs: int = flag(2, "passes over a rollout", 1)
    minibatches: int = flag(2, "optimiser steps per epoch", 1)
    lr: float = flag(1e-3, "the policy's peak learning rate", 0)
    critic_lr: float = flag(1e-3, "the critic's", 0)
    warmup: int = flag(3, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of both learning rates", choices=("constant", "linear", "cosine"))
    kl_coef: float = flag(0.1, "β, the KL penalty; where it starts if it adapts", 0)
    adaptive_kl: bool = flag(True, "adapt β, to keep the KL near kl_target")
    kl_target: float = flag(3.5, "nats per answer between policy and reference", 1e-6)
    kl_horizon: int = flag(1000, "answers over which β adapts", 1)
    gamma: float = flag(1.0, "discount per token", 0, 1)
    lam: float = flag(0.95, "λ of GAE: 1 trusts what followed, 0 the critic", 0, 1)
    clip: float = flag(0.2, "ε: π/π_old of a token may be pushed this far from 1", 0)
    value_clip: float = flag(0.2, "a value may be pushed this far from the old one", 0)
    entropy_coef: float = flag(0.0, "bonus per nat of entropy", 0)
    whiten_rewards: bool = flag(False, "scale rewards around their mean to standard deviation 1")
    whiten_advantages: bool = flag(True, "with gae: give advantages mean 0 and standard deviation 1")
    divide_by_std: bool = flag(True, "with grpo: divide advantages by their group's standard deviation")
    divide_by_length: bool = flag(True, "with grpo: each answer counts alike, not each token")
    pessimism: str = flag("none", "score by an ensemble: its mean less a deviation, or its worst head",
                          choices=("none", "deviation", "worst"))
    pessimism_coef: float = flag(1.0, "c of mean − c·standard deviation", 0)
    ood_penalty: float = flag(0.0, "taken off the score of an answer unlike those that the reward model has "
                              "seen (OOD), for each threshold that it is beyond the threshold", 0)
    ood_drop: bool = flag(False, "learn nothing from OOD answers")
    stop_ood: float = flag(1.0, "end the run where more than this share of a rollout is OOD", 0, 1)
    update_kl: float = flag(0.1, "nats per token from π_old at which an update stops; 0 never stops it", 0)
    ptx_coef: float = flag(0.0, "weight of the SFT loss mixed in: InstructGPT's PPO-ptx", 0)
    ptx_data: str = flag("world", "demonstrations for it: world, or a file")
    ptx_batch: int = flag(32, "demonstrations per optimiser step", 1)

    def __post_init__(self):
        if self.group is None:
            self.group = 1 if self.advantage == "gae" else 4
        if self.advantage != "gae" and self.group < 2:
            raise ValueError(f"--advantage {self.advantage} compares answers: --group must be above 1")
        if self.batch % self.group:
            raise ValueError(f"--batch {self.batch} is not a multiple of --group {self.group}")
        if 0.2 * self.batch >= self.kl_horizon:
            raise ValueError("--kl_horizon must exceed --batch/5, or β could turn negative")


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

def state_values(critic, tokens, mask):
    """V of the state in which each action is chosen, (B, T). The critic's output at column t − 1 has read
    tokens[:, :t], the state of column t; its output at t has seen the action itself. So outputs move one
    column to the right (column 0 has no state, and no action)."""
    out = critic(tokens)
    return torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1) * mask


def rollout(cfg, run, prompts, nets, tokenizer):
    """Let the policy answer the prompts (lists of ids), and measure all that the update needs of the answers.

    Returns a dict of tensors, one row per answer: (B, T) tokens, mask, old_logprobs, ref_logprobs, and with a
    critic old_values; (B,) lengths (prompt and answer, in tokens), ended (whether the end token is there),
    and with a reward model scores."""
    batch = run.sample(nets["actor"], prompts, run.seeds(len(prompts)), cfg.max_new_tokens, cfg.temperature,
                       stop_token=tokenizer.end)
    # π_old is the policy that sampled. At temperature τ that is softmax(logits/τ): log-probabilities at
    # another temperature would be those of another policy.
    batch["old_logprobs"] = batch.pop("logprobs")

    def measure(rows):
        b = select(batch, rows)
        tokens, mask = b["tokens"], b["mask"]
        found = {"ref_logprobs": nets["reference"].logprobs(tokens, mask, cfg.temperature)}
        if "reward" in nets:
            found |= uncertainty.score(nets["reward"], tokens, b["lengths"])
        if "critic" in nets:
            found["old_values"] = state_values(nets["critic"], tokens, mask)
        if run.bfloat16:
            # Sampling one token at a time rounds differently from reading whole answers, as the update does.
            # In float32 that is nothing, in bfloat16 a percent or so: π/π_old would not be 1 before the
            # first step. Compute π_old once more, in the way that π will be.
            found["old_logprobs"] = nets["actor"].logprobs(tokens, mask, cfg.temperature)
        return found

    batch |= run.map(measure, range(len(prompts)), batch["lengths"])
    if "heads" in batch:                # the reward model knows where its scores are guesses
        batch["scores"] = uncertainty.cautious(batch, cfg.pessimism, cfg.pessimism_coef, cfg.ood_penalty,
                                               least=cfg.no_end_score)
    return batch


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


def estimate(cfg, batch, kl_coef):
    """A rollout together with what the update learns from: advantages, and with a critic returns, (B, T)."""
    # The reward model has never seen an answer without an end: its score there is a guess, and if that were
    # high the policy would learn to go on for ever. A fixed low score teaches it to end.
    batch = batch | {"scores": torch.where(batch["ended"], batch["scores"], cfg.no_end_score)}
    mask = batch["mask"]
    rewards = kl_rewards(batch["scores"], batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, batch["old_values"], mask, cfg.gamma, cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        return batch | {"rewards": rewards, "advantages": advantages, "returns": returns}
    # A whole answer is one action here: all of its tokens share what it earned, and γ has no part in it.
    if cfg.advantage == "rloo":
        advantages = rloo(rewards.sum(1), cfg.group)
    else:
        advantages = grpo(rewards.sum(1), cfg.group, mask.sum(1), cfg.divide_by_std, cfg.divide_by_length)
    return batch | {"rewards": rewards, "advantages": advantages[:, None] * mask}


def leave_out_unfamiliar(batch):
    """Learn nothing from answers unlike those that the reward model has seen, good or bad: their advantages
    are 0, their returns what the critic expects anyway. That an answer must end, no model need say."""
    familiar = ((batch["distance"] <= 1) | ~batch["ended"])[:, None]
    found = {"advantages": batch["advantages"] * familiar}
    if "returns" in batch:
        found["returns"] = torch.where(familiar, batch["returns"], batch["old_values"])
    return batch | found


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


def actor_loss(cfg, actor, b):
    """The policy's loss on some answers of a rollout, and what a person watches: {name: mean over their
    tokens}."""
    logprobs, entropy = actor.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                       entropy_grad=cfg.entropy_coef > 0)
    loss, clipped = policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"], cfg.clip)
    entropy = masked_mean(entropy, b["mask"])
    return {"loss": loss - cfg.entropy_coef * entropy, "policy_loss": loss, "entropy": entropy,
            "clipped": clipped, "approx_kl": approximate_kl(logprobs, b["old_logprobs"], b["mask"])}


def critic_loss(cfg, critic, b):
    """The same for the critic."""
    values = state_values(critic, b["tokens"], b["mask"])
    loss = value_loss(values, b["old_values"], b["returns"], b["mask"], cfg.value_clip)
    beyond = ((values - b["old_values"]).abs() > cfg.value_clip).float()
    return {"loss": loss, "value_loss": loss, "value_clipped": masked_mean(beyond, b["mask"])}


def ptx_loss(cfg, run, actor, demonstrations):
    """ptx_coef times the SFT loss on some demonstrations, so that what the reward does not ask for is not
    forgotten (PPO-ptx: Ouyang et al. 2022, eq. 2)."""
    tokens = pad([d.ids for d in demonstrations]).to(run.device)
    mask = pad([d.learn for d in demonstrations]).to(run.device)
    return {"loss": -cfg.ptx_coef * masked_mean(actor.logprobs(tokens, mask), mask)}


def optimizer_step(cfg, run, batch, rows, nets, optimizers, demonstrations):
    """One optimiser step of policy and critic on some rows of a rollout. Returns {name: mean over the rows'
    tokens}, and whether the step was taken.

    It is not, if the policy is already more than update_kl from the one that sampled. The clip does not
    prevent that: it takes away a token's own gradient, but what other tokens teach moves its ρ further."""
    # Gradients, some rows at a time; a row weighs as much as it has tokens, so that each token counts alike,
    # whichever rows it is computed with. One network after the other: what a backward pass needs is then in
    # memory for one of them at a time.
    weights, lengths = batch["mask"][rows].sum(1), batch["lengths"][rows]
    stats = run.accumulate(lambda some: actor_loss(cfg, nets["actor"], select(batch, some)), rows,
                           weights, lengths)
    if "critic" in nets:
        stats |= run.accumulate(lambda some: critic_loss(cfg, nets["critic"], select(batch, some)), rows,
                                weights, lengths)
    del stats["loss"]                                   # which is policy_loss or value_loss
    if cfg.update_kl > 0 and stats["approx_kl"] > cfg.update_kl:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        return stats, False
    if cfg.ptx_coef > 0:
        chosen = run.rng.sample(demonstrations, min(cfg.ptx_batch, len(demonstrations)))
        run.accumulate(lambda some: ptx_loss(cfg, run, nets["actor"], some), chosen,   # adds to the gradient
                       weights=[sum(d.learn) for d in chosen], lengths=[len(d.ids) for d in chosen])
    factor = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
    run.optimizer_step(optimizers["actor"], cfg.lr * factor, stats["policy_loss"], f"actor on {rows}")
    if "critic" in nets:
        run.optimizer_step(optimizers["critic"], cfg.critic_lr * factor, stats["value_loss"],
                           f"critic on {rows}")
    return stats, True


def update(cfg, run, batch, nets, optimizers, demonstrations):
    """A few epochs of optimiser steps on a rollout with its advantages and returns. Returns {name: mean over
    steps}, and "updates", the number taken. The first step that is not taken ends the update; those before
    it stay, and the next rollout is sampled from the policy that they made."""
    minibatches, steps = [], []
    for _ in range(cfg.epochs):
        minibatches += torch.randperm(len(batch["tokens"])).chunk(cfg.minibatches)
    for rows in minibatches:
        stats, taken = optimizer_step(cfg, run, batch, rows.tolist(), nets, optimizers, demonstrations)
        steps.append(stats)
        if not taken:
            break
    means = {name: sum(stats[name] for stats in steps) / len(steps) for name in steps[0]}
    return means | {"updates": len(steps) if taken else len(steps) - 1}


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

def explained_variance(values, returns, mask):
    """1 − Var[return − V] / Var[return] over the mask: 1 for a perfect critic; 0 for one that is no better
    than a constant, so that advantages are as noisy as without a critic; negative for one that adds noise."""
    residual = (returns - values)[mask].var()
    return 1 - residual / returns[mask].var().clamp(min=1e-8)


def warnings(cfg, metrics):
    """Signs of a collapsing policy in a step's metrics, in words that say what to change: a list of texts."""
    found = []
    if metrics["entropy"] < 0.01:
        found.append("answers leave nothing to chance (entropy near 0): raise --entropy_coef or --kl_coef")
    if cfg.adaptive_kl and metrics["kl"] > 4 * cfg.kl_target:
        found.append("KL is far beyond its target: lower --lr, or start with a higher --kl_coef")
    if metrics["ended"] < 0.1:
        found.append("hardly an answer ends: raise --max_new_tokens, or lower --no_end_score")
    return found


def step(cfg, run, prompts, nets, optimizers, controller, tokenizer, demonstrations, program):
    """One step of PPO on some prompts (message lists). Returns its metrics, or None where it stops here."""
    began = time.time()
    batch = rollout(cfg, run, [tokenizer.prompt(p) for p in prompts], nets, tokenizer)
    answers = [tokenizer.decode(tokens[m].tolist()) for tokens, m in zip(batch["tokens"], batch["mask"])]
    if program:
        learned = cfg.reward_model_coef * batch["scores"] if "reward" in nets else 0.0
        batch["scores"] = learned + check(run, program, prompts, answers, batch["lengths"])
    batch = estimate(cfg, batch, controller.coef)
    if cfg.ood_drop:
        batch = leave_out_unfamiliar(batch)
    ood = (batch["distance"] > 1).float().mean().item() if "distance" in batch else 0.0
    for which in ("first", "last") if run.step == 0 else ("last",):         # for evaluate.py's report
        run.write(f"rollout_{which}.json", opened(tokenizer, prompts, batch, run.step + 1))
    if ood > cfg.stop_ood:
        print(f"stopped before step {run.step + 1}: {ood:.0%} of its answers are OOD")
        return None
    stats = update(cfg, run, batch, nets, optimizers, demonstrations)
    mask, log_ratio = batch["mask"], batch["old_logprobs"] - batch["ref_logprobs"]
    metrics = {"score": batch["scores"].mean(), "kl": log_ratio.sum(1).mean().item(),   # nats per answer
               "kl_coef": controller.coef, **stats,
               "length": mask.sum() / len(prompts), "ended": batch["ended"].float().mean(),
               "tokens_per_second": mask.sum() / (time.time() - began)}
    if "critic" in nets:
        metrics["explained_variance"] = explained_variance(batch["old_values"], batch["returns"], mask)
    if "heads" in batch:                        # signs of hacking that need no judge
        metrics |= {"ood": ood, "disagreement": batch["heads"].std(1).mean()}
    metrics |= world.truth(prompts, answers)    # to be seen beside the score: training never uses it
    if cfg.adaptive_kl:
        controller.update(metrics["kl"], len(prompts))
    return metrics


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    reward_model, program = load_rewards(cfg.reward)
    nets = {"actor": load(cfg.init, "lm", tokenizer.vocab_size),
            "reference": load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)}
    if reward_model:
        tokenizer.check_same(reward_model)
        nets["reward"] = load_reward_model(reward_model).requires_grad_(False)
    if cfg.advantage == "gae":
        nets["critic"] = load_reward_model(reward_model) if reward_model else load(cfg.init, "scalar")
    if cfg.pessimism != "none" or cfg.ood_penalty > 0 or cfg.ood_drop or cfg.stop_ood < 1:
        if not reward_model or not nets["reward"].known:
            raise ValueError("--pessimism, --ood_penalty, --ood_drop and --stop_ood need what "
                             "reward_model.py --ensemble 5 finds out")
    block_size, demonstrations = nets["actor"].config.block_size, None
    prompts, _ = loading.load("prompts", cfg.data, "", cfg.max_dropped)
    loading.warn_if_foreign(tokenizer, prompts, cfg.data, cfg.init)
    prompts = fit_prompts(tokenizer, prompts, block_size - cfg.max_new_tokens, "prompts", cfg.max_dropped)
    if cfg.ptx_coef > 0:
        demonstrations, _ = loading.load("demonstrations", cfg.ptx_data, "", cfg.max_dropped)
        demonstrations = encode_demonstrations(tokenizer, demonstrations, block_size, "demonstrations",
                                               cfg.max_dropped)

    run = Run(cfg, cfg.steps)
    run.place(*nets.values())
    optimizers = {name: make_optimizer(nets[name], cfg.lr, eps=1e-5)
                  for name in ("actor", "critic") if name in nets}
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(controller=controller, **{name: nets[name] for name in optimizers},
               **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()})
    while run.step < cfg.steps:
        chosen = run.rng.choices(prompts, k=cfg.batch // cfg.group)
        chosen = [prompt for prompt in chosen for _ in range(cfg.group)]        # a group stands together
        metrics = step(cfg, run, chosen, nets, optimizers, controller, tokenizer, demonstrations, program)
        if metrics is None:
            break
        run.warn(warnings(cfg, metrics))
        run.log(metrics)
    run.finish(nets["actor"], tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
