"""Direct preference optimisation: stages 2 and 3 in one loss.

    python dpo.py                                             from out/sft, on the embedded world's rankings
    python dpo.py --loss ipo --beta 0.2

The policy that maximises E[r] − β·KL(π ‖ π_ref) is π* ∝ π_ref·exp(r/β). Turned around, every policy is the optimum of
some reward, r = β·log(π/π_ref) + a constant of the prompt; put into Bradley-Terry's loss, the constant cancels and the
reward model is the policy itself (Rafailov et al. 2023). No samples, no critic, no reward network: one classification
loss on the preference data. The price: it learns only from answers that were compared, never from its own.

The loss sees differences alone, and is just as glad to push both answers of a pair down, the rejected one further,
which lifts answers that nobody compared. So each prompt's best answer is imitated a little besides (Pang et al. 2024,
arXiv 2404.19733, eq. 1): --nll_coef 0 for DPO on its own.

The reference's log-probabilities are computed once, up front, so that the reference need not stay in memory. Rankings
of K answers count as all their pairs, each answer read once.
"""
from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F

import parallel
import runtime
from data import loading
from data.tokenizer import Tokenizer
from flags import Training, flag


@dataclass
class Config(Training):
    out: str = flag("out/dpo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    data: str = flag("world", "preferences: world, or a file (.json, .jsonl, .jsonl.gz)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    loss: str = flag("sigmoid", "sigmoid is DPO's own", choices=("sigmoid", "ipo", "hinge"))
    beta: float = flag(0.5, "β: how dear it is to leave the reference", 1e-6)
    label_smoothing: float = flag(0.0, "share of pairs taken to be the wrong way round (cDPO; sigmoid only)", 0, 0.499)
    nll_coef: float = flag(2.0, "weight of −log p a token of a pair's chosen answer, if it is its prompt's best; 0 is DPO on its own", 0)
    length_normalize: bool = flag(False, "compare mean log-probabilities a token, not sums")
    records: int = flag(3000, "preferences to learn from, the first of the file; 0 takes all", 0)
    epochs: int = flag(1, "passes over the preferences", 1)
    batch: int = flag(8, "prompts an optimiser step, each with all its answers", 1)
    micro_batch: int = flag(8, "prompts a forward pass; the gradient is the same", 1)
    lr: float = flag(5e-4, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)


# ---------------------------------------------------------------------------------------- the loss

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss="sigmoid", label_smoothing=0.0):
    """The loss of B pairs from the log-probabilities of whole answers, all (B,), in nats.

    With h = (log π − log π_ref)(y⁺) − (log π − log π_ref)(y⁻), the margin by which the policy prefers y⁺ more than
    the reference does, and ε = label_smoothing:

        sigmoid   −(1 − ε)·log σ(βh) − ε·log σ(−βh)     Rafailov et al. 2023, eq. 7; with ε, cDPO (Mitchell 2023)
        ipo       (h − 1/(2β))²                         Azar et al. 2023, eq. 17: a margin to hit, not to exceed
        hinge     max(0, 1 − βh)                        SLiC (Zhao et al. 2023)

    Returns losses (B,), and without a graph the implicit rewards β·log(π/π_ref) of chosen and rejected, each (B,).
    """
    chosen, rejected = policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()
    h = chosen - rejected
    losses = {"sigmoid": lambda: -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h),
              "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
              "hinge": lambda: torch.relu(1 - beta * h)}[loss]()
    return losses, beta * chosen.detach(), beta * rejected.detach()


# ---------------------------------------------------------------------------------------- the data

@dataclass
class Example:
    """One prompt with its K answers."""
    rows: list              # K lists of ids, prompt and answer
    start: int              # where the answers begin
    pairs: list             # (chosen, rejected) as indices into rows
    ref: list = None        # the reference's log-probability of each answer


def encode(tokenizer, preferences):
    out = []
    for p in preferences:
        prompt = tokenizer.prompt(p.prompt)
        pairs = [(i, j) for i, j in permutations(range(len(p.ranks)), 2) if p.ranks[i] < p.ranks[j]]
        out.append(Example([prompt + tokenizer.response(r) for r in p.responses], len(prompt), pairs))
    return out


def answer_logprobs(model, run, group):
    """log p of each answer of a list of Examples, one after another: (rows,), and the number of its tokens, (rows,)."""
    rows = [row for e in group for row in e.rows]
    starts = torch.tensor([e.start for e in group for _ in e.rows])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    tokens = loading.pad(rows)
    column = torch.arange(tokens.shape[1])
    mask = ((column >= starts) & (column < ends)).to(run.device)
    with run.autocast():
        return model.logprobs(tokens.to(run.device), mask).sum(1), mask.sum(1)


