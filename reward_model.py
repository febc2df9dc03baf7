"""Stage 2, the reward model: learn what people prefer.

    python reward_model.py                                  from out/sft, on the embedded world's rankings
    python reward_model.py --init out/other --data pairs.jsonl

People compare answers more reliably than they grade them. Bradley & Terry (1952) turn comparisons into a
score r(x, y) of an answer y to a prompt x: y⁺ is preferred to y⁻ with probability σ(r(x, y⁺) − r(x, y⁻)). The
model is the supervised fine-tuned (SFT) network with a new head, which gives one number per token. The number
at the answer's last token is the score of the whole answer: the network reads from left to right, so only
this position has seen all of it.

A ranking of K answers holds K(K − 1)/2 comparisons, and all of them are used: the best against the worst is
easy, and says little about answers in between. All K answers stay in one batch, so that each is read once and
trained on once per epoch. An answer is in K − 1 comparisons: if these were spread over batches, the network
would be trained on it K − 1 times, and learn it by heart (Ouyang et al. 2022, section 3.5).

Comparisons fix only differences of r between answers to one prompt: add the same number to all scores of a
prompt, and the loss does not change. So training leaves open where 0 lies, and how far scores spread depends
on how much the people agreed. Afterwards r is shifted and scaled, by the same two numbers for all prompts,
until samples of the SFT model score 0 on average, with standard deviation 1. These are the answers that PPO
starts from: its settings, above all its KL penalty, then mean the same for every reward model. The order of
any two scores stays what it was.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import annotators, loading
from data.batches import batches, encode_comparisons, fit_prompts
from data.loading import WORLD
from data.tokenizer import Tokenizer
from runtime.compute import Meter, pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run
from variants import cautious as uncertainty


@dataclass
class Config(Training):
    out: str = flag("out/reward_model", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint to start from, whose samples set the scale")
    data: str = flag(WORLD, "preferences: a folder of the world\'s, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    epochs: int = flag(1, "passes over the preferences; in a second one it learns people's noise by heart", 1)
    batch: int = flag(8, "prompts per optimiser step, each with all its answers", 1)
    lr: float = flag(5e-4, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    normalize: int = flag(256, "SFT samples that set the score's mean and scale; 0 leaves it as trained", 0)
    ensemble: int = flag(0, "heads of uncertainty.py's ensemble; 0 learns nothing of that kind", 0)

    def __post_init__(self):
        if self.ensemble == 1:
            raise ValueError("--ensemble 1: a single head disagrees with nobody")


# --------------------------------------------------------------------------------------- the losses

def pairwise_loss(chosen, rejected, margin=0.0):
    """Bradley-Terry: mean of −log σ(r⁺ − r⁻ − m), the negative log-likelihood of the choices that were made.

    chosen, rejected: scores (B,); margin m: number or (B,). Where people also say how much better an answer
    is, a larger m asks for a larger difference (Touvron et al. 2023, eq. 2). Returns a scalar in nats. With
    m = 0, equal scores cost log 2 per pair, the price of tossing a coin; a model that costs more on held-out
    pairs is sure of itself where it is wrong."""
    return -F.logsigmoid(chosen - rejected - margin).mean()


def ranking_loss(scores, ranks, margin=None, probability=None):
    """K-way: −log σ(r_i − r_j) over every pair that the ranking orders, averaged per prompt, then over
    prompts (Ouyang et al. 2022, eq. 1). With K = 2 it is the pairwise loss. In a mean over all pairs at once,
    a prompt with nine answers (36 pairs) would count as much as 36 prompts with two.

    scores (B, K); ranks (B, K) int64, 1 is best, 0 marks an answer that is not there; margin (B,) or None;
    probability (B,) or None: that a label is right, where it is soft (an AI judge's). The loss is then its
    mean over both labels, p·loss(i over j) + (1 − p)·loss(j over i), least where σ(r_i − r_j) = p.
    Equal ranks are ties and give no pair: Bradley & Terry's model knows only choices. Each row must order at
    least one pair. Returns a scalar in nats."""
    scores = torch.where(ranks > 0, scores, 0)          # an absent answer's NaN would survive · 0 below
    gaps = scores[:, :, None] - scores[:, None, :]                              # (B, K, K): r_i − r_j
    margin = 0.0 if margin is None else margin[:, None, None]
    losses = -F.logsigmoid(gaps - margin)
    if probability is not None:
        p = probability[:, None, None]
        losses = p * losses - (1 - p) * F.logsigmoid(-gaps - margin)
    present = (ranks > 0)[:, :, None]                   # of i; an absent j has rank 0, so no i is better
    better = present & (ranks[:, :, None] < ranks[:, None, :])
    return ((losses * better).sum((1, 2)) / better.sum((1, 2))).mean()


def best_beats_worst(scores, ranks):
    """The share of prompts whose best answer scores above their worst. Both (B, K), as in ranking_loss."""
    absent = ranks == 0
    best = ranks.masked_fill(absent, ranks.max() + 1).argmin(dim=1, keepdim=True)
    worst = ranks.argmax(dim=1, keepdim=True)
    return (scores.gather(1, best) > scores.gather(1, worst)).float().mean()


# ---------------------------------------------------------------------------- scores of comparisons

def score_answers(model, run, comparisons):
    """Scores (B, K) and ranks (B, K) of B Comparisons, both 0 where a prompt has fewer than K answers."""
    sequences = [ids for c in comparisons for ids in c.sequences]
    lengths = torch.tensor([len(ids) for ids in sequences], device=run.device)
    ranks = pad([c.ranks for c in comparisons]).to(run.device)
    found = model.score(pad(sequences).to(run.device), lengths)         # (answers of all prompts in turn,)
    return torch.zeros_like(ranks, dtype=found.dtype).masked_scatter(ranks > 0, found), ranks


def evaluate(model, run, comparisons):
    """How well the model predicts held-out Comparisons, over all pairs: {name: number}, and calibration."""
    scores = run.map(lambda rows: {"scores": score_answers(model, run, rows)[0]}, comparisons)
    gaps, longer = [], []                 # of each pair: r⁺ − r⁻, and by how many tokens the winner is longer
    for c, r in zip(comparisons, scores["scores"].tolist()):
        for winner, loser in c.pairs:
            gaps.append(r[winner] - r[loser])
            longer.append(c.lengths[winner] - c.lengths[loser])
    gaps, longer = torch.tensor(gaps), torch.tensor(longer)
    right = (gaps > 0).float() + 0.5 * (gaps == 0)
    found = {"loss": -F.logsigmoid(gaps).mean().item(), "accuracy": right.mean().item(), "pairs": len(gaps)}
    # Has it only learnt that long answers win? Then it is wrong where the winner is more than 4 tokens
    # shorter, tosses a coin where lengths are alike, and is right where the winner is longer.
    for name, some in (("winner_shorter", longer < -4), ("same_length", longer.abs() <= 4),
                       ("winner_longer", longer > 4)):
        if some.any():
            found[f"accuracy_{name}"] = right[some].mean().item()
    return found, calibration(gaps)


def calibration(gaps):
    """Is the model as sure as it is right? The higher score should win with probability σ(|r⁺ − r⁻|).

    gaps: r⁺ − r⁻ of each pair. Returns a row (mean probability, share of pairs where the higher score won,
    pairs) per tenth of probability from 0.5 to 1. Measured before the score is rescaled: the loss has fitted
    σ(r⁺ − r⁻) to the choices, and no multiple of it."""
    said, won, rows = torch.sigmoid(gaps.abs()), (gaps > 0).float(), []
    edges = (0.5, 0.6, 0.7, 0.8, 0.9, 1.01)                     # σ itself reaches 1
    for low, high in zip(edges, edges[1:]):
        some = (said >= low) & (said < high)
        if some.any():
            rows.append((said[some].mean().item(), won[some].mean().item(), int(some.sum())))
    return rows


# ---------------------------------------------------------------------------------------- the scale

def sample_room(model):
    """Tokens of an answer that sets the scale; prompts may take the rest of a block."""
    return min(64, model.config.block_size // 2)


def prompts_to_sample(tokenizer, model, preferences):
    """The prompts (lists of ids) that leave room for an answer."""
    room = model.config.block_size - sample_room(model)
    fitting = fit_prompts(tokenizer, [p.prompt for p in preferences], room, "prompts to sample from")
    return [tokenizer.prompt(prompt) for prompt in fitting]


@torch.no_grad()
def normalize(model, sft, tokenizer, run, prompts):
    """Shift and scale the head so that the SFT model's samples have mean score 0 and standard deviation 1.
    Returns the mean and the standard deviation that they had."""
    samples = run.sample(sft, prompts, run.seeds(len(prompts)), sample_room(model), stop_token=tokenizer.end)

    scores = run.map(lambda b: {"scores": model.score(b["tokens"], b["lengths"])}, samples)["scores"]
    mean, deviation = scores.mean().item(), max(scores.std().item(), 1e-6)
    model.head.weight.div_(deviation)
    model.head.bias.sub_(mean).div_(deviation)
    return mean, deviation


# ----------------------------------------------------------------------------------------- the loop

def learn(model, run, examples, steps):
    """The training loop over Comparisons."""
    cfg = run.cfg
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)

    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        for some, share in run.micro_batches(rows, weights=[1] * len(rows)):        # each prompt counts alike
            scores, ranks = score_answers(model, run, some)
            margin = torch.tensor([c.margin for c in some], device=run.device)
            probability = torch.tensor([c.probability for c in some], device=run.device)
            loss = ranking_loss(scores, ranks, margin, probability)
            (share * loss).backward()
            stats.add(share, loss=loss, best_beats_worst=best_beats_worst(scores, ranks))
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        run.log(metrics | {"grad_norm": norm, "lr": lr})


def train(cfg):
    torch.manual_seed(cfg.seed)                                 # before the new head's weights are drawn
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    model = load(cfg.init, "scalar", tokenizer.vocab_size)
    preferences, unseen = loading.load("preferences", cfg.data, cfg.held_out, cfg.max_dropped)
    loading.warn_if_foreign(tokenizer, [p.prompt for p in preferences], cfg.data, cfg.init)
    block_size = model.config.block_size
    examples = encode_comparisons(tokenizer, preferences, block_size, "preferences", cfg.max_dropped)
    held_out = encode_comparisons(tokenizer, unseen, block_size, "held-out preferences")
    prompts = prompts_to_sample(tokenizer, model, preferences) if cfg.normalize else []
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(model)
    learn(model, run, examples, steps)

    found, calibrated = evaluate(model, run, held_out)
    if loading.is_world(cfg.data):
        # People disagree, so no model predicts every choice. The ceiling is the accuracy of one that names,
        # for each pair, the answer that most annotators prefer. judge_agreement is that of the world's judge,
        # who knows the truth, and not people's weaknesses.
        found["ceiling"] = annotators.ceiling(unseen)
        found["judge_agreement"] = annotators.agreement(unseen)
    shown = (f"{name} {x:.3f}" if isinstance(x, float) else f"{name} {x}" for name, x in found.items())
    print("held out:  " + "  ".join(shown))
    print("calibration, predicted → won:  " + "  ".join(f"{p:.2f} → {w:.2f} ({n})" for p, w, n in calibrated))
    if cfg.normalize:
        sft = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
        run.place(sft)
        mean, deviation = normalize(model, sft, tokenizer, run, run.rng.choices(prompts, k=cfg.normalize))
        print(f"score shifted by {-mean:.2f} and divided by {deviation:.2f}: "
              "SFT samples now have mean 0 and standard deviation 1")
        found |= {"sft_mean": mean, "sft_deviation": deviation}
    known = uncertainty.learn(model, run, examples, cfg.ensemble, ranking_loss) if cfg.ensemble else None
    run.finish(model, tokenizer, known, held_out=found, calibration=calibrated)


if __name__ == "__main__":
    main(Config, train, __doc__)
