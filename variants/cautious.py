"""PPO on a reward model that estimates where its scores are unreliable, and lowers them there.

    python -m variants.cautious --pessimism worst
    python -m variants.cautious --ood_penalty 3 --kl_coef 0 --no-adaptive_kl

A policy that maximises a score finds answers whose score is too high by mistake (reward hacking). Two signals
detect such errors without true scores. Heads that were trained on different samples of the preferences make
different errors, so where they disagree the score is unreliable. It is also unreliable for answers that are
unlike those the reward model was trained on (out of distribution, OOD). Both signals are fitted at the start
of the run, on the hidden states that are the input of the reward model's head. Every step logs `disagreement`
(the heads' standard deviation) and `ood` (the share of OOD answers), even if the flags leave scores as is.
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
    preferences: str = flag(loading.WORLD, "its training data: a folder of the world's files, or a file")
    heads: int = flag(5, "heads of the ensemble", 2)
    pessimism: str = flag("none", "score by the ensemble: mean minus standard deviation, or the lowest head",
                          choices=("none", "deviation", "worst"))
    pessimism_coef: float = flag(1.0, "c in mean − c·standard deviation", 0)
    ood_penalty: float = flag(0.0, "penalty per unit of distance/threshold beyond 1", 0)

    def __post_init__(self):
        super().__post_init__()
        if self.pessimism != "deviation" and self.pessimism_coef != Config.pessimism_coef:
            raise ValueError("--pessimism_coef does nothing without --pessimism deviation")


def read_states(run, model, comparisons):
    """The hidden states (N, C) at the last token of each of the N answers in Comparisons."""
    batch = run.batch([ids for c in comparisons for ids in c.sequences])
    states = run.map(lambda b: {"states": model.last_state(b["tokens"], b["lengths"])}, batch)["states"]
    return states.to(model.head.weight.dtype)


def fit(run, model, comparisons, held_out, count):
    """Fit what `signals` needs, and return it as a dict:

        heads, bias         (M, C) and (M,): M = count linear heads, scaled like the model's own score
        mean, precision     (C,) and (C, C): see fit_gaussian
        threshold           99 % quantile of held-out distances (those of training answers are too small)

    comparisons: the reward model's training data, of which at most 4,000 are used; held_out: other data."""
    rng = random.Random(run.cfg.seed)
    comparisons = rng.sample(comparisons, min(4000, len(comparisons)))
    answers, ranks = read_states(run, model, comparisons), pad([c.ranks for c in comparisons]).to(run.device)
    states = torch.zeros(*ranks.shape, answers.shape[1], dtype=answers.dtype, device=run.device)
    states[ranks > 0] = answers
    labels = (ranks, torch.tensor([c.margin for c in comparisons], device=run.device),
              torch.tensor([c.probability for c in comparisons], device=run.device))
    heads = fit_heads(states, labels, count, torch.Generator().manual_seed(run.cfg.seed))
    # Give each head's scores the mean and standard deviation of the model's own scores.
    scores, own = answers @ heads.T, model.head(answers).flatten()              # (N, M), (N,)
    scale = own.std() / scores.std(0)
    fitted = {"heads": heads * scale[:, None], "bias": own.mean() - scale * scores.mean(0),
              **fit_gaussian(answers)}
    distances = distance(read_states(run, model, held_out), fitted["mean"], fitted["precision"])
    return fitted | {"threshold": distances.quantile(0.99)}


