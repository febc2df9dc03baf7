"""Direct preference optimisation (DPO): one loss in place of the reward model and PPO.

    python dpo.py                                           from out/sft, on the embedded world's rankings
    python dpo.py --loss ipo --beta 0.2 --out out/ipo

PPO maximises E[r] − β·KL(π ‖ π_ref): a high reward r, at a small distance from a reference, the SFT model.
The best policy is known in closed form: π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x), where Z(x) makes the
probabilities of all answers y to the prompt x add up to 1. Solved for r, this says for which reward any given
policy π would be the best one:

    r(x, y) = β·log(π(y|x)/π_ref(y|x)) + β·log Z(x)

Z(x) is a sum over all answers, which nobody can compute. But Bradley & Terry's probability of a comparison,
P(y⁺ preferred to y⁻) = σ(r(x, y⁺) − r(x, y⁻)), contains only the difference of two rewards for one prompt:
β·log Z(x) cancels, and P follows from log π and log π_ref. `dpo_loss` is −log P (Rafailov et al. 2023). No
samples, no critic and no reward network are needed.

With a small β, large log-ratios log(π/π_ref) are needed to fit the preferences, and the policy goes far from
the reference; with a large β it stays near. At the first step π = π_ref, each pair has probability ½, and
−log P is log 2, the loss of a coin toss (IPO starts at 1/(4β²), the hinge at 1). A pair's loss is large where
the policy prefers y⁻ by much. A mean above log 2 on held-out pairs shows that it is confident and wrong.

The loss depends on differences alone. It also falls when both answers of a pair become less likely, as long
as the rejected one loses more: `logp_chosen` falls while `accuracy` rises, and the probability moves to
answers that nobody has compared. Against this, --nll_coef adds −log p per token of the chosen answer, as in
SFT, to each pair whose chosen answer is its prompt's best (Pang et al. 2024, eq. 1), and not to others: in a
ranking even the second worst answer is the chosen one of a pair. The logged loss includes this term.

Neither the preferences nor the reference changes. So the reference's log-probabilities are computed once,
before the first step, when the policy still is the reference: a second network is never in memory.
"""
import math
from dataclasses import dataclass

import torch
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
from runtime.terminal import print_numbers


