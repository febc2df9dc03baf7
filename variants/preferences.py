"""Five other losses on the preferences from which dpo.py learns.

    python -m variants.preferences --loss simpo

r = log π − log π_ref of a whole answer is DPO's implicit reward without its β, ℓ = (log π)/|y| an answer's
log-probability per token; + marks the chosen answer of a pair, − the rejected one, and h = r⁺ − r⁻.

    simpo   −log σ(β·(ℓ⁺ − ℓ⁻) − γ)                             Meng et al. 2024, arXiv 2405.14734, eq. 6
    orpo    −ℓ⁺ − β·log σ(log-odds(ℓ⁺) − log-odds(ℓ⁻))          Hong et al. 2024, arXiv 2403.07691, eq. 6
    kto     (1 − σ(β·(r⁺ − z))) + (1 − σ(β·(z − r⁻)))           Ethayarajh et al. 2024, arXiv 2402.01306
    nca     −log σ(βr⁺) − ½·log σ(−βr⁺) − ½·log σ(−βr⁻)         Chen et al. 2024, arXiv 2402.05369
    robust  (−(1 − ε)·log σ(βh) + ε·log σ(−βh)) / (1 − 2ε)      Chowdhury et al. 2024, arXiv 2403.00409

SimPO and ORPO need no reference. SimPO's margin γ asks for more than the right order. ORPO is SFT with one
more term: the odds of p = exp ℓ are p/(1 − p), and β only weighs the term. KTO judges each answer alone,
against what the policy gains on average, z = KL(π ‖ π_ref), so it could learn from single answers marked good
or bad. z is measured on prompts with other prompts' answers, and has no gradient. NCA too judges each answer
alone: for an answer that is always chosen its minimum is at a finite r, σ(βr) = 2/3, where DPO asks for the
difference alone and lets both answers become less likely. "robust" is DPO's loss with a correction that makes
it unbiased where a share ε of the labels is swapped at random.

The log shows what a loss does to the chosen answers: logp_chosen.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import dpo
from data.batches import batches
from data.tokenizer import Tokenizer
from runtime.compute import Meter
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run

BETAS = {"simpo": 2.0, "orpo": 0.5, "kto": 0.25, "nca": 0.25, "robust": 0.25}


@dataclass
class Config(dpo.Config):
    out: str = flag("out/preferences", "folder that the run writes")
    loss: str = flag("simpo", "loss of a pair", choices=tuple(BETAS))
    beta: float = flag(0.0, f"β; 0 takes the loss's own: {BETAS}", 0)
    gamma: float = flag(1.0, "γ, the margin of simpo", 0)
    label_smoothing: float = flag(0.1, "ε of robust, the share of labels that are wrong", 0, 0.499)

    def __post_init__(self):
        for name, of in (("gamma", "simpo"), ("label_smoothing", "robust")):
            if self.loss != of and getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} does nothing with --loss {self.loss}: it is of --loss {of}")
        if self.length_normalize:
            raise ValueError("--length_normalize: simpo and orpo always do, the others never")
        self.beta = self.beta or BETAS[self.loss]


def simpo_loss(chosen, rejected, beta, gamma):
    """chosen, rejected: log-probabilities per token, (B,). Returns losses (B,)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen, rejected, beta):
    """chosen, rejected: log-probabilities per token, (B,), below 0. Returns losses (B,)."""
    log_odds = (chosen - torch.log(-torch.expm1(chosen))) - (rejected - torch.log(-torch.expm1(rejected)))
    return -chosen - beta * F.logsigmoid(log_odds)


def kto_loss(chosen, rejected, z, beta):
    """chosen, rejected: r = log π − log π_ref of whole answers, (B,); z: a number. Returns losses (B,)."""
    return torch.sigmoid(-beta * (chosen - z)) + torch.sigmoid(-beta * (z - rejected))


def nca_loss(chosen, rejected, beta):
    """chosen, rejected: r = log π − log π_ref of whole answers, (B,). Returns losses (B,)."""
    chosen, rejected = beta * chosen, beta * rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust_loss(chosen, rejected, beta, smoothing):
    """chosen, rejected: r = log π − log π_ref of whole answers, (B,); smoothing: ε. Returns losses (B,)."""
    h = beta * (chosen - rejected)
    return (-(1 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1 - 2 * smoothing)


def pair_loss(model, run, comparisons, z):
    """The mean loss over all pairs of some Comparisons, and {metric: mean over the pairs}."""
    cfg, pairs, first = run.cfg, [], 0
    for c in comparisons:
        pairs += [(first + i, first + j) for i, j in c.pairs]
        first += len(c.sequences)
    chosen, rejected = torch.tensor(pairs, device=run.device).unbind(1)
    logprobs, tokens = dpo.answer_logprobs(model, run, comparisons)
    r = logprobs - torch.tensor([x for c in comparisons for x in c.ref_logprobs]).to(logprobs)
    x = logprobs / tokens if cfg.loss in ("simpo", "orpo") else r
    extra = {"simpo": (cfg.beta, cfg.gamma), "robust": (cfg.beta, cfg.label_smoothing), "kto": (z, cfg.beta)}
    losses = globals()[f"{cfg.loss}_loss"](x[chosen], x[rejected], *extra.get(cfg.loss, (cfg.beta,)))
    losses = losses - cfg.nll_coef * logprobs[chosen] / tokens[chosen]
    return losses.mean(), {"accuracy": (x[chosen] > x[rejected]).float().mean(),
                           "logp_chosen": logprobs[chosen].mean(), "logp_rejected": logprobs[rejected].mean()}


def mismatched(comparisons):
    """Each Comparison's prompt with the best answer of the next one, for z."""
    following = comparisons[1:] + comparisons[:1]
    answers = [other.sequences[other.best[0]][other.start:] for other in following]
    return [replace(c, sequences=[c.sequences[0][:c.start] + ids], ranks=[1])
            for c, ids in zip(comparisons, answers)]


def mean_gain(model, run, comparisons):
    """z: the mean of log π − log π_ref over these answers, at least 0 as a KL is."""
    def gain(rows):
        return {"gain": dpo.answer_logprobs(model, run, rows)[0]}
    reference = torch.tensor([c.ref_logprobs[0] for c in comparisons])
    return max(0.0, (run.map(gain, comparisons)["gain"].cpu() - reference).mean().item())


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    examples, held_out = dpo.load_examples(cfg, tokenizer, policy.config.block_size)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)
    run = Run(cfg, steps)
    run.place(policy)
    others = [c for c in mismatched(examples) if max(c.lengths) <= policy.config.block_size]
    dpo.add_reference(policy, run, examples + held_out + others)
    optimizer = make_optimizer(policy, cfg.lr)
    run.resume(model=policy, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        z = mean_gain(policy, run, run.rng.sample(others, len(rows))) if cfg.loss == "kto" else 0.0
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, metrics = pair_loss(policy, run, some, z)
            (share * loss).backward()
            stats.add(share, loss=loss, **metrics)
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        run.log(metrics | {"z": z, "grad_norm": norm, "lr": lr})
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