@torch.enable_grad()                    # the caller of a reward may have turned gradients off
def fit_heads(states, labels, count, noise, epochs=30, batch=512, lr=0.03):
    """Train `count` linear heads (count, C) on the same hidden states (N, K, C). Each starts from its own
    random weights and is trained on its own sample of the prompts, drawn with replacement (bagging: Breiman
    1996). In directions in which the training answers vary, all heads learn about the same. In others each
    keeps its random start. Coste et al. (2023) train whole networks, which differ more and take much longer.

    labels: ranks (N, K), margins (N,), probabilities (N,), as in ranking_loss; noise: a torch.Generator."""
    N, _, C = states.shape
    heads = (torch.randn(count, C, generator=noise) / math.sqrt(C + 1)).to(states.device).requires_grad_()
    optimizer = torch.optim.Adam([heads], lr)
    drawn = torch.randint(N, (count, N), generator=noise).to(states.device)
    for indices in drawn.split(batch, dim=1) * epochs:      # the same batches in every epoch
        losses = [ranking_loss(states[prompts] @ head, *(label[prompts] for label in labels))
                  for prompts, head in zip(indices, heads)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return heads.detach()


def fit_gaussian(states):
    """Fit a Gaussian to states (N, C): {"mean" (C,), "precision" (C, C), the inverse covariance}. Every
    variance is increased by a thousandth of their mean, because precision would be infinite where it is 0."""
    covariance = torch.cov(states.T)
    floor = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), device=states.device)
    return {"mean": states.mean(0), "precision": torch.linalg.inv(covariance + floor)}


def distance(states, mean, precision):
    """The Mahalanobis distance √((h − μ)ᵀ·Σ⁻¹·(h − μ)) of each state h (N, C) from the training answers, (N,)
    (Lee et al. 2018). A step counts more in directions in which the training answers vary less."""
    away = states - mean
    return torch.linalg.vecdot(away @ precision, away).clamp(min=0).sqrt()


def signals(model, fitted, batch):
    """Return for B answers a dict of "scores" (B,) of the reward model's own head, "heads" (B, M), the scores
    of the ensemble's heads, and "distance" (B,) divided by the threshold. fitted: the result of `fit`."""
    states = model.last_state(batch["tokens"], batch["lengths"]).to(model.head.weight.dtype)
    return {"scores": model.head(states).flatten(), "heads": states @ fitted["heads"].T + fitted["bias"],
            "distance": distance(states, fitted["mean"], fitted["precision"]) / fitted["threshold"]}


def cautious_scores(measured, pessimism, pessimism_coef, ood_penalty, least):
    """The scores (B,) for PPO (Coste et al. 2023): the model's own ("none"), or the heads' mean minus
    pessimism_coef standard deviations ("deviation"), or the lowest head's ("worst"), in each case minus
    ood_penalty·(distance − 1) where distance > 1, but at least min(own score, least). `least` is the score of
    an answer without an end. If caution lowered the scores of other answers below it, it would pay not to
    end. measured: the result of `signals`."""
    scores, heads = measured["scores"], measured["heads"]
    careful = scores
    if pessimism == "deviation":
        careful = heads.mean(1) - pessimism_coef * heads.std(1)
    elif pessimism == "worst":
        careful = heads.min(1).values
    careful = careful - ood_penalty * (measured["distance"] - 1).clamp(min=0)
    return careful.maximum(scores.clamp(max=least))


class Cautious(ModelReward):
    """A reward (see runtime/rewards.py): cautious_scores of a reward model."""

    def __init__(self, cfg, tokenizer):
        super().__init__(cfg.reward, tokenizer)
        train, held_out = loading.load("preferences", cfg.preferences, "", cfg.max_dropped)
        size = self.model.config.block_size
        self.comparisons = encode_comparisons(tokenizer, train, size, "preferences")
        self.held_out = encode_comparisons(tokenizer, held_out, size, "held-out preferences")
        self.fitted = None

    def __call__(self, run, prompts, answers, batch):
        cfg = run.cfg
        if self.fitted is None:         # deterministic given the seed, so a resumed run gets the same fit
            self.fitted = fit(run, self.model, self.comparisons, self.held_out, cfg.heads)
        measured = run.map(lambda b: signals(self.model, self.fitted, b), batch)
        run.note(ood=(measured["distance"] > 1).float().mean(), disagreement=measured["heads"].std(1).mean())
        return cautious_scores(measured, cfg.pessimism, cfg.pessimism_coef, cfg.ood_penalty, cfg.no_end_score)


def train(cfg):
    ppo.train(cfg, reward=Cautious(cfg, Tokenizer.load(cfg.init, cfg.system)))


if __name__ == "__main__":
    main(Config, train, __doc__)
