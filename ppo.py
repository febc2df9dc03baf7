"""Stage 3, PPO: maximise the learned reward while staying close to the SFT model.

    python ppo.py                                                     on the embedded world (data/world.py)
    python ppo.py --kl_coef 0 --no-adaptive_kl --out out/ppo_no_kl    the same without a KL penalty

Four networks: the policy π and the critic V are trained, the reference π_ref and the reward model are frozen.
π and π_ref start as the SFT model. The reward model, or another scorer that --reward names, gives each answer
a score. V predicts what an answer will still earn; it starts as a copy of the reward model, which can already
tell good answers from bad ones. An action is a token, its state all tokens before it. A step has five parts:

    1. Rollout      the policy answers a batch of prompts
    2. Rewards      each token earns −β·(log π − log π_ref), a KL penalty; the last one also earns the score
    3. Advantages   how much more each token earned than the critic expected (GAE)
    4. Update       a few epochs of optimiser steps on the clipped losses of these answers
    5. β            rises if π is more than `kl_target` nats per answer from π_ref, and falls if it is less

Why stay close? The reward model has learnt from answers like the SFT model's; its scores of very different
answers are guesses. A policy that only maximises the score finds guesses that are too high: the score rises
while the answers get worse (reward hacking). The KL penalty keeps it where the score can be trusted.

Column t of a (B, T) array holds the values for choosing tokens[:, t] in the state tokens[:, :t]. mask (B, T)
is true on the tokens that the policy chose; all arrays but `tokens` are 0 elsewhere. More: docs/details.md.
"""
from dataclasses import dataclass

import torch

from data.answers import answer_metrics, rollout_examples
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
    """The flags of every method that learns from the policy's own answers: PPO, and variants/grpo.py."""
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    reward: str = flag("out/reward_model", "what gives answers their scores: see runtime/rewards.py")
    data: str = flag(WORLD, "prompts: a folder of the world's, or a file (.json, .jsonl)")
    steps: int = flag(40, "steps of rollout and update", 1)
    batch: int = flag(128, "answers per rollout", 2)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    temperature: float = flag(1.0, "of sampling, and of the answers' log-probabilities", 0.01)
    no_end_score: float = flag(-3.0, "score of an answer that does not end, in place of any other")
    epochs: int = flag(2, "passes over a rollout", 1)
    minibatches: int = flag(2, "optimiser steps per epoch", 1)
    lr: float = flag(1e-3, "the policy's peak learning rate", 0)
    warmup: int = flag(3, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of learning rates, to 0", choices=("constant", "linear", "cosine"))
    kl_coef: float = flag(0.1, "β, the weight of the KL penalty; its first value if it adapts", 0)
    adaptive_kl: bool = flag(True, "adapt β to keep the KL near kl_target")
    kl_target: float = flag(3.5, "nats per answer between policy and reference", 1e-6, needs="adaptive_kl")
    kl_horizon: int = flag(1000, "answers over which β adapts; more: slower", 1, needs="adaptive_kl")
    clip: float = flag(0.2, "ε, the clip range of the ratio π/π_old", 0)
    entropy_coef: float = flag(0.0, "bonus per nat of entropy per token", 0)
    update_kl: float = flag(0.1, "nats per token from π_old at which an update stops; 0 never stops it", 0)

    def __post_init__(self):
        if self.adaptive_kl and self.kl_coef == 0:
            raise ValueError("--kl_coef 0 cannot adapt, because β changes by a factor: add --no-adaptive_kl")
        if self.adaptive_kl and 0.2 * self.batch >= self.kl_horizon:
            raise ValueError("--kl_horizon must exceed --batch/5, or β could turn negative")
        if self.minibatches > self.batch:
            raise ValueError(f"--minibatches {self.minibatches} is more than --batch {self.batch}")


@dataclass
class Config(OnPolicy):
    out: str = flag("out/ppo", "folder that the run writes")
    critic_lr: float = flag(1e-3, "the critic's peak learning rate", 0)
    gamma: float = flag(1.0, "discount per token", 0, 1)
    lam: float = flag(0.95, "λ of GAE, usually 0.9 to 1; 1: the Monte Carlo return minus the value", 0, 1)
    value_clip: float = flag(0.2, "the clip range of a value around the old one", 0)
    whiten_rewards: bool = flag(False, "scale rewards to standard deviation 1, with their mean unchanged")
    whiten_advantages: bool = flag(True, "give advantages mean 0 and standard deviation 1")


def masked_mean(x, mask, dim=None):
    """Mean of x over the mask (bool): a scalar, or with dim the means over one dimension. Entries outside the
    mask are ignored, NaN too."""
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim)


