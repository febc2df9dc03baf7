"""Direct preference optimisation (DPO): what the reward model and PPO do in two stages, in one loss.

    python dpo.py                                           from out/sft, on the embedded world's rankings
    python dpo.py --loss ipo --beta 0.2

PPO looks for the policy π that maximises E[r] − β·KL(π ‖ π_ref): reward r, without going far from a
reference, the SFT model. The solution is known in closed form, π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x),
where Z(x) makes the probabilities of all answers y to the prompt x sum to 1. Read from right to left, it says
of any policy π for which reward it would be the solution. Solved for r:

    r(x, y) = β·log(π(y|x)/π_ref(y|x)) + β·log Z(x)

Nobody can compute Z(x), a sum over all answers. But in Bradley & Terry's model of a comparison, P(y⁺
preferred to y⁻) = σ(r(x, y⁺) − r(x, y⁻)), only a difference of rewards for one prompt appears, and β·log Z(x)
cancels. So the probability of a comparison can be written with the policy's own log-probabilities, and the
policy is trained as if it were the reward model (Rafailov et al. 2023): `dpo_loss` is −log of it. No samples,
no critic, no reward network. The price: a policy that never sees its own answers is never told when they get
worse, and it drifts away from the answers that were compared.

β turns log-ratios log(π/π_ref) into rewards. If β is small, log-ratios must be large to fit the same
preferences: the policy goes far from the reference. If β is large, small log-ratios are enough: it stays
near.

The loss sees only differences: it falls just as well when both answers of a pair become less likely, the
rejected one more so (`logp_chosen` falls in the log while `accuracy` rises), and what they lose goes to
answers that nobody compared. So a loss of imitation, −log p per token, is added for the best of a prompt's
answers (Pang et al. 2024, arXiv 2404.19733, eq. 1). Only for the best: in a ranking of K answers the second
worst wins a pair too. The logged "loss" includes this term; `--nll_coef 0` is DPO on its own, which is also
what `--loss ipo` and `hinge` start from, as in their papers.

Preference data and reference both stay as they are, so the reference's log-probabilities are computed once,
before training. Rankings of K answers count as all their pairs, each answer read once. The mean is over all
pairs, for each is one observed comparison.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import loading
from data.answers import look, warnings
from data.batches import batches, encode_comparisons
from data.loading import WORLD
from data.tokenizer import Tokenizer
from runtime.compute import Meter, pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run

LOSSES = ("sigmoid", "ipo", "hinge")


@dataclass
class Config(Training):
    out: str = flag("out/dpo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    data: str = flag(WORLD, "preferences: a folder of the world\'s, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    loss: str = flag("sigmoid", "sigmoid is DPO's own", choices=LOSSES)
    beta: float = flag(None, "β, the KL penalty: the smaller, the farther from the reference; none is 1 with "
                       "the sigmoid alone, 0.5 with imitation beside it or another loss", 1e-6)
    label_smoothing: float = flag(0.0, "share of pairs assumed to be swapped (cDPO; sigmoid)", 0, 0.499)
    nll_coef: float = flag(None, "weight of −log p per token of the chosen answer, in pairs where it is its "
                           "prompt's best; none is 2 with sigmoid, 0 with the other losses", 0)
    length_normalize: bool = flag(False, "compare log-probabilities per token, so that length decides "
                                  "less; β must then be larger, by about an answer's length")
    max_new_tokens: int = flag(48, "longest answer that is sampled", 1)
    looks: int = flag(10, "times to look at what the policy does, on sampled answers; 0 never looks", 0)
    records: int = flag(0, "preferences to learn from, the first of the file; 0 takes all", 0)
    epochs: int = flag(1, "passes over the preferences", 1)
    batch: int = flag(8, "prompts per optimiser step, each with all its answers", 1)
    lr: float = flag(5e-4, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))

    def __post_init__(self):
        if self.nll_coef is None:
            self.nll_coef = 2.0 if self.loss == "sigmoid" else 0.0
        if self.beta is None:               # without imitation more must hold answers together: see look()
            self.beta = 1.0 if self.loss == "sigmoid" and self.nll_coef == 0 else 0.5


# ----------------------------------------------------------------------------------------- the loss

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss="sigmoid",
             label_smoothing=0.0):
    """The loss of B pairs from the log-probabilities of whole answers (or from their means per token), all
    (B,), in nats.

    With h = (log π − log π_ref)(y⁺) − (log π − log π_ref)(y⁻), how much more than the reference the policy
    prefers y⁺ to y⁻, and ε = label_smoothing:

        sigmoid   −(1 − ε)·log σ(βh) − ε·log σ(−βh)    Rafailov et al. 2023, eq. 7; ε: cDPO (Mitchell 2023)
        ipo       (h − 1/(2β))²                        Azar et al. 2023, eq. 17
        hinge     max(0, 1 − βh)                       SLiC (Zhao et al. 2023)

    The best βh is the log-odds of y⁺ winning. Each pair is here once, as if y⁺ always won: then −log σ(βh)
    has no minimum, and h grows for as long as one trains. Three remedies: ε says that some labels are wrong,
    and the best βh is log((1 − ε)/ε); IPO asks for one h, and punishes more as well as less; the hinge has no
    gradient beyond βh = 1.

    Returns losses (B,), and without a graph the implicit rewards β·log(π/π_ref) of chosen and rejected, each
    (B,). Gradients never reach the reference, even if its numbers come with a graph."""
    chosen_logratios = policy_chosen - ref_chosen.detach()
    rejected_logratios = policy_rejected - ref_rejected.detach()
    h = chosen_logratios - rejected_logratios
    if loss == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        raise ValueError(f"dpo_loss: loss must be one of {LOSSES}, not {loss!r}")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


# -------------------------------------------------------------------------------------- comparisons

def answer_logprobs(model, run, comparisons):
    """log p(answer | prompt), the sum over its tokens, of each answer of B Comparisons, and the number of
    these tokens: both (B, K), 0 where a prompt has fewer than K answers."""
    sequences = [ids for c in comparisons for ids in c.sequences]
    starts = torch.tensor([c.start for c in comparisons for _ in c.sequences])
    ends = torch.tensor([len(ids) for ids in sequences])
    tokens = pad(sequences)
    column = torch.arange(tokens.shape[1])
    # The prompt is given, not chosen by the policy: its likelihood says nothing about preferences.
    mask = (column >= starts[:, None]) & (column < ends[:, None])
    found = model.logprobs(tokens.to(run.device), mask.to(run.device)).sum(1)    # the answers of all prompts
    present = pad([c.ranks for c in comparisons]).to(run.device) > 0             # ranks start at 1, pad is 0
    zeros = torch.zeros(present.shape, dtype=found.dtype, device=run.device)
    return zeros.masked_scatter(present, found), zeros.masked_scatter(present, mask.sum(1).to(zeros))


def add_reference(model, run, comparisons):
    """Fill in Comparison.ref_logprobs."""
    found = run.map(lambda rows: {"logprobs": answer_logprobs(model, run, rows)[0]}, comparisons)
    for c, logprobs in zip(comparisons, found["logprobs"].tolist()):
        c.ref_logprobs = logprobs[:len(c.sequences)]


def pair_loss(model, run, comparisons):
    """The mean loss over all pairs of some Comparisons, and what a person watches: {name: mean over them}."""
    cfg = run.cfg
    logprobs, tokens = answer_logprobs(model, run, comparisons)
    ref_logprobs = pad([c.ref_logprobs for c in comparisons]).to(logprobs)
    pairs = [(b, chosen, rejected) for b, c in enumerate(comparisons) for chosen, rejected in c.pairs]
    b, chosen, rejected = torch.tensor(pairs, device=run.device).T      # indices into (B, K), one per pair
    is_best = torch.tensor([i in comparisons[b].best for b, i, _ in pairs], device=run.device)
    policy, reference = logprobs, ref_logprobs
    if cfg.length_normalize:
        policy, reference = (x / tokens.clamp(min=1) for x in (logprobs, ref_logprobs))

    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy[b, chosen], policy[b, rejected], reference[b, chosen], reference[b, rejected],
        cfg.beta, cfg.loss, cfg.label_smoothing)
    swapped, _, _ = dpo_loss(
        policy[b, rejected], policy[b, chosen], reference[b, rejected], reference[b, chosen],
        cfg.beta, cfg.loss, cfg.label_smoothing)
    # A soft label says how likely it is right: the loss is its mean over both labels.
    p = torch.tensor([comparisons[b].probability for b, _, _ in pairs]).to(logprobs)
    losses = p * losses + (1 - p) * swapped
    nll = -logprobs[b, chosen] / tokens[b, chosen]                      # per token, as in SFT
    losses = losses + cfg.nll_coef * torch.where(is_best, nll, 0)
    return losses.mean(), {
        "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
        "margin": (chosen_rewards - rejected_rewards).mean(),
        "reward_chosen": chosen_rewards.mean(), "reward_rejected": rejected_rewards.mean(),
        "logp_chosen": logprobs[b, chosen].mean(), "logp_rejected": logprobs[b, rejected].mean()}


@torch.no_grad()
def evaluate(model, run, comparisons):
    """{name: mean over all pairs of held-out Comparisons}."""
    stats = Meter()
    for some, share in run.micro_batches(comparisons, weights=[len(c.pairs) for c in comparisons]):
        loss, seen = pair_loss(model, run, some)
        stats.add(share, loss=loss, **seen)
    return stats.means()


# ----------------------------------------------------------------------------------------- the loop

def load_examples(cfg, tokenizer, block_size):
    """(Comparisons to learn from, held-out ones)."""
    preferences, unseen = loading.load("preferences", cfg.data, cfg.held_out, cfg.max_dropped)
    loading.warn_if_foreign(tokenizer, [p.prompt for p in preferences], cfg.data, cfg.init)
    if cfg.records > 0:
        preferences = preferences[:cfg.records]
    return (encode_comparisons(tokenizer, preferences, block_size, "preferences", cfg.max_dropped),
            encode_comparisons(tokenizer, unseen, block_size, "held-out preferences"))


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    model = load(cfg.init, "lm", tokenizer.vocab_size)
    examples, held_out = load_examples(cfg, tokenizer, model.config.block_size)
    prompts = [c.sequences[0][:c.start] for c in held_out[:32]]                         # to look at
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run, reference = Run(cfg, steps), model             # which it is until the first step, or a resume
    if cfg.looks > 0:                                   # sampled answers will need it later
        reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    run.place(*dict.fromkeys((model, reference)))
    add_reference(reference, run, examples + held_out)
    optimizer = make_optimizer(model, cfg.lr)
    run.resume(model=model, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, seen = pair_loss(model, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss, **seen)
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        metrics |= {"grad_norm": norm, "lr": lr}
        if cfg.looks > 0 and (run.step + 1) % max(1, steps // cfg.looks) == 0:
            seen = look(run, model, reference, tokenizer, prompts, cfg.max_new_tokens)
            run.warn(warnings(seen))
            metrics |= seen
        run.log(metrics)
    found = evaluate(model, run, held_out)
    print("held out:  " + "  ".join(f"{name} {x:.3f}" for name, x in found.items()))
    run.finish(model, tokenizer, held_out=found)


if __name__ == "__main__":
    main(Config, train, __doc__)
