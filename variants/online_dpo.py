"""Online DPO (Guo et al. 2024, arXiv 2402.04792): DPO on the policy's own answers, ranked during training.

    python -m variants.online_dpo                          ranked by the embedded world's annotators
    python -m variants.online_dpo --by out/reward_model    ranked by a reward model, or by a chat model

Labels of other answers say little about the errors of the current policy. So in each step it answers prompts
of the preference data anew. Every prompt gets as many answers as the batch's first record. The loss is DPO's.
"""
import math
from dataclasses import dataclass

import dpo
from data.answers import answer_metrics
from data.batches import Comparison, batches
from data.tokenizer import Tokenizer
from feedback.collect import as_answers, labeller
from runtime.compute import Meter
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run


@dataclass
class Config(dpo.Config):
    out: str = flag("out/online_dpo", "folder that the run writes")
    by: str = flag("annotators", "who ranks: annotators, or the folder of a reward model or of a chat model")
    constitution: str = flag("", "file of a chat model's principles; none is feedback/principles.txt")
    max_new_tokens: int = flag(48, "longest sampled answer, in tokens", 1)


def fresh_comparisons(run, policy, tokenizer, rank, old):
    """Sample k answers of the policy to each prompt of the `old` Comparisons, and rank them. Returns the new
    Comparisons, except where all k tie, and {metric: mean over the answers}. rank: see collect.labeller."""
    k, prompts = len(old[0].sequences), [c.prompt for c in old]
    prompt_ids = [c.sequences[0][:c.start] for c in old for _ in range(k)]
    room = min(run.cfg.max_new_tokens, policy.config.block_size - max(map(len, prompt_ids)))
    batch = run.sample(policy, prompt_ids, run.seeds(len(prompt_ids)), room, stop_token=tokenizer.end)
    answers = as_answers(tokenizer, batch, k)
    ranks = rank(prompts, answers, run.rng)
    fresh = [Comparison([ids + a.ids for a in replies], c.start, places)
             for c, ids, replies, places in zip(old, prompt_ids[::k], answers, ranks)]
    asked, texts = zip(*[(prompt, a.text) for prompt, replies in zip(prompts, answers) for a in replies])
    return [c for c in fresh if c.pairs], answer_metrics(batch, asked, texts)


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    examples, held_out = dpo.load_examples(cfg, tokenizer, policy.config.block_size)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(policy, reference=reference)
    rank = labeller(cfg.by, run, tokenizer, cfg.constitution)
    dpo.add_reference(reference, run, held_out)
    optimizer = make_optimizer(policy, cfg.lr)
    run.resume(model=policy, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        old, stats = [examples[i] for i in batch], Meter()
        fresh, sampled = fresh_comparisons(run, policy, tokenizer, rank, old)
        run.warn_if(sampled["ended"] < 0.95, "some answers do not end: lower --lr or raise --beta")
        run.warn_if(not fresh, "for every prompt of a batch all fresh answers tie: its old answers are used")
        rows = fresh or old
        dpo.add_reference(reference, run, rows)     # kept in memory, because each step has new answers
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, metrics = dpo.pair_loss(policy, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss, **metrics)
        metrics = stats.means()
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, metrics["loss"], f"preferences {batch}")
        run.log(metrics | {"grad_norm": norm, "lr": lr, **sampled})
    run.finish(policy, tokenizer, held_out=dpo.evaluate(policy, run, held_out))


if __name__ == "__main__":
    main(Config, train, __doc__)