def whiten(x, mask, shift_mean=True):
    """Scale x (B, T) around its mean to standard deviation 1 over the mask, shift it to mean 0; 0 outside.

    Advantages are scaled, so that the size of a step does not depend on the unit of the rewards, and shifted,
    which reduces the gradient's noise: ∇log π has mean 0, so a constant leaves the mean gradient as it is.
    Rewards (an option of OpenAI's code, off here) keep their mean: a constant on every token would reward or
    punish length; a factor is undone when advantages are scaled. Scaling around the mean still adds a small
    constant, mean·(1 − 1/σ)."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)


def rollout(run, tokenizer, prompts, policy, reference):
    """The policy's answers to B prompts (message lists). Returns B texts, and a batch: tokens, mask,
    old_logprobs and ref_logprobs (B, T); lengths (B,) of prompt and answer together; ended (B,) bool."""
    cfg = run.cfg
    batch = run.sample(policy, [tokenizer.prompt(p) for p in prompts], run.seeds(len(prompts)),
                       cfg.max_new_tokens, stop_token=tokenizer.end, temperature=cfg.temperature)
    # π_old is the policy that sampled: softmax(logits/τ). At another temperature τ it is another policy.
    batch["old_logprobs"] = sampled = batch.pop("logprobs")
    if run.bfloat16:
        # The update reads whole answers, which rounds differently from sampling token by token: in
        # float32 negligibly, in bfloat16 by one percent. Read in the same way, π_old gives ratios of 1.
        batch["old_logprobs"] = run.logprobs(policy, batch, cfg.temperature)
        run.note(sampler_kl=approximate_kl(batch["old_logprobs"], sampled, batch["mask"]))
    batch["ref_logprobs"] = run.logprobs(reference, batch, cfg.temperature)
    answers = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch["tokens"], batch["mask"])]
    return answers, batch


def kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward of each action: −β·(log π − log π_ref), plus the answer's score on its last action.

    scores (B,); logprobs, ref_logprobs (B, T) of the chosen tokens, in nats, where π is the policy that
    sampled; mask (B, T) bool; kl_coef is β. Returns (B, T), 0 outside the mask (Ziegler et al. 2019, eq. 2).

    KL(π ‖ π_ref) is the mean of log π − log π_ref over answers that π samples, so the sum over the tokens of
    one answer is an unbiased estimate of it. Paid per token, it charges an action for its own part and, in
    the advantage, for what follows, but not for what came before, which the action cannot change. Why not a
    term of the loss? For a sampled token a, the gradient of log π(a) − log π_ref(a) is ∇log π(a), whose mean
    under π is 0 (Σ π·∇log π = ∇Σ π = ∇1): such a loss would not push the policy back. And why not k3 (see
    approximate_kl, with ρ = π_ref/π), which has the same mean? A reward counts as a constant, so its gradient
    is the mean of k3·∇log π, ∇KL(π ‖ π_ref) − ∇KL(π_ref ‖ π), in which the two cancel near π_ref."""
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    column = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * column).argmax(dim=1)                # each row's last true column; 0 if it has none
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores * mask.any(dim=1)
    return rewards


