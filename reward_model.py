"""Stage 2, the reward model: learn what people prefer.

    python reward_model.py                                    from out/sft, on the embedded world's rankings
    python reward_model.py --init out/other --data pairs.jsonl

People compare answers more reliably than they grade them. Bradley & Terry (1952) turn comparisons into a score: the
answer y⁺ is preferred to y⁻ with probability σ(r(x, y⁺) − r(x, y⁻)). The model is the SFT network with a new head
that says one number; the number at the response's last token is the score r(x, y) of the whole answer.

All K answers that were ranked for one prompt stay in one batch, so that each is read once and counts in K − 1 pairs
(Ouyang et al. 2022, section 3.5). A comparison only fixes differences of r; after training r is shifted and scaled so
that samples of the SFT model score 0 on average with deviation 1, which lets PPO's settings carry over.
"""
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F

import parallel
import runtime
from data import annotators, loading
from data.tokenizer import Tokenizer
from flags import Training, flag


@dataclass
class Config(Training):
    out: str = flag("out/reward_model", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint to start from, whose samples set the scale")
    data: str = flag("world", "preferences: world, or a file (.json, .jsonl, .jsonl.gz)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    epochs: int = flag(1, "passes over the preferences: a second one overfits the noise in them", 1)
    batch: int = flag(8, "prompts an optimiser step, each with all its answers", 1)
    micro_batch: int = flag(8, "prompts a forward pass; the gradient is the same", 1)
    lr: float = flag(5e-4, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    normalize: int = flag(256, "SFT samples that set the score's mean and deviation; 0 leaves it as trained", 0)


# ---------------------------------------------------------------------------------------- the losses

def pairwise_loss(chosen, rejected, margin=0.0):
    """Bradley-Terry: mean of −log σ(r⁺ − r⁻ − m).

    chosen, rejected: scores (B,); margin: number or (B,), how much r⁺ should win by (Touvron et al. 2023, eq. 2).
    Returns a scalar in nats; log 2 for a model that knows nothing.
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()


def ranking_loss(scores, ranks, margin=None):
    """K-way: −log σ(r_i − r_j) over every pair that the ranking orders, averaged per prompt, then over prompts
    (Ouyang et al. 2022, eq. 1). With K = 2 it is the pairwise loss.

    scores (B, K); ranks (B, K) int64, 1 is best, equal ranks are ties and give no pair, 0 marks an answer that is
    not there; margin (B,) or None. Each row must order at least one pair. Returns a scalar in nats.
    """
    scores = torch.where(ranks > 0, scores, 0)
    gaps = scores[:, :, None] - scores[:, None, :]                              # (B, K, K): r_i − r_j
    if margin is not None:
        gaps = gaps - margin[:, None, None]
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks > 0)[:, :, None]  # i is ranked above j
    return -((F.logsigmoid(gaps) * better).sum((1, 2)) / better.sum((1, 2))).mean()


# ---------------------------------------------------------------------------------------- scores

def score(model, tokens, lengths):
    """r(x, y) of each row, (B,): the scalar at its last token. tokens (B, T) right-padded, lengths (B,)."""
    return model(tokens).gather(1, lengths[:, None] - 1)[:, 0]


def batch_scores(model, run, group):
    """Scores (B, K) and ranks (B, K) of B records of (rows, ranks, margin), 0 where a record has fewer than K."""
    rows = [row for rows, _, _ in group for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=run.device)
    with run.autocast():
        flat = score(model, loading.pad(rows).to(run.device), lengths)
    ranks = loading.pad([ranks for _, ranks, _ in group]).to(run.device)
    return torch.zeros(ranks.shape, device=run.device).masked_scatter(ranks > 0, flat), ranks


def encode(tokenizer, preferences):
    """Preferences to (rows of ids, ranks, margin), one row an answer."""
    out = []
    for p in preferences:
        prompt = tokenizer.prompt(p.prompt)
        out.append(([prompt + tokenizer.response(r) for r in p.responses], p.ranks, p.margin))
    return out


@torch.no_grad()
def evaluate(model, run, held_out):
    """Judge the model on held-out records: {name: number}, and the calibration as rows of (predicted, won, pairs)."""
    gaps, longer = [], []                       # r⁺ − r⁻ of each pair, and by how many tokens the winner is longer
    held_out = sorted(held_out, key=lambda e: max(map(len, e[0])))              # neighbours in length: little padding
    for group, live in parallel.micro_batches(held_out, run.cfg.micro_batch):
        scores, _ = batch_scores(model, run, group)
        group = group * live
        for (rows, ranks, _), r in zip(group, scores.tolist()):
            for a, b in combinations(range(len(rows)), 2):
                if ranks[a] != ranks[b]:
                    w, l = (a, b) if ranks[a] < ranks[b] else (b, a)
                    gaps.append(r[w] - r[l])
                    longer.append(len(rows[w]) - len(rows[l]))
    gaps, longer = (torch.tensor([x for part in parallel.everyone(mine) for x in part]) for mine in (gaps, longer))
    right = (gaps > 0).float() + 0.5 * (gaps == 0)
    out = {"loss": -F.logsigmoid(gaps).mean().item(), "accuracy": right.mean().item(), "pairs": len(gaps)}
    for name, chosen in (("winner_shorter", longer < -4), ("same_length", longer.abs() <= 4), ("winner_longer", longer > 4)):
        if chosen.any():
            out[f"accuracy_{name}"] = right[chosen].mean().item()
    # Calibration: the model says that the higher score wins with probability σ(|gap|); how often does it?
    said, won = torch.sigmoid(gaps.abs()), (gaps > 0).float()
    calibration = []
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        chosen = (said >= low) & (said < low + 0.1 + (low == 0.9))
        if chosen.any():
            calibration.append((said[chosen].mean().item(), won[chosen].mean().item(), int(chosen.sum())))
    return out, calibration


@torch.no_grad()
def normalize(model, sft, tokenizer, run, prompts):
    """Shift and scale the head so that SFT samples have mean score 0 and deviation 1. Returns the old (mean, deviation)."""
    prompts, seeds = [tokenizer.prompt(p) for p in run.rng.choices(prompts, k=run.cfg.normalize)], run.seeds(run.cfg.normalize)
    room = min(64, model.config.block_size // 2)                # the prompts leave as much
    scores = []
    for rows, live in parallel.micro_batches(range(len(prompts)), 64):
        part = [prompts[i] for i in rows]
        lengths = torch.tensor([len(p) for p in part], device=run.device)
        with parallel.gathered(sft) as anyone:
            tokens, mask, _ = sft.generate(loading.pad(part).to(run.device), lengths, room, stop_token=tokenizer.end,
                                           seeds=seeds[list(rows)], anyone=anyone)
        scores += score(model, tokens, lengths + mask.sum(1)).tolist() * live
    scores = torch.tensor(parallel.gather(scores))
    mean, deviation = scores.mean().item(), max(scores.std().item(), 1e-6)
    model.head.weight.div_(deviation)
    model.head.bias.sub_(mean).div_(deviation)
    return mean, deviation


def train(cfg):
    runtime.require(cfg.init, "sft")
    preferences, held_out_preferences = loading.load("preferences", cfg.data, cfg.held_out)
    tokenizer = Tokenizer.load(cfg.init)
    torch.manual_seed(cfg.seed)                                 # before the new head is drawn
    model = parallel.load(cfg.init, head="scalar")
    size, length = model.config.block_size, lambda e: max(map(len, e[0]))
    examples = loading.fit(encode(tokenizer, preferences), length, size, "preferences")
    held_out = loading.fit(encode(tokenizer, held_out_preferences), length, size, "held-out preferences")

    prompts = loading.fit([p.prompt for p in preferences], lambda p: len(tokenizer.prompt(p)), size - min(64, size // 2),
                          "prompts to sample from") if cfg.normalize else []
    steps = cfg.epochs * -(-len(examples) // cfg.batch)
    run = runtime.Run(cfg, steps)
    parallel.prepare(run, model)
    optimizer = runtime.make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)

    def width(i):
        """Tokens of a prompt with all its answers, padding included."""
        return len(examples[i][0]) * length(examples[i])

    for batch in loading.batches([length(e) for e in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        loss = accuracy = 0.0
        for rows, live in parallel.micro_batches(batch, cfg.micro_batch, cfg.micro_tokens, width):
            group = [examples[i] for i in rows]
            share = live * len(group) / len(batch)              # of the step: the loss is a mean over prompts
            scores, ranks = batch_scores(model, run, group)
            margin = torch.tensor([m for _, _, m in group], device=run.device)
            part = ranking_loss(scores, ranks, margin) * share
            part.backward()
            loss += part.item()
            best, worst = scores.gather(1, ranks.masked_fill(ranks == 0, 99).argmin(1, True)), scores.gather(1, ranks.argmax(1, True))
            accuracy += (best > worst).float().mean().item() * share
        lr = cfg.lr * runtime.schedule(run.step, steps, cfg.warmup, cfg.decay)
        loss, accuracy = parallel.total(loss), parallel.total(accuracy)
        norm = run.descend(optimizer, lr, cfg.max_norm, loss, f"preferences {batch}")
        run.log({"loss": loss, "best_beats_worst": accuracy, "grad_norm": norm, "lr": lr})

    found, calibration = evaluate(model, run, held_out)
    if cfg.data == "world":
        found["ceiling"] = annotators.ceiling(held_out_preferences)
        found["judge_agreement"] = annotators.agreement(held_out_preferences)
    print("held out:  " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
    print("calibration, predicted → won:  " + "  ".join(f"{p:.2f} → {w:.2f} ({n})" for p, w, n in calibration))
    if cfg.normalize:
        sft = parallel.load(cfg.init).requires_grad_(False)
        parallel.prepare(run, sft)
        mean, deviation = normalize(model, sft, tokenizer, run, prompts)
        print(f"score shifted by {-mean:.2f} and divided by {deviation:.2f}: SFT samples now have mean 0 and deviation 1")
        found |= {"sft_mean": mean, "sft_deviation": deviation}
    run.finish(model, tokenizer, held_out=found, calibration=calibration)


if __name__ == "__main__":
    runtime.main(Config, train, __doc__)