@torch.no_grad()
def add_reference(model, run, examples):
    """Fill in Example.ref, a mini-batch of neighbours in length at a time."""
    order, found = sorted(examples, key=lambda e: max(map(len, e.rows))), []
    for group, live in parallel.micro_batches(order, run.cfg.micro_batch):
        values = iter(answer_logprobs(model, run, group)[0].tolist())
        found += [[next(values) for _ in e.rows] for e in group] * live
    for e, ref in zip(order, parallel.gather(found)):
        e.ref = ref


def batch_loss(model, run, group):
    """Losses over all pairs of a list of Examples: (pairs,), and {name: (pairs,)} of what a person watches. A pair whose
    chosen answer is its prompt's best also pays nll_coef times −log p a token of that answer."""
    cfg = run.cfg
    logprobs, lengths = answer_logprobs(model, run, group)
    ref = torch.tensor([x for e in group for x in e.ref], device=run.device)
    first, pairs, best = 0, [], []
    for e in group:
        pairs += [(first + i, first + j) for i, j in e.pairs]
        rejected = {j for _, j in e.pairs}
        best += [i not in rejected for i, _ in e.pairs]
        first += len(e.rows)
    w, l = torch.tensor(pairs, device=run.device).T
    nll = -logprobs[w] / lengths[w] * torch.tensor(best, device=run.device)
    size = lengths if cfg.length_normalize else torch.ones_like(lengths)
    losses, chosen, rejected = dpo_loss((logprobs / size)[w], (logprobs / size)[l], (ref / size)[w], (ref / size)[l],
                                        cfg.beta, cfg.loss, cfg.label_smoothing)
    losses = losses + cfg.nll_coef * nll
    return losses, {"loss": losses.detach(), "accuracy": (chosen > rejected).float(), "margin": chosen - rejected,
                    "reward_chosen": chosen, "reward_rejected": rejected,
                    "logp_chosen": logprobs[w].detach(), "logp_rejected": logprobs[l].detach()}


# ---------------------------------------------------------------------------------------- the loop

@torch.no_grad()
def evaluate(model, run, examples):
    """Means over all pairs of held-out examples: {name: number}."""
    examples = sorted(examples, key=lambda e: max(map(len, e.rows)))            # little padding
    pairs, sums = 0, Counter()
    for group, live in parallel.micro_batches(examples, run.cfg.micro_batch):
        watched = batch_loss(model, run, group)[1]
        pairs += live * len(watched["loss"])
        sums.update({k: live * v.sum().item() for k, v in watched.items()})
    return {k: parallel.total(v) / parallel.total(pairs) for k, v in sums.items()}


def train(cfg):
    runtime.require(cfg.init, "sft")
    preferences, held_out_preferences = loading.load("preferences", cfg.data, cfg.held_out)
    tokenizer = Tokenizer.load(cfg.init)
    model = parallel.load(cfg.init)
    size, length = model.config.block_size, lambda e: max(map(len, e.rows))
    examples = loading.fit(encode(tokenizer, preferences[:cfg.records or None]), length, size, "preferences")
    held_out = loading.fit(encode(tokenizer, held_out_preferences), length, size, "held-out preferences")

    steps = cfg.epochs * -(-len(examples) // cfg.batch)
    run = runtime.Run(cfg, steps)
    parallel.prepare(run, model)
    add_reference(model, run, examples + held_out)      # the policy is still the reference
    optimizer = runtime.make_optimizer(model, cfg.lr)
    run.resume(model=model, optimizer=optimizer)

    def width(i):
        """Tokens of a prompt with all its answers, padding included."""
        return len(examples[i].rows) * length(examples[i])

    for batch in loading.batches([length(e) for e in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        total = sum(len(examples[i].pairs) for i in batch)
        sums = Counter()
        for rows, live in parallel.micro_batches(batch, cfg.micro_batch, cfg.micro_tokens, width):
            losses, watched = batch_loss(model, run, [examples[i] for i in rows])
            (losses.sum() / total * live).backward()
            sums.update({k: v.sum().item() / total * live for k, v in watched.items()})
        sums = {k: parallel.total(v) for k, v in sums.items()}
        lr = cfg.lr * runtime.schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.descend(optimizer, lr, cfg.max_norm, sums["loss"], f"preferences {batch}")
        run.log(sums | {"grad_norm": norm, "lr": lr})
    found = evaluate(model, run, held_out)
    print("held out:  " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()))
    run.finish(model, tokenizer, held_out=found)


if __name__ == "__main__":
    runtime.main(Config, train, __doc__)
