"""Stage 3, PPO: optimise the learned reward, and stay close to where it was learnt.

    python ppo.py                                          from out/sft and out/reward_model, on the embedded world
    python ppo.py --kl_coef 0 --no-adaptive_kl --out out/ppo_no_kl          the same with nothing to hold it back

One step: the policy π answers a batch of prompts (rollout); the reward model scores each answer; every token pays for
leaving the reference π_ref, −β·(log π − log π_ref), and the last one earns the score; generalised advantage
estimation compares what followed with what the critic expected; then a few epochs of clipped updates. β adapts so
that π stays about `kl_target` nats an answer away from π_ref (Ziegler et al. 2019).

Four networks: the actor π and the reference start as the SFT model, the critic V and the frozen reward start as the
reward model. An action is a token: column t of every (B, T) array speaks of the choice of tokens[:, t], made in the
state tokens[:, :t].

Of the implementation details that Huang et al. (2024, arXiv 2403.17031) and its 2023 precursor list, here are: critic
from the reward model, no dropout, scores normalised on SFT samples, the temperature in every log-probability, per-token
KL in the reward, a fixed score for an answer that does not end, rewards whitened without moving their mean, advantages
whitened, both clipped losses, Adam's ε of 1e-5, a decaying learning rate, adaptive KL. Left out: dummy padding tokens
and left padding (rows are right-padded and masked), rejection of answers without a given token (the chat format has
<|im_end|>), and a shared trunk for policy and value (separate networks do better there, and read better).
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import parallel
import runtime
from data import loading, world
from data.tokenizer import Tokenizer
from flags import Training, flag


@dataclass
class Config(Training):
    out: str = flag("out/ppo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    reward: str = flag("out/reward_model", "reward model's checkpoint: the score, and where the critic starts")
    data: str = flag("world", "prompts: world, or a file (.json, .jsonl, .jsonl.gz)")
    steps: int = flag(54, "rounds of rollout and update", 1)
    batch: int = flag(128, "prompts a rollout", 2)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    gather_at_once: bool = flag(True, "under fsdp: sample with all blocks gathered, if they fit; off, block by block")
    temperature: float = flag(1.0, "of sampling, and of every log-probability", 0.01)
    no_end_score: float = flag(-3.0, "score of an answer that never ends, in place of the reward model's")
    epochs: int = flag(2, "passes over a rollout", 1)
    minibatches: int = flag(2, "optimiser steps an epoch", 1)
    micro_batch: int = flag(32, "answers a forward pass; the gradient is the same", 1)
    lr: float = flag(1e-3, "the policy's peak learning rate", 0)
    critic_lr: float = flag(1e-3, "the critic's", 0)
    warmup: int = flag(3, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of both learning rates, to 0", choices=("constant", "linear", "cosine"))
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    kl_coef: float = flag(0.1, "β, the price of a nat; where it starts if it adapts", 0)
    adaptive_kl: bool = flag(True, "steer β towards kl_target")
    kl_target: float = flag(3.5, "nats an answer between policy and reference", 1e-6)
    kl_horizon: int = flag(1000, "answers over which β adapts", 1)
    gamma: float = flag(1.0, "discount a token", 0, 1)
    lam: float = flag(0.95, "λ of GAE: 1 trusts what happened, 0 the critic", 0, 1)
    clip: float = flag(0.2, "of the policy's ratio, ε", 0)
    value_clip: float = flag(0.2, "of the critic's move", 0)
    entropy_coef: float = flag(0.0, "bonus a nat of entropy", 0)
    whiten_rewards: bool = flag(False, "give rewards deviation 1, their mean unmoved")
    whiten_advantages: bool = flag(True, "give advantages mean 0 and deviation 1")
    update_kl: float = flag(0.1, "stop a step's updates once the policy has moved so many nats a token; 0 never stops", 0)
    ptx_coef: float = flag(0.0, "weight of the SFT loss mixed in: InstructGPT's PPO-ptx", 0)
    ptx_data: str = flag("world", "demonstrations for it: world, or a file")
    ptx_batch: int = flag(32, "demonstrations an optimiser step", 1)


# ---------------------------------------------------------------------------------------- the mathematics

def masked_mean(x, mask):
    """Mean of x over the true places of the mask: a scalar, whatever stands in the others."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Give x (B, T) deviation 1 over the mask, and mean 0 unless shift_mean is false; 0 outside the mask."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)


def kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """What each action earns: −β·(log π − log π_ref), and the last one the score besides (Ziegler et al. 2019, eq. 2).

    scores (B,); logprobs, ref_logprobs (B, T) in nats, of the tokens that were taken; mask (B, T) bool; kl_coef β.
    Returns (B, T), 0 outside the mask.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    column = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * column).argmax(dim=1)                    # the last true column of each row
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores * mask.any(dim=1)
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards over the actions of each row:

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    return_t = A_t + V_t

    rewards, values, mask: (B, T); values[:, t] is the state's in which action t is chosen; what follows the last
    action is worth 0. Returns advantages and returns, both (B, T), 0 outside the mask, without a graph.
    """
    rewards, values = (torch.where(mask, x.detach(), 0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # Columns between two turns of a row are skipped: the state before them is followed by the one after them.
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = advantage * mask[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised: −E[min(ρA, clip(ρ, 1 ± ε)A)], with
    ρ = π/π_old a token.

    All (B, T), gradients flow through logprobs alone. Returns the scalar mean over the mask's tokens, and the
    fraction of them where the clipped term is the smaller one (there the gradient is 0).
    """
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    advantages = advantages.detach()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -masked_mean(torch.min(free, clipped), mask), masked_mean((clipped < free).float(), mask).detach()


def value_loss(values, old_values, returns, mask, clip):
    """½·mean of the larger of (V − return)² and (V_clipped − return)², where V_clipped moves at most `clip` from the
    old value (the clipped value loss of OpenAI's PPO; Huang et al. 2024). All (B, T), gradients flow through values
    alone; a scalar."""
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values.detach(), returns.detach()))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


class AdaptiveKL:
    """A proportional controller of β (Ziegler et al. 2019, section 2.2):
    e = clip(KL/target − 1, −0.2, 0.2),  β ← β·(1 + e·episodes/horizon)."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        """kl: nats an answer, measured on this many answers."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon

    def state_dict(self):
        return {"coef": torch.tensor(self.coef, dtype=torch.float64)}

    def load_state_dict(self, state):
        self.coef = state["coef"].item()


# ---------------------------------------------------------------------------------------- rollout

def state_values(critic, tokens, mask):
    """V of the state in which each action is chosen: (B, T). The critic reads tokens[:, :t] up to column t − 1."""
    out = critic(tokens)
    return torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1) * mask


@torch.no_grad()
def rollout(cfg, run, prompts, nets, tokenizer):
    """Let the policy answer the prompts (lists of ids), and measure all that the update needs of the answers. Each
    process answers its share of them, and gets all answers.

    Returns a dict of (B, T) tensors tokens, mask, logprobs, ref_logprobs, values, and (B,) scores, ends and ended.
    """
    prompts, seeds = parallel.share(prompts), parallel.share(run.seeds(len(prompts)))
    lengths = torch.tensor([len(p) for p in prompts], device=run.device)
    with parallel.gathered(nets["actor"], cfg.gather_at_once) as anyone:
        tokens, mask, logprobs = nets["actor"].generate(
            loading.pad(prompts).to(run.device), lengths, cfg.max_new_tokens, cfg.temperature, stop_token=tokenizer.end,
            seeds=seeds, anyone=anyone)
    ends = lengths + mask.sum(1)
    ended = tokens.gather(1, ends[:, None] - 1)[:, 0] == tokenizer.end
    batch = parallel.gather_batch({"tokens": tokens, "mask": mask, "logprobs": logprobs, "ends": ends, "ended": ended})
    parts, order = [], batch["ends"].argsort()                  # neighbours in length: little of a micro-batch is padding
    with parallel.at_hand(run, nets["reference"], nets["reward"]):
        for rows, live in parallel.micro_batches(order, cfg.micro_batch, cfg.micro_tokens, lambda i: int(batch["ends"][i])):
            ends = batch["ends"][rows]
            t, m = batch["tokens"][rows, :ends[-1]], batch["mask"][rows, :ends[-1]]
            with run.autocast():
                reference = nets["reference"].logprobs(t, m, cfg.temperature)
                score = nets["reward"](t).gather(1, ends[:, None] - 1)[:, 0]
                values = state_values(nets["critic"], t, m)
                # In bfloat16 sampling rounds otherwise than the update, which old log-probabilities are held against.
                old = nets["actor"].logprobs(t, m, cfg.temperature) if run.bfloat16 else batch["logprobs"][rows, :t.shape[1]]
            rest = batch["mask"].shape[1] - t.shape[1]
            parts.append([x[:live * len(x)] for x in (*(F.pad(x, (0, rest)) for x in (old, reference, values)), score)])
    found = parallel.gather_batch(dict(zip(("logprobs", "ref_logprobs", "values", "scores"), map(torch.cat, zip(*parts)))))
    batch |= {name: x[order.argsort()] for name, x in found.items()}
    batch["scores"] = torch.where(batch["ended"], batch["scores"], cfg.no_end_score)
    return batch


def estimate(cfg, batch, kl_coef):
    """A rollout with what the update learns from besides: advantages and returns, both (B, T)."""
    mask = batch["mask"]
    rewards = kl_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, kl_coef)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, batch["values"], mask, cfg.gamma, cfg.lam)
    if cfg.whiten_advantages:
        advantages = whiten(advantages, mask)
    return batch | {"advantages": advantages, "returns": returns}


# ---------------------------------------------------------------------------------------- update

def imitate(cfg, run, actor, demonstrations):
    """Add to the actor's gradient that of ptx_coef times the SFT loss on some demonstrations, (ids, learn) each: PPO-ptx
    (Ouyang et al. 2022, eq. 2)."""
    chosen = run.rng.sample(demonstrations, min(cfg.ptx_batch, len(demonstrations)))
    total = sum(sum(learn) for _, learn in chosen)
    for rows, live in parallel.micro_batches(chosen, cfg.micro_batch):
        ids, learn = (loading.pad(column).to(run.device) for column in zip(*rows))
        with run.autocast():
            logprobs = actor.logprobs(ids, learn)
        (-cfg.ptx_coef * logprobs.sum() / total * live).backward()


def update(cfg, run, batch, nets, optimizers, demonstrations):
    """A few epochs of clipped steps on one rollout with its advantages and returns. Returns {name: mean over steps}."""
    factor = runtime.schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
    steps, updates, ends = [], 0, batch["ends"]
    for rows in [r for _ in range(cfg.epochs) for r in torch.randperm(len(ends)).to(run.device).chunk(cfg.minibatches)]:
        total = batch["mask"][rows].sum()                           # tokens of the whole optimiser step
        sums = torch.zeros(6, device=run.device)
        rows = rows[ends[rows].argsort()]                           # neighbours in length
        for micro, live in parallel.micro_batches(rows, cfg.micro_batch, cfg.micro_tokens, lambda i: int(ends[i])):
            width = int(ends[micro[-1]])
            b = {k: v[micro, :width] if v.dim() == 2 else v[micro] for k, v in batch.items()}
            mask, share = b["mask"], live * b["mask"].sum() / total     # a micro-batch's share of the mean over tokens
            with run.autocast():
                logprobs, entropy = nets["actor"].logprobs(b["tokens"], mask, cfg.temperature, entropy=True)
                values = state_values(nets["critic"], b["tokens"], mask)
            policy, policy_clipped = policy_loss(logprobs, b["logprobs"], b["advantages"], mask, cfg.clip)
            value = value_loss(values, b["values"], b["returns"], mask, cfg.value_clip)
            entropy = masked_mean(entropy, mask)
            ((policy - cfg.entropy_coef * entropy + value) * share).backward()      # two networks, two gradients
            with torch.no_grad():
                log_ratio = (logprobs - b["logprobs"]) * mask
                moved = masked_mean(log_ratio.exp() - 1 - log_ratio, mask)          # KL(π_old ‖ π), Schulman's k3
                value_clipped = masked_mean(((values - b["values"]).abs() > cfg.value_clip).float(), mask)
                sums += share * torch.stack([policy, value, entropy, policy_clipped, value_clipped, moved])
        sums = parallel.total(sums)
        steps.append(sums)
        if cfg.update_kl and sums[-1] > cfg.update_kl:              # too far from the data: drop this step and the rest
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            break
        if cfg.ptx_coef:
            imitate(cfg, run, nets["actor"], demonstrations)
        where = f"minibatch {len(steps)} of its rollout"
        run.descend(optimizers["actor"], cfg.lr * factor, cfg.max_norm, sums[0].item(), where + " (policy)")
        run.descend(optimizers["critic"], cfg.critic_lr * factor, cfg.max_norm, sums[1].item(), where + " (critic)")
        updates += 1
    names = ("policy_loss", "value_loss", "entropy", "clipped", "value_clipped", "approx_kl")
    return dict(zip(names, torch.stack(steps).mean(0).tolist())) | {"updates": updates}


def explained_variance(values, returns, mask):
    """1 − Var[return − V] / Var[return] over the mask: 1 is a perfect critic, 0 one no better than a constant."""
    residual = (returns - values)[mask].var()
    return 1 - residual / returns[mask].var().clamp(min=1e-8)


# ---------------------------------------------------------------------------------------- the loop

def warnings(cfg, metrics):
    """Signs of a collapsing policy in a step's metrics, in words that say what to change: a set of texts."""
    signs = {
        "answers leave nothing to chance (entropy near 0): raise --entropy_coef or --kl_coef, or lower --lr":
            metrics["entropy"] < 0.01,
        "KL is far beyond its target: lower --lr, or start with a higher --kl_coef":
            cfg.adaptive_kl and metrics["kl"] > 4 * cfg.kl_target,
        "hardly an answer ends: raise --max_new_tokens, or lower --no_end_score": metrics["ended"] < 0.1,
    }
    return {text for text, seen in signs.items() if seen}


def judged(prompts, batch, tokenizer):
    """The world's own verdict on answers to its prompts, for the reader's eyes only: training never sees it."""
    answers = (tokenizer.decode(t[m].tolist()) for t, m in zip(batch["tokens"], batch["mask"]))
    return sum(world.judge(p, a) for p, a in zip(prompts, answers)) / len(prompts)


def train(cfg):
    runtime.require(cfg.init, "sft")
    runtime.require(cfg.reward, "reward_model")
    tokenizer = Tokenizer.load(cfg.init)
    nets = {"actor": parallel.load(cfg.init), "reference": parallel.load(cfg.init).requires_grad_(False),
            "critic": parallel.load(cfg.reward), "reward": parallel.load(cfg.reward).requires_grad_(False)}
    runtime.require_reward_model(cfg.reward, nets["reward"], tokenizer)
    if cfg.batch // cfg.minibatches < parallel.world():
        raise ValueError(f"{parallel.world()} processes need --batch and --minibatches that leave a minibatch a row for each")
    room = nets["actor"].config.block_size - cfg.max_new_tokens
    prompts, _ = loading.load("prompts", cfg.data)
    prompts = loading.fit(prompts, lambda p: len(tokenizer.prompt(p)), room, "prompts")
    demonstrations = None
    if cfg.ptx_coef:
        demonstrations = loading.fit([tokenizer.chat(m) for m in loading.load("demonstrations", cfg.ptx_data)[0]],
                                     lambda e: len(e[0]), nets["actor"].config.block_size, "demonstrations")
    run = runtime.Run(cfg, cfg.steps)
    parallel.prepare(run, *nets.values())
    optimizers = {"actor": runtime.make_optimizer(nets["actor"], cfg.lr, eps=1e-5),
                  "critic": runtime.make_optimizer(nets["critic"], cfg.critic_lr, eps=1e-5)}
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    run.resume(actor=nets["actor"], critic=nets["critic"], actor_optimizer=optimizers["actor"],
               critic_optimizer=optimizers["critic"], controller=controller)
    warned = set()
    while run.step < cfg.steps:
        clock = runtime.time.time()
        asked = run.rng.choices(prompts, k=cfg.batch)
        batch = rollout(cfg, run, [tokenizer.prompt(p) for p in asked], nets, tokenizer)
        batch = estimate(cfg, batch, controller.coef)
        mask = batch["mask"]
        kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1).mean().item()       # nats an answer
        metrics = {"score": batch["scores"].mean(), "kl": kl, "kl_coef": controller.coef}
        if cfg.data == "world":
            metrics["judge"] = judged(asked, batch, tokenizer)
        metrics |= update(cfg, run, batch, nets, optimizers, demonstrations)
        if cfg.adaptive_kl:
            controller.update(kl, cfg.batch)
        metrics |= {"explained_variance": explained_variance(batch["values"], batch["returns"], mask),
                    "length": mask.sum() / len(mask), "ended": batch["ended"].float().mean(),
                    "tokens_per_second": mask.sum() / (runtime.time.time() - clock)}
        found = warnings(cfg, metrics)
        for text in sorted(found - warned):                     # once, until it passes and comes back
            if run.first_process:
                print(f"warning, step {run.step + 1}: {text}", file=sys.stderr, flush=True)
        warned = found
        run.log(metrics)
    run.finish(nets["actor"], tokenizer)


if __name__ == "__main__":
    runtime.main(Config, train, __doc__)
