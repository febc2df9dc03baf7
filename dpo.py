"""Direct preference optimisation (DPO): the reward model and PPO in one loss.

    python dpo.py                                           from out/sft, on the embedded world's rankings
    python dpo.py --loss ipo --beta 0.2 --out out/ipo

PPO looks for the policy π that maximises E[r] − β·KL(π ‖ π_ref): the reward r, without going far from a
reference, the SFT model. The solution is known: π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x), where Z(x) makes
the probabilities of all answers y to the prompt x add up to 1. Solved for r, the equation says for which
reward a given policy π is the solution:

    r(x, y) = β·log(π(y|x)/π_ref(y|x)) + β·log Z(x)

Z(x) is a sum over all answers, which nobody can compute. But Bradley & Terry's probability of a comparison,
P(y⁺ preferred to y⁻) = σ(r(x, y⁺) − r(x, y⁻)), holds only a difference of rewards for one prompt: β·log Z(x)
cancels, and the policy's own log-probabilities give this probability. `dpo_loss` is −log of it (Rafailov et
al. 2023). No samples, no critic and no reward network are needed.

A small β needs large log-ratios log(π/π_ref) to fit the preferences, so the policy goes far from the
reference; with a large β it stays near. At the first step π = π_ref, each pair has probability ½, and the
loss is log 2. A larger loss on held-out pairs means that the policy is more confident than it is right.

The loss sees only differences. It also falls when both answers of a pair become less likely, the rejected
one more so: `logp_chosen` falls while `accuracy` rises, and the probability goes to answers that nobody has
compared. Against this, --nll_coef adds the SFT loss −log p per token on the best answer of each prompt (Pang
et al. 2024, eq. 1); not on every chosen one, because in a ranking of K answers the second worst wins a pair
too. The logged loss includes it.

Neither the preferences nor the reference change. So the reference's log-probabilities are computed once,
before the first step, when the policy still is the reference: a second network is never in memory.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import loading
from data.batches import batches, encode_comparisons
from data.tokenizer import Tokenizer
from runtime.compute import Meter
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run


@dataclass
class Config(Training):
    out: str = flag("out/dpo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    data: str = flag(loading.WORLD, "preferences: a folder of the world's, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    loss: str = flag("sigmoid", "sigmoid is DPO's own", choices=("sigmoid", "ipo", "hinge"))
    beta: float = flag(0.5, "β, the weight of the KL penalty, usually 0.05 to 1", 1e-6)
    label_smoothing: float = flag(0.0, "share of pairs assumed to be labelled the wrong way round", 0, 0.499)
    nll_coef: float = flag(0.0, "weight of −log p per token of each prompt's best answer", 0)
    length_normalize: bool = flag(False, "compare log-probabilities per token; β must then be larger, by "
                                  "about an answer's length")
    epochs: int = flag(1, "passes over the preferences", 1)
    batch: int = flag(8, "prompts per optimiser step, each with all its answers", 1)
    lr: float = flag(5e-4, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss="sigmoid",
             label_smoothing=0.0):
    """The loss of B pairs, from the log-probabilities of whole answers (or their means per token), all (B,),
    in nats. With h = log(π/π_ref)(y⁺) − log(π/π_ref)(y⁻), by which the policy prefers y⁺ to y⁻ more than the
    reference does, a pair costs f(h):

        sigmoid   −log σ(βh)           Rafailov et al. 2023, eq. 7
        ipo       (h − 1/(2β))²        Azar et al. 2023, eq. 17
        hinge     max(0, 1 − βh)       SLiC (Zhao et al. 2023)

    label_smoothing, a number or (B,), is the probability ε that a label is wrong. A pair then costs the mean
    over both labels, (1 − ε)·f(h) + ε·f(−h); with the sigmoid this is cDPO (Mitchell 2023).

    Where y⁺ always wins, −log σ(βh) has no minimum, and h grows for as long as one trains. Against this, ε
    puts the minimum at βh = log((1 − ε)/ε), IPO asks for one h, and the hinge has no gradient beyond βh = 1.

    Returns losses (B,), and without a graph the implicit rewards β·log(π/π_ref) of chosen and rejected, each
    (B,). No gradient reaches the reference's numbers."""
    chosen_logratios = policy_chosen - ref_chosen.detach()
    rejected_logratios = policy_rejected - ref_rejected.detach()
    h = chosen_logratios - rejected_logratios
    if loss == "sigmoid":
        right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    elif loss == "ipo":
        right, wrong = (h - 1 / (2 * beta)) ** 2, (-h - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        right, wrong = torch.relu(1 - beta * h), torch.relu(1 + beta * h)
    else:
        raise ValueError(f"dpo_loss: loss must be sigmoid, ipo or hinge, not {loss!r}")
    losses = (1 - label_smoothing) * right + label_smoothing * wrong
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def answer_logprobs(model, run, comparisons):
    """log p(answer | prompt), summed over the answer's tokens, of all answers of some Comparisons, one after
    another; and the number of these tokens: both (N,). The prompt is given, not chosen by the policy, so its
    likelihood says nothing about preferences."""
    starts = [c.start for c in comparisons for _ in c.sequences]
    batch = run.batch([ids for c in comparisons for ids in c.sequences], starts)
    return model.logprobs(batch["tokens"], batch["mask"]).sum(1), batch["mask"].sum(1)


def add_reference(reference, run, comparisons):
    """Compute Comparison.ref_logprobs."""
    def read(rows):
        logprobs, _ = answer_logprobs(reference, run, rows)
        return {"logprobs": pad_sequence(logprobs.split([len(c.sequences) for c in rows]), batch_first=True)}
    for c, logprobs in zip(comparisons, run.map(read, comparisons)["logprobs"].tolist()):
        c.ref_logprobs = logprobs[:len(c.sequences)]


def pair_loss(model, run, comparisons):
    """The mean loss over all pairs of some Comparisons, and {metric: mean over the pairs}. All pairs count
    alike, because each is one observed comparison."""
    cfg, pairs, first = run.cfg, [], 0
    for c in comparisons:
        pairs += [(first + i, first + j, c.probability, i in c.best) for i, j in c.pairs]
        first += len(c.sequences)
    chosen, rejected, probability, is_best = (torch.tensor(x, device=run.device) for x in zip(*pairs))

    logprobs, tokens = answer_logprobs(model, run, comparisons)
    policy, reference = logprobs, torch.tensor([x for c in comparisons for x in c.ref_logprobs]).to(logprobs)
    if cfg.length_normalize:
        policy, reference = policy / tokens, reference / tokens
    # A soft label, right with this probability, and the smoothing make one probability of being wrong.
    p, smoothing = probability.to(logprobs), cfg.label_smoothing
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy[chosen], policy[rejected], reference[chosen], reference[rejected], cfg.beta, cfg.loss,
        p * smoothing + (1 - p) * (1 - smoothing))
    nll = -logprobs[chosen] / tokens[chosen]                            # per token, as in SFT
    losses = losses + cfg.nll_coef * torch.where(is_best, nll, 0)
    return losses.mean(), {
        "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
        "margin": (chosen_rewards - rejected_rewards).mean(),
        "reward_chosen": chosen_rewards.mean(), "reward_rejected": rejected_rewards.mean(),
        "logp_chosen": logprobs[chosen].mean(), "logp_rejected": logprobs[rejected].mean()}


