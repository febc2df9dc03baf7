"""How far a reward model's score can be trusted: an ensemble of heads, and the distance to what it has seen.

A policy that climbs a score finds where it is too high by mistake (reward hacking). Two things tell such
places without knowing the truth. Heads that learnt from different samples of the same people make different
mistakes, so where they disagree the score is a guess. And an answer unlike all that the reward model has
learnt from is one about which it cannot know. reward_model.py --ensemble learns both at the end of its run,
from what its head reads of the training answers; Cautious is a reward that uses them, and
variants/cautious_ppo.py is PPO with it.
"""
import math

import torch

from runtime.compute import pad
from runtime.rewards import OfModel


def learn(model, run, comparisons, count, ranking_loss):
    """What a reward model's folder keeps: {"heads" (M, C), "bias" (M,)}, an ensemble on the scale of the
    model's own score, and what `spread` finds.

    comparisons: data.batches.Comparison of training answers, of which 4,000 prompts say enough; count: M;
    ranking_loss: of scores and their labels, as in reward_model.py."""
    some = run.rng.sample(comparisons, min(4000, len(comparisons)))
    sequences = [ids for c in some for ids in c.sequences]

    def read(rows):
        lengths = torch.tensor([len(ids) for ids in rows], device=run.device)
        state = model.last_state(pad(rows).to(run.device), lengths).to(model.head.weight.dtype)
        return {"states": state, "scores": model.head(state).flatten()}
    found = run.map(read, sequences, [len(ids) for ids in sequences])
    scores, seen = found["scores"], found["states"]
    ranks = pad([c.ranks for c in some]).to(run.device)
    states = torch.zeros(*ranks.shape, seen.shape[1], dtype=seen.dtype, device=run.device)
    states[ranks > 0] = seen
    labels = (ranks, torch.tensor([c.margin for c in some], device=run.device),
              torch.tensor([c.probability for c in some], device=run.device))
    heads = learn_heads(states, labels, count, ranking_loss)
    theirs = seen @ heads.T                                                                 # (answers, M)
    scale = scores.std() / theirs.std(0)
    bias = scores.mean() - scale * theirs.mean(0)
    return {"heads": heads * scale[:, None], "bias": bias} | spread(seen)


def learn_heads(states, labels, count, ranking_loss, epochs=30, batch=512, lr=0.03):
    """`count` heads on one trunk, (count, C). Each starts from weights of its own and learns from prompts of
    its own, drawn with replacement (bagging: Breiman 1996). Where training answers settle a score, all heads
    come to agree on it; along directions in which these hardly vary, each keeps what it happened to start
    with. Coste et al. (2023) train whole networks: they differ more, and cost as many times as much, where
    these take a second.

    states (N, K, C); labels: ranks (N, K), margins (N,), probabilities (N,), as ranking_loss takes them."""
    N, _, C = states.shape
    heads = (torch.randn(count, C, device=states.device) / math.sqrt(C + 1)).requires_grad_()
    optimizer = torch.optim.Adam([heads], lr)
    drawn = torch.randint(N, (count, N), device=states.device)
    for some in drawn.split(batch, dim=1) * epochs:
        losses = [ranking_loss(states[prompts] @ head, *(label[prompts] for label in labels))
                  for prompts, head in zip(some, heads)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return heads.detach()


def spread(states):
    """How training answers' states (N, C) lie: "mean" (C,) and "precision" (C, C) for the Mahalanobis
    distance √((h − μ)ᵀ·Σ⁻¹·(h − μ)) of a new one (Lee et al. 2018), and "threshold", the distance beyond
    which a hundredth of them lies. A step counts more in a direction in which these hardly vary: what is new
    shows there. A thousandth of the mean variance is added to all directions, so that none counts without
    bound."""
    covariance = torch.cov(states.T)
    floor = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), device=states.device)
    found = {"mean": states.mean(0), "precision": torch.linalg.inv(covariance + floor)}
    return found | {"threshold": distance(states, **found).quantile(0.99)}


def distance(states, mean, precision):
    """The Mahalanobis distance of states (N, C) from others' mean, (N,)."""
    away = states - mean
    return torch.linalg.vecdot(away @ precision, away).clamp(min=0).sqrt()


def score(model, tokens, lengths):
    """A reward model's "scores" (B,) of answers; and if it knows where they are guesses (model.known, what
    `learn` has returned), "heads", what each head of its ensemble says, (B, M), and "distance" from its
    training answers, (B,), 1 at the threshold. tokens (B, T): prompts with their answers, right-padded;
    lengths (B,): of both together."""
    if not model.known:
        return {"scores": model.score(tokens, lengths)}
    states = model.last_state(tokens, lengths).to(model.head.weight.dtype)
    known = model.known = {name: x.to(states) for name, x in model.known.items()}
    away = distance(states, known["mean"], known["precision"]) / known["threshold"]
    return {"scores": model.head(states).flatten(), "heads": states @ known["heads"].T + known["bias"],
            "distance": away}


def cautious(batch, pessimism, pessimism_coef, penalty, least):
    """Scores (B,) that count where they are guesses as low as they may well be (Coste et al. 2023): the
    ensemble's mean less c standard deviations ("deviation"), or its lowest head ("worst"), instead of the
    model's own ("none"). And `penalty` is taken off for each threshold that an answer is beyond the
    threshold. Caution takes no score below `least`, that of an answer without an end, or it would pay not to
    end.

    batch: scores (B,), heads (B, M), distance (B,), as `score` returns them; pessimism_coef is c."""
    scores, heads = batch["scores"], batch["heads"]
    found = scores
    if pessimism == "deviation":
        found = heads.mean(1) - pessimism_coef * heads.std(1)
    elif pessimism == "worst":
        found = heads.min(1).values
    found = found - penalty * (batch["distance"] - 1).clamp(min=0)
    return found.maximum(scores.clamp(max=least))


class Cautious(OfModel):
    """A reward model's score, as low as it may well be where it is a guess: see runtime/rewards.py."""

    def __init__(self, cfg, folder, tokenizer):
        """cfg: of variants/cautious_ppo.py."""
        super().__init__(folder, tokenizer)
        self.cfg = cfg
        if not self.model.known:
            raise ValueError("--pessimism, --ood_penalty and --stop_ood need what "
                             "reward_model.py --ensemble 5 finds out")

    def __call__(self, run, batch, prompts, answers):
        cfg = self.cfg
        found = run.map(lambda b: score(self.model, b["tokens"], b["lengths"]), batch)
        ood = (found["distance"] > 1).float().mean().item()
        if ood > cfg.stop_ood:
            print(f"stopped before step {run.step + 1}: {ood:.0%} of its answers are OOD")
            return None, {}
        scores = cautious(found, cfg.pessimism, cfg.pessimism_coef, cfg.ood_penalty, least=cfg.no_end_score)
        return scores, {"ood": ood, "disagreement": found["heads"].std(1).mean()}
