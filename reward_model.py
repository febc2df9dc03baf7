"""Stage 2, the reward model: learn what people prefer.

    python reward_model.py                                  from out/sft, on the embedded world's rankings
    python reward_model.py --init out/other --data pairs.jsonl

People compare answers more reliably than they grade them. Bradley & Terry (1952) model comparisons with a
score r(x, y) of an answer y to a prompt x: y⁺ is preferred to y⁻ with probability σ(r(x, y⁺) − r(x, y⁻)). The
model is the SFT network with a new head that gives one number per token. The number at the answer's last
token is the score of the whole answer: the network reads from left to right, so only this position has seen
all of it.

A ranking of K answers holds K(K − 1)/2 comparisons. All are used, not only best against worst, because that
pair is easy and says little about the answers in between. All K answers are in one batch, so that the network
reads each once per epoch. Each is part of K − 1 comparisons; in separate batches the network would be trained
on it K − 1 times per epoch, and would overfit (Ouyang et al. 2022, section 3.5).

Comparisons do not determine the shift of the scores: a number added to all scores of one prompt does not
change the loss. They do determine their scale, but it differs between data sets: the more people agree, the
larger are the differences. So after training one shift and one scale are chosen for all prompts, such that
samples of the SFT model, from which PPO starts, have mean score 0 and standard deviation 1. PPO's settings,
above all its KL penalty, then have the same effect with every reward model. The order of the scores does not
change.
"""
import math
from dataclasses import dataclass

import torch

from data import annotators, loading
from data.batches import batches, encode_comparisons, fit_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Meter, pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run
from runtime.terminal import print_numbers, print_wrapped