@torch.no_grad()
def evaluate(model, run, comparisons):
    """{name: mean over all pairs of held-out Comparisons}."""
    stats = Meter()
    for some, share in run.micro_batches(comparisons, weights=[len(c.pairs) for c in comparisons]):
        loss, metrics = pair_loss(model, run, some)
        stats.add(share, loss=loss, **metrics)
    return stats.means()


def load_examples(cfg, tokenizer, block_size):
    """(Comparisons to train on, held-out Comparisons)."""
    preferences, held_out = loading.load("preferences", cfg.data, cfg.held_out, cfg.max_dropped)
    loading.warn_if_foreign(tokenizer, [p.prompt for p in preferences], cfg.data, cfg.init)
    return (encode_comparisons(tokenizer, preferences, block_size, "preferences", cfg.max_dropped),
            encode_comparisons(tokenizer, held_out, block_size, "held-out preferences"))


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    examples, held_out = load_examples(cfg, tokenizer, policy.config.block_size)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(policy)
    add_reference(policy, run, examples + held_out)     # before its first step the policy is the reference
    optimizer = make_optimizer(policy, cfg.lr)
    run.resume(model=policy, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, metrics = pair_loss(policy, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss, **metrics)
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        run.log(metrics | {"grad_norm": norm, "lr": lr})
    metrics = evaluate(policy, run, held_out)
    print("held out:  " + "  ".join(f"{name} {x:.3f}" for name, x in metrics.items()))
    run.finish(policy, tokenizer, held_out=metrics)


if __name__ == "__main__":
    main(Config, train, __doc__)
