"""PPO on a reward model that tells where its scores are guesses, and lowers them there.

    python -m variants.cautious --pessimism worst
    python -m variants.cautious --ood_penalty 3 --kl_coef 0 --no-adaptive_kl

A policy that maximises a score finds answers whose score is too high by mistake (reward hacking). Two signs
of that need no knowledge of the truth. Heads that were trained on different samples of the preferences make
different mistakes, so where they disagree the score is a guess. And the score of an answer unlike all those
that the reward model was trained on (out of distribution, OOD) is a guess as well. Both are fitted at the
start of the run, on the states that the reward model's own head reads. Every step logs `disagreement` (the
heads' standard deviation) and `ood` (the share of answers that are OOD), also where they change no score.
"""
import math
import random
from dataclasses import dataclass

import torch

import ppo
from data import loading
from data.batches import encode_comparisons
from data.tokenizer import Tokenizer
from reward_model import ranking_loss
from runtime.compute import pad
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import ModelReward


@dataclass
class Config(ppo.Config):
    out: str = flag("out/cautious", "folder that the run writes")
    reward: str = flag("out/reward_model", "folder of the reward model")
    preferences: str = flag(loading.WORLD, "what it was trained on: a folder of the world's, or a file")
    heads: int = flag(5, "heads of the ensemble", 2)
    pessimism: str = flag("none", "score by the ensemble: its mean less its deviation, or its worst head",
                          choices=("none", "deviation", "worst"))
    pessimism_coef: float = flag(1.0, "c of mean − c·standard deviation", 0)
    ood_penalty: float = flag(0.0, "subtracted from the score for each threshold that an answer's distance "
                              "exceeds the OOD threshold by", 0)


def read_states(run, model, comparisons):
    """The state (N, C) that a reward model's head reads of each of the N answers of some Comparisons."""
    def read(rows):
        batch = run.batch(rows)
        return {"states": model.last_state(batch["tokens"], batch["lengths"]).to(model.head.weight.dtype)}
    sequences = [ids for c in comparisons for ids in c.sequences]
    return run.map(read, sequences, [len(ids) for ids in sequences])["states"]


def fit(run, model, comparisons, held_out, count):
    """What `signals` needs: {"heads" (M, C), "bias" (M,)}, an ensemble of M = count heads on the scale of the
    model's own score; {"mean" (C,), "precision" (C, C)} of training answers; and {"threshold"}, the distance
    from them that one in a hundred held-out answers exceeds (training answers would lie too near).

    comparisons: the reward model's training data, of which 4,000 prompts are enough; held_out: others."""
    rng = random.Random(run.cfg.seed)
    comparisons = rng.sample(comparisons, min(4000, len(comparisons)))
    answers, ranks = read_states(run, model, comparisons), pad([c.ranks for c in comparisons]).to(run.device)
    states = torch.zeros(*ranks.shape, answers.shape[1], dtype=answers.dtype, device=run.device)
    states[ranks > 0] = answers
    labels = (ranks, torch.tensor([c.margin for c in comparisons], device=run.device),
              torch.tensor([c.probability for c in comparisons], device=run.device))
    heads = fit_heads(states, labels, count, torch.Generator().manual_seed(run.cfg.seed))
    scores, own = answers @ heads.T, model.head(answers).flatten()              # (N, M), (N,)
    scale = own.std() / scores.std(0)
    known = {"heads": heads * scale[:, None], "bias": own.mean() - scale * scores.mean(0),
             **fit_gaussian(answers)}
    distances = distance(read_states(run, model, held_out), known["mean"], known["precision"])
    return known | {"threshold": distances.quantile(0.99)}