def state_values(critic, tokens, mask):
    """The critic's value V_t of the state in which each action is chosen: (B, T), 0 outside the mask.

    The critic's output at column t − 1 has read tokens[:, :t], which is the state of column t; its output at
    column t has already read the action. So the outputs move one column to the right."""
    outputs = critic(tokens)
    return torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, :-1]], dim=1) * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), from each row's last action back:

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    return_t = A_t + V_t

    rewards, values, mask (B, T). After the last action V and A are 0, because nothing more is earned. Returns
    advantages and returns, both (B, T), 0 outside the mask, detached. The return is the critic's target; with
    γ = λ = 1 it is the sum of the rewards from t on. Three tokens with score 2, at β = 0.1, γ = 1, λ = 0.95:

        log π − log π_ref     r_t     V_t      δ_t      A_t   return_t
                      0.5   -0.05     1.0     0.45    0.964      1.964
                     -1.0    0.10     1.5    -0.20    0.541      2.041
                      0.2    1.98     1.2     0.78    0.780      1.980

    A scorer judges whole answers, so the score comes with the last token. Which token earned it? λ = 1 makes
    A_t the sum of its own and all later rewards, minus V_t: unbiased, but as noisy as all that follows. With
    λ = 0 the critic's next value stands for the later rewards: little noise, but its errors are a bias."""
    rewards, values = torch.where(mask, rewards.detach(), 0), torch.where(mask, values.detach(), 0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # Columns outside the mask are skipped: padding, or a user's turn between two answers.
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with the ratio ρ = π/π_old of each token:
    −E[min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A)].

    All (B, T); gradients flow through logprobs alone. Returns the scalar mean over all tokens of the mask,
    and the clip fraction: the share of these tokens with |ρ − 1| > ε, whether or not their gradient is lost.

    At the first optimiser step ρ is 1 and the gradient is the plain policy gradient −E[A·∇log π]. After it
    the tokens still come from π_old; weighted by ρ, each counts as often as π would choose it (importance
    sampling), so that one rollout serves several steps. But −ρ·A alone pushes ρ away from 1 without limit,
    and the samples say little about a policy far from π_old. So the clip takes the gradient from tokens that
    have moved far enough in the direction of their advantage, and from no others:

        A > 0, ρ > 1 + ε   or   A < 0, ρ < 1 − ε    the clipped term is the smaller one: gradient 0
        A > 0, ρ < 1 − ε   or   A < 0, ρ > 1 + ε    moved the wrong way: ρ·A counts, and has its gradient"""
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    advantages = advantages.detach()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    clip_fraction = masked_mean((ratio - 1).abs() > clip, mask)
    return -masked_mean(surrogate, mask), clip_fraction


def value_loss(values, old_values, returns, mask, clip):
    """½·E[max((V − return)², (V_clip − return)²)], where V_clip = V_old + clip(V − V_old, −ε, ε) (OpenAI's
    PPO; Huang et al. 2024); ε is `clip`. All (B, T); gradients flow through values alone. Returns a scalar.

    Why clip the value? The returns of one rollout are noisy, and in several epochs the critic would fit their
    noise. The larger error counts: a value more than ε from V_old gets no gradient if it has moved towards
    its return, because V_clip's error is the larger one; if it has moved away, it is still pulled back."""
    old_values, returns = torch.where(mask, old_values.detach(), 0), torch.where(mask, returns.detach(), 0)
    values = torch.where(mask, values, 0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def approximate_kl(logprobs, old_logprobs, mask):
    """KL(π_old ‖ π) per token, in nats, from tokens that π_old sampled: the mean of ρ − 1 − log ρ, called k3,
    with ρ = π/π_old (Schulman 2020). It is logged, and ends the update at --update_kl; it has no gradient.

    The plain estimate is the mean of −log ρ, which is negative for about half of the tokens: between policies
    this close its noise hides the KL. Adding ρ − 1 does not change the mean, because E[ρ] = 1 under π_old;
    then no term is negative, because log ρ ≤ ρ − 1. expm1 keeps the digits that ρ − 1 loses near ρ = 1."""
    log_ratio = torch.where(mask, (logprobs - old_logprobs).detach(), 0)
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)


def minibatches(cfg):
    """The row numbers of each optimiser step: every epoch goes through all rows in a new random order."""
    for _ in range(cfg.epochs):
        yield from torch.randperm(cfg.batch).tensor_split(cfg.minibatches)


class AdaptiveKL:
    """A proportional controller of β (Ziegler et al. 2019, section 2.2):
    e = clip(KL/target − 1, −0.2, 0.2),  β ← β·(1 + e·episodes/horizon).

    Which β leads to which KL depends on the reward model, so it is easier to set the KL than β. The clip
    limits what one unusual batch can do. β changes by a factor, so it moves as fast at 0.01 as at 1, and it
    stays positive if horizon > 0.2·episodes."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        """kl: nats per answer, measured on this many answers (episodes)."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon


def train(cfg, reward=None, auxiliary_loss=None):
    """reward: an object to use in place of --reward (see runtime/rewards.py). auxiliary_loss: a function of
    run and policy that adds another loss's gradient to the policy's (variants/ppo_ptx.py)."""
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    prompts = load_prompts(cfg, tokenizer, policy.config.block_size - cfg.max_new_tokens)
    reward = reward or find_reward(cfg.reward, tokenizer)
    critic = load(reward.folder or cfg.init, "scalar")      # without a reward model: SFT with a new head
    run = Run(cfg, cfg.steps)
    run.place(policy, *reward.networks, critic, reference=reference)
    policy_optimizer = make_optimizer(policy, cfg.lr, eps=1e-5)
    critic_optimizer = make_optimizer(critic, cfg.critic_lr, eps=1e-5)
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(policy=policy, critic=critic, policy_optimizer=policy_optimizer,
               critic_optimizer=critic_optimizer, controller=controller)
    run.show_answers(policy, tokenizer, prompts)
    while run.step < cfg.steps:
        # 1. Rollout
        asked = run.rng.choices(prompts, k=cfg.batch)
        answers, batch = rollout(run, tokenizer, asked, policy, reference)
        mask = batch["mask"]

        # 2. Rewards
        scores = reward(run, asked, answers, batch)
        # The reward model has never seen an answer without an end: its score is a guess, and if that is high
        # the policy learns to go on for ever. A fixed low score teaches it to end.
        scores = torch.where(batch["ended"], scores, cfg.no_end_score)
        rewards = kl_rewards(scores, batch["old_logprobs"], batch["ref_logprobs"], mask, controller.coef)
        rewards = whiten(rewards, mask, shift_mean=False) if cfg.whiten_rewards else rewards

        # 3. Advantages
        batch |= run.map(lambda b: {"old_values": state_values(critic, b["tokens"], b["mask"])}, batch)
        advantages, returns = gae(rewards, batch["old_values"], mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask) if cfg.whiten_advantages else advantages
        batch |= {"scores": scores, "rewards": rewards, "advantages": advantages, "returns": returns}

        # 4. Update
        lr_factor = schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
        history, updates = [], 0
        for rows in minibatches(cfg):
            minibatch, stats = select(batch, rows), Meter()
            # share: the part of the minibatch's tokens that is in b. Only so do the micro-batches' gradients
            # add up to the gradient of the mean over all its tokens, however few rows fit into memory.
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                logprobs, entropy = policy.logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,
                                                    entropy_grad=cfg.entropy_coef > 0)
                loss, clip_fraction = policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"],
                                                  cfg.clip)
                entropy = masked_mean(entropy, b["mask"])
                (share * (loss - cfg.entropy_coef * entropy)).backward()
                stats.add(share, policy_loss=loss, entropy=entropy, clip_fraction=clip_fraction,
                          approx_kl=approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
            # One network after the other: only one at a time needs memory for its activations.
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                values = state_values(critic, b["tokens"], b["mask"])
                loss = value_loss(values, b["old_values"], b["returns"], b["mask"], cfg.value_clip)
                (share * loss).backward()
                beyond = (values - b["old_values"]).abs() > cfg.value_clip
                stats.add(share, value_loss=loss, value_clip_fraction=masked_mean(beyond, b["mask"]))
            means = stats.means()
            history.append(means)
            # The clip takes away a token's own gradient, but other tokens' gradients still move its ρ. So the
            # update ends, without another step, as soon as π is more than update_kl from π_old.
            if cfg.update_kl > 0 and means["approx_kl"] > cfg.update_kl:
                policy_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                break
            if auxiliary_loss:
                auxiliary_loss(run, policy)
            loss = means["policy_loss"] - cfg.entropy_coef * means["entropy"]   # if not finite: no step
            run.optimizer_step(policy_optimizer, cfg.lr * lr_factor, loss, f"policy on rows {rows.tolist()}")
            run.optimizer_step(critic_optimizer, cfg.critic_lr * lr_factor, means["value_loss"],
                               f"critic on rows {rows.tolist()}")
            updates += 1

        errors = returns - batch["old_values"]
        kl = (batch["old_logprobs"] - batch["ref_logprobs"]).sum(1).mean().item()
        metrics = {"score": scores.mean(), **answer_metrics(batch, asked, answers),
                   "kl": kl, "kl_coef": controller.coef,
                   **{name: sum(m[name] for m in history) / len(history) for name in history[0]},
                   # 1: V is the return up to a constant; 0: as good as a constant; below 0: worse
                   "updates": updates, "explained_variance": 1 - errors[mask].var() / returns[mask].var()}
        # At entropy 0 a prompt has one answer, and ∇log π is 0: no advantage can bring others back.
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