@dataclass
class Config(Training):
    out: str = flag("out/reward_model", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint to start from; its samples set the score's shift and scale")
    data: str = flag(loading.WORLD, "preferences: a folder of the world's, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    epochs: int = flag(1, "passes over the preferences; with more it overfits to annotators' noise", 1)
    batch: int = flag(8, "prompts per optimiser step, each with all its answers", 1)
    lr: float = flag(1e-3, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's weight decay, of matrices only", 0)
    normalize: int = flag(256, "SFT samples that set the score's mean and scale; 0: no shift, no scale", 0)


def pairwise_loss(chosen, rejected, margin=0.0):
    """Bradley-Terry: the mean of −log σ(r⁺ − r⁻ − m), the negative log-likelihood of the choices.

    chosen, rejected: scores (B,); margin m: a number or (B,). If annotators also say how much better an
    answer is, a larger m asks for a larger difference (Touvron et al. 2023, eq. 2). Returns a scalar in nats.
    With m = 0, equal scores give log 2, the loss of a coin toss. A larger loss on held-out pairs means that
    the model is confident where it is wrong."""
    return -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()


def ranking_loss(scores, ranks, margin=None, probability=None):
    """The pairwise loss for rankings of K answers: for each prompt the mean of −log σ(r_i − r_j − m) over its
    pairs (answer i better than j), then the mean of these over prompts (Ouyang et al. 2022, eq. 1). In one
    mean over all pairs, a prompt with nine answers (36 pairs) would count as much as 36 prompts with two.

    scores (B, K); ranks (B, K) int64, 1 is best, 0 marks a missing answer; margin (B,) or None; probability
    (B,) or None: the probability p that the given order is right, below 1 for a soft label. A pair's loss is
    then its expectation, p·loss(i better) + (1 − p)·loss(j better); with m = 0 its minimum is at
    σ(r_i − r_j) = p. Equal ranks are ties and give no pair, because Bradley & Terry's model only knows
    choices. Each row needs at least two different ranks. Returns a scalar in nats."""
    scores = torch.where(ranks > 0, scores, 0)          # a missing one may be NaN, and NaN · 0 is NaN
    gaps = scores[:, :, None] - scores[:, None, :]                              # (B, K, K): r_i − r_j
    margin = 0.0 if margin is None else margin[:, None, None]
    losses = -torch.nn.functional.logsigmoid(gaps - margin)
    if probability is not None:
        p = probability[:, None, None]
        losses = p * losses - (1 - p) * torch.nn.functional.logsigmoid(-gaps - margin)
    present = (ranks > 0)[:, :, None]                   # i exists; a missing j has rank 0, and none is below
    better = present & (ranks[:, :, None] < ranks[:, None, :])
    return ((losses * better).sum((1, 2)) / better.sum((1, 2))).mean()


def best_beats_worst(scores, ranks):
    """The share of prompts whose best answer scores above their worst. scores, ranks: as in ranking_loss."""
    absent = ranks == 0
    best = ranks.masked_fill(absent, ranks.max() + 1).argmin(dim=1, keepdim=True)
    worst = ranks.argmax(dim=1, keepdim=True)
    return (scores.gather(1, best) > scores.gather(1, worst)).float().mean()


def score_answers(model, run, comparisons):
    """Scores (B, K) and ranks (B, K) of B Comparisons, both 0 where a prompt has fewer than K answers."""
    batch = run.batch([ids for c in comparisons for ids in c.sequences])
    scores = model.score(batch["tokens"], batch["lengths"])                     # of all prompts' answers
    ranks = pad([c.ranks for c in comparisons]).to(run.device)
    return torch.zeros_like(ranks, dtype=scores.dtype).masked_scatter(ranks > 0, scores), ranks


def evaluate(model, run, comparisons):
    """How well the model predicts all pairs of held-out Comparisons: {metric: number}, and the rows of
    `calibration`. The loss is pairwise_loss over all pairs, without margins and soft labels."""
    scores = run.map(lambda rows: {"scores": score_answers(model, run, rows)[0]}, comparisons)["scores"]
    gaps, longer = [], []           # per pair: r⁺ − r⁻, and the number of tokens of y⁺ minus that of y⁻
    for c, r in zip(comparisons, scores.tolist()):
        gaps += [r[i] - r[j] for i, j in c.pairs]
        longer += [c.lengths[i] - c.lengths[j] for i, j in c.pairs]
    gaps, longer = torch.tensor(gaps), torch.tensor(longer)
    right = (gaps > 0).float() + 0.5 * (gaps == 0)
    numbers = {"loss": pairwise_loss(gaps, 0).item(), "accuracy": right.mean().item(), "pairs": len(gaps)}
    # A model that has only learnt to prefer long answers has accuracy 0 where the winner is more than 4
    # tokens shorter, 1 where it is more than 4 longer, and about ½ between. Good accuracies are nearly equal.
    for name, rows in (("winner_shorter", longer < -4), ("same_length", longer.abs() <= 4),
                       ("winner_longer", longer > 4)):
        if rows.any():
            numbers[f"accuracy_{name}"] = right[rows].mean().item()
    return numbers, calibration(gaps)


def calibration(gaps):
    """Compare the predicted probability with how often it came true: the higher score should win with
    probability σ(|r⁺ − r⁻|).

    gaps: r⁺ − r⁻ of each pair. Returns a row (mean probability, share of pairs in which the higher score won,
    number of pairs) for each of the bins 0.5 to 0.6, ..., 0.9 to 1. Computed before the score is rescaled:
    only on its trained scale is σ(r⁺ − r⁻) a probability."""
    predicted, won, rows = torch.sigmoid(gaps.abs()), (gaps > 0).float(), []
    edges = (0.5, 0.6, 0.7, 0.8, 0.9, 1.01)                     # σ can round to exactly 1
    for low, high in zip(edges, edges[1:]):
        some = (predicted >= low) & (predicted < high)
        if some.any():
            rows.append((predicted[some].mean().item(), won[some].mean().item(), int(some.sum())))
    return rows


@torch.no_grad()
def normalize(model, sft, run, prompts, end):
    """Shift and scale the head so that the SFT model's answers to these prompts (lists of ids) have mean
    score 0 and standard deviation 1. Returns the mean and the standard deviation before that."""
    room = sample_room(model)
    samples = run.sample(sft, prompts, run.seeds(len(prompts)), room, stop_token=end)
    scores = run.score(model, samples)
    mean, deviation = scores.mean().item(), max(scores.std().item(), 1e-6)
    model.head.weight.div_(deviation)
    model.head.bias.sub_(mean).div_(deviation)
    return mean, deviation


def sample_room(model):
    """The longest sampled answer, in tokens; prompts may use the rest of the block."""
    return min(64, model.config.block_size // 2)


def train(cfg):
    torch.manual_seed(cfg.seed)                                 # before the new head's weights are drawn
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    sft = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)      # for the scale: see normalize
    model = load(cfg.init, "scalar", tokenizer.vocab_size)
    preferences, unseen = loading.load("preferences", cfg.data, cfg.held_out, cfg.max_dropped)
    loading.warn_if_foreign(tokenizer, [p.prompt for p in preferences], cfg.data, cfg.init)
    block_size = model.config.block_size
    examples = encode_comparisons(tokenizer, preferences, block_size, "preferences")
    held_out = encode_comparisons(tokenizer, unseen, block_size, "held-out preferences")
    prompts = fit_prompts(tokenizer, [p.prompt for p in preferences], block_size - sample_room(model),
                          "prompts to sample from") if cfg.normalize else []
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(model)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        for some, share in run.micro_batches(rows, weights=[1] * len(rows)):    # all prompts count alike
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

    numbers, calibrated = evaluate(model, run, held_out)
    if loading.is_world(cfg.data):
        # Annotators differ, and a choice is one annotator's. If a random one prefers y⁺ with probability p,
        # even the best prediction, the answer that most annotators prefer, is right only with probability
        # max(p, 1 − p). The ceiling is the mean of this over all pairs; on average no scorer exceeds it.
        # judge_agreement is the share of choices that agree with the world's judge (the truth).
        numbers |= {"ceiling": annotators.ceiling(unseen), "judge_agreement": annotators.agreement(unseen)}
    print_numbers("held out:", numbers)
    print_wrapped("calibration, predicted → won:", [f"{p:.2f} → {w:.2f} ({n})" for p, w, n in calibrated])
    if cfg.normalize:
        run.place(sft)
        asked = [tokenizer.prompt(prompt) for prompt in run.rng.choices(prompts, k=cfg.normalize)]
        mean, deviation = normalize(model, sft, run, asked, tokenizer.end)
        print(f"score shifted by {-mean:.2f} and divided by {deviation:.2f}: "
              "SFT samples now have mean 0 and standard deviation 1")
        numbers |= {"sft_mean": mean, "sft_deviation": deviation}
    run.finish(model, tokenizer, held_out=numbers, calibration=calibrated)


if __name__ == "__main__":
    main(Config, train, __doc__)