@torch.enable_grad()
def fit_heads(states, labels, count, noise, epochs=30, batch=512, lr=0.03):
    """`count` linear heads on one trunk, (count, C). Each starts from its own random weights and learns from
    its own sample of the prompts, drawn with replacement (bagging: Breiman 1996). Where the training answers
    determine a score, all heads agree on it; along directions in which they hardly vary, each head keeps its
    random start. Coste et al. (2023) train whole networks, which differ more and take as many times as long.

    states (N, K, C); labels: ranks (N, K), margins (N,) and probabilities (N,), as ranking_loss takes them;
    noise: a torch.Generator."""
    N, _, C = states.shape
    heads = (torch.randn(count, C, generator=noise) / math.sqrt(C + 1)).to(states.device).requires_grad_()
    optimizer = torch.optim.Adam([heads], lr)
    drawn = torch.randint(N, (count, N), generator=noise).to(states.device)
    for some in drawn.split(batch, dim=1) * epochs:
        losses = [ranking_loss(states[prompts] @ head, *(label[prompts] for label in labels))
                  for prompts, head in zip(some, heads)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return heads.detach()


def fit_gaussian(states):
    """"mean" (C,) and "precision" (C, C) of states (N, C), for `distance`. A thousandth of the mean variance
    is added to each direction, so that no direction without variance counts infinitely."""
    covariance = torch.cov(states.T)
    floor = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), device=states.device)
    return {"mean": states.mean(0), "precision": torch.linalg.inv(covariance + floor)}


def distance(states, mean, precision):
    """Mahalanobis distance √((h − μ)ᵀ·Σ⁻¹·(h − μ)) of each state (N, C): (N,) (Lee et al. 2018). It weighs
    each direction by how little the training answers vary in it, because that is where new answers show."""
    away = states - mean
    return torch.linalg.vecdot(away @ precision, away).clamp(min=0).sqrt()


def signals(model, known, batch):
    """Of B answers: "scores" (B,), the reward model's own; "heads" (B, M), those of the ensemble; and
    "distance" (B,) from the training answers, 1 at the threshold. known: what `fit` returns."""
    states = model.last_state(batch["tokens"], batch["lengths"]).to(model.head.weight.dtype)
    return {"scores": model.head(states).flatten(), "heads": states @ known["heads"].T + known["bias"],
            "distance": distance(states, known["mean"], known["precision"]) / known["threshold"]}


def cautious_scores(found, pessimism, pessimism_coef, ood_penalty, least):
    """Scores (B,), lowered where they are guesses (Coste et al. 2023): the ensemble's mean less c standard
    deviations ("deviation"), or its lowest head ("worst"), in place of the model's own score ("none"); less
    ood_penalty·(distance − 1) beyond the threshold. Caution lowers no score below `least`, the score of an
    answer without an end, or it would pay not to end.

    found: as `signals` returns it; pessimism_coef is c."""
    scores, heads = found["scores"], found["heads"]
    careful = scores
    if pessimism == "deviation":
        careful = heads.mean(1) - pessimism_coef * heads.std(1)
    elif pessimism == "worst":
        careful = heads.min(1).values
    careful = careful - ood_penalty * (found["distance"] - 1).clamp(min=0)
    return careful.maximum(scores.clamp(max=least))


class Cautious(ModelReward):
    """A reward (see runtime/rewards.py): cautious_scores of a reward model."""

    def __init__(self, cfg, tokenizer):
        super().__init__(cfg.reward, tokenizer)
        train, held_out = loading.load("preferences", cfg.preferences, "", cfg.max_dropped)
        size = self.model.config.block_size
        self.comparisons = encode_comparisons(tokenizer, train, size, "preferences", cfg.max_dropped)
        self.held_out = encode_comparisons(tokenizer, held_out, size, "held-out preferences", cfg.max_dropped)
        self.known = None

    def __call__(self, run, prompts, answers, batch):
        cfg = run.cfg
        if self.known is None:          # fitted from the seed alone: a run that goes on gets the same again
            self.known = fit(run, self.model, self.comparisons, self.held_out, cfg.heads)
        found = run.map(lambda b: signals(self.model, self.known, b), batch)
        run.note(ood=(found["distance"] > 1).float().mean(), disagreement=found["heads"].std(1).mean())
        return cautious_scores(found, cfg.pessimism, cfg.pessimism_coef, cfg.ood_penalty, cfg.no_end_score)


def train(cfg):
    ppo.train(cfg, reward=Cautious(cfg, Tokenizer.load(cfg.init, cfg.system)))


if __name__ == "__main__":
    main(Config, train, __doc__)