@dataclass
class Config(Training):
    out: str = flag("out/dpo", "folder that the run writes")
    init: str = flag("out/sft", "SFT checkpoint: where the policy starts, and its reference")
    data: str = flag(loading.WORLD, "preferences: a folder of the world's, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out preferences; none holds out every tenth record")
    loss: str = flag("sigmoid", "loss of a pair; DPO has the sigmoid", choices=("sigmoid", "ipo", "hinge"))
    beta: float = flag(0.25, "β, the weight of the KL penalty, usually 0.05 to 1", 1e-6)
    label_smoothing: float = flag(0.0, "assumed probability that a label is wrong", 0, 0.499)
    nll_coef: float = flag(0.0, "weight of −log p per token of best answers", 0)
    length_normalize: bool = flag(False, "compare log-probabilities per token; h is then smaller by about "
                                  "an answer's length, so β must be larger by it")
    epochs: int = flag(1, "passes over the preferences", 1)
    batch: int = flag(16, "prompts per optimiser step, each with all its answers", 1)
    lr: float = flag(1e-3, "peak learning rate", 0)
    warmup: int = flag(10, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss="sigmoid",
             label_smoothing=0.0):
    """The loss of B pairs, from the log-probabilities of whole answers (or their means per token), all (B,),
    in nats. h = log(π/π_ref)(y⁺) − log(π/π_ref)(y⁻) says how much more than the reference the policy prefers
    y⁺ to y⁻. The loss of a pair is f(h):

        sigmoid   −log σ(βh)           Rafailov et al. 2023, eq. 7
        ipo       (h − 1/(2β))²        Azar et al. 2023, eq. 17
        hinge     max(0, 1 − βh)       SLiC (Zhao et al. 2023)

    label_smoothing, a number or (B,), is the probability ε that a label is wrong. The loss is then its
    expectation, (1 − ε)·f(h) + ε·f(−h); with the sigmoid this is cDPO (Mitchell 2023).

    If a pair's label is always the same, −log σ(βh) has no minimum, and h grows without bound. Against this,
    ε > 0 puts the sigmoid's minimum at βh = log((1 − ε)/ε), IPO has its minimum at h = 1/(2β), and the hinge
    has no gradient beyond βh = 1.

    Returns losses (B,), and the implicit rewards β·log(π/π_ref) of chosen and rejected, each (B,), detached.
    The reference's log-probabilities are detached too."""
    chosen_logratios = policy_chosen - ref_chosen.detach()
    rejected_logratios = policy_rejected - ref_rejected.detach()
    h = chosen_logratios - rejected_logratios
    if loss == "sigmoid":
        right = -torch.nn.functional.logsigmoid(beta * h)
        wrong = -torch.nn.functional.logsigmoid(-beta * h)
    elif loss == "ipo":
        right, wrong = (h - 1 / (2 * beta)) ** 2, (-h - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        right, wrong = torch.relu(1 - beta * h), torch.relu(1 + beta * h)
    else:
        raise ValueError(f"dpo_loss: loss must be sigmoid, ipo or hinge, not {loss!r}")
    losses = (1 - label_smoothing) * right + label_smoothing * wrong
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def answer_logprobs(model, run, comparisons):
    """log p(answer | prompt) of all N answers of some Comparisons, one after another, and the number of their
    tokens: both (N,). The prompt's tokens would cancel in h, for both answers of a pair have the same."""
    starts = [c.start for c in comparisons for _ in c.sequences]
    batch = run.batch([ids for c in comparisons for ids in c.sequences], starts)
    return model.logprobs(batch["tokens"], batch["mask"]).sum(1), batch["mask"].sum(1)


def add_reference(reference, run, comparisons):
    """Set the ref_logprobs of each Comparison, in place."""
    def read(rows):
        logprobs, _ = answer_logprobs(reference, run, rows)
        return {"logprobs": pad_sequence(logprobs.split([len(c.sequences) for c in rows]), batch_first=True)}
    for c, logprobs in zip(comparisons, run.map(read, comparisons)["logprobs"].tolist()):
        c.ref_logprobs = logprobs[:len(c.sequences)]


def pair_loss(model, run, comparisons):
    """The mean loss over all pairs of some Comparisons, and {metric: mean over the pairs}. All pairs count
    alike, as in the paper; in reward_model.ranking_loss all prompts do, as in its paper."""
    cfg, pairs, first = run.cfg, [], 0
    for c in comparisons:
        pairs += [(first + i, first + j, c.probability, i in c.best) for i, j in c.pairs]
        first += len(c.sequences)
    chosen, rejected, probability, is_best = (torch.tensor(x, device=run.device) for x in zip(*pairs))

    logprobs, tokens = answer_logprobs(model, run, comparisons)
    policy, reference = logprobs, torch.tensor([x for c in comparisons for x in c.ref_logprobs]).to(logprobs)
    if cfg.length_normalize:
        policy, reference = policy / tokens, reference / tokens
    # A label is wrong if exactly one of two things happens: it was wrong (1 − p), or smoothing swaps it.
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
    return (encode_comparisons(tokenizer, preferences, block_size, "preferences"),
            encode_comparisons(tokenizer, held_out, block_size, "held-out preferences"))


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    examples, held_out = load_examples(cfg, tokenizer, policy.config.block_size)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(policy)
    add_reference(policy, run, examples + held_out)     # before run.resume: the policy still is the reference
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
    print_numbers("held out:", metrics)
    run.finish(policy, tokenizer, held_out=metrics)


if __name__ == "__main__":
    main(Config, train, __doc__)
