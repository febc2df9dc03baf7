"""Five other losses on the preferences from which dpo.py learns.

    python -m variants.preferences --loss simpo

r = log π − log π_ref of a whole answer is DPO's implicit reward without its β, ℓ = (log π)/|y| an answer's
log-probability per token; + marks the chosen answer of a pair, − the rejected one, and h = r⁺ − r⁻.

    simpo   −log σ(β·(ℓ⁺ − ℓ⁻) − γ)                             Meng et al. 2024, arXiv 2405.14734, eq. 6
    orpo    −ℓ⁺ − β·log σ(log-odds(ℓ⁺) − log-odds(ℓ⁻))          Hong et al. 2024, arXiv 2403.07691, eq. 6
    kto     (1 − σ(β·(r⁺ − z))) + (1 − σ(β·(z − r⁻)))           Ethayarajh et al. 2024, arXiv 2402.01306
    nca     −log σ(βr⁺) − ½·log σ(−βr⁺) − ½·log σ(−βr⁻)         Chen et al. 2024, arXiv 2402.05369
    robust  (−(1 − ε)·log σ(βh) + ε·log σ(−βh)) / (1 − 2ε)      Chowdhury et al. 2024, arXiv 2403.00409

simpo and orpo have no reference. The margin γ of simpo asks for more than the right order. orpo is SFT (−ℓ⁺,
here only where y⁺ is its prompt's best answer) with one more term: the odds of p = exp ℓ are p/(1 − p).

kto judges each answer alone, so it could learn from single answers that are marked good or bad. It compares
them with z, an estimate of KL(π ‖ π_ref): the mean of r over prompts with other prompts' answers, at least 0,
without a gradient. nca too judges each answer alone. For an answer that is always chosen its minimum is at a
finite r, where σ(βr) = 2/3. DPO looks only at the difference of two answers, so both can become less likely.

robust is DPO's loss, corrected for labels of which a random share ε is swapped: its mean over such labels is
DPO's loss on the right ones. It falls below 0 and has no minimum: h grows without limit.

What a loss does to the chosen answers is in the log: logp_chosen.
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
from runtime.terminal import print_numbers

BETAS = {"simpo": 2.0, "orpo": 0.5, "kto": 0.25, "nca": 0.25, "robust": 0.25}
ALONE = ("simpo", "orpo")               # without a reference, on log-probabilities per token


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


def odds_loss(chosen, rejected, beta):
    """ORPO's second term. chosen, rejected: log-probabilities per token, (B,). Returns losses (B,)."""
    log_odds = (chosen - torch.log(-torch.expm1(chosen))) - (rejected - torch.log(-torch.expm1(rejected)))
    return -beta * F.logsigmoid(log_odds)


def kto_loss(chosen, rejected, beta, z):
    """chosen, rejected: r of whole answers, (B,); z: a number. Returns losses (B,)."""
    return torch.sigmoid(-beta * (chosen - z)) + torch.sigmoid(-beta * (z - rejected))


def nca_loss(chosen, rejected, beta):
    """chosen, rejected: r of whole answers, (B,). Returns losses (B,)."""
    chosen, rejected = beta * chosen, beta * rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust_loss(chosen, rejected, beta, smoothing):
    """chosen, rejected: r of whole answers, (B,); smoothing: ε. Returns losses (B,)."""
    h = beta * (chosen - rejected)
    return (-(1 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1 - 2 * smoothing)


def pair_loss(model, run, comparisons, z):
    """As dpo.pair_loss, with the losses above. z: KTO's."""
    cfg, pairs, first = run.cfg, [], 0
    for c in comparisons:
        pairs += [(first + i, first + j, c.probability, i in c.best) for i, j in c.pairs]
        first += len(c.sequences)
    chosen, rejected, probability, is_best = (torch.tensor(x, device=run.device) for x in zip(*pairs))
    logprobs, tokens = dpo.answer_logprobs(model, run, comparisons)
    if cfg.loss in ALONE:
        x = logprobs / tokens
    else:
        x = logprobs - torch.tensor([x for c in comparisons for x in c.ref_logprobs]).to(logprobs)
    loss, more = {"simpo": (simpo_loss, [cfg.gamma]), "orpo": (odds_loss, []), "kto": (kto_loss, [z]),
                  "nca": (nca_loss, []), "robust": (robust_loss, [cfg.label_smoothing])}[cfg.loss]
    right = loss(x[chosen], x[rejected], cfg.beta, *more)
    wrong = loss(x[rejected], x[chosen], cfg.beta, *more)
    p = probability.to(logprobs)                                        # that the order is right
    imitation = (cfg.nll_coef + (cfg.loss == "orpo")) * logprobs[chosen] / tokens[chosen]
    losses = p * right + (1 - p) * wrong - torch.where(is_best, imitation, 0)
    return losses.mean(), {"accuracy": (x[chosen] > x[rejected]).float().mean(),
                           "logp_chosen": logprobs[chosen].mean(), "logp_rejected": logprobs[rejected].mean()}


def mismatched(comparisons, block_size, rng):
    """Prompts with another prompt's answer, drawn at random, where both fit into the block."""
    found = []
    for c in comparisons:
        other = rng.choice(comparisons)
        ids = c.sequences[0][:c.start] + rng.choice(other.sequences)[other.start:]
        if len(ids) <= block_size and other.sequences[0][:other.start] != c.sequences[0][:c.start]:
            found.append(replace(c, sequences=[ids], ranks=[1]))
    return found


def mean_gain(model, run, comparisons):
    """z: the mean of log π − log π_ref over these answers, at least 0 as a KL is."""
    def read(rows):
        return {"logprobs": dpo.answer_logprobs(model, run, rows)[0]}
    reference = torch.tensor([c.ref_logprobs[0] for c in comparisons])
    return max(0.0, (run.map(read, comparisons)["logprobs"].cpu() - reference).mean().item())


@torch.no_grad()
def evaluate(model, run, comparisons, z):
    """{name: mean over all pairs of held-out Comparisons}."""
    stats = Meter()
    for some, share in run.micro_batches(comparisons, weights=[len(c.pairs) for c in comparisons]):
        loss, metrics = pair_loss(model, run, some, z)
        stats.add(share, loss=loss, **metrics)
    return stats.means()


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    examples, held_out = dpo.load_examples(cfg, tokenizer, policy.config.block_size)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)
    run = Run(cfg, steps)
    run.place(policy)
    others, z = mismatched(examples, policy.config.block_size, run.rng) if cfg.loss == "kto" else [], 0.0
    if cfg.loss not in ALONE:
        dpo.add_reference(policy, run, examples + held_out + others)
    optimizer = make_optimizer(policy, cfg.lr)
    run.resume(model=policy, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        if cfg.loss == "kto":
            z = mean_gain(policy, run, run.rng.choices(others, k=len(rows)))
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, metrics = pair_loss(policy, run, some, z)
            (share * loss).backward()
            stats.add(share, loss=loss, **metrics)
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        run.log(metrics | ({"z": z} if cfg.loss == "kto" else {}) | {"grad_norm": norm, "lr": lr})
    metrics = evaluate(policy, run, held_out, z)
    print_numbers("held out:", metrics)
    run.finish(policy, tokenizer, held_out=metrics)


if __name__ == "__main__":
    main(Config, train, __doc__)
