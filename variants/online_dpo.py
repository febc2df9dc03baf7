"""DPO on the policy's own answers, sampled and compared as it learns (Guo et al. 2024, arXiv 2402.04792).

    python -m variants.online_dpo    compared by the embedded world's annotators
    python -m variants.online_dpo --by out/reward_model    by a reward model, or a judge's folder

What is wrong with a policy's answers changes while it learns, and labels of others' answers cannot say it.
The prompts are those of the preference data, as many answers to each as there are in a record; the loss is
that of dpo.py.
"""
import math
from dataclasses import dataclass

import dpo
from data.answers import look, warnings
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
    by: str = flag("annotators", "who compares: annotators, or the folder of a reward model or a judge")


def fresh(run, model, tokenizer, rank, old):
    """The prompts of some Comparisons with as many answers of the policy as it is now, compared anew; where
    all of them tie, the old ones. rank: see feedback/collect.py."""
    k, prompts = len(old[0].sequences), [c.prompt for c in old]
    room = min(run.cfg.max_new_tokens, model.config.block_size - max(c.start for c in old))
    rows = [c.sequences[0][:c.start] for c in old for _ in range(k)]
    batch = run.sample(model, rows, run.seeds(len(rows)), room, stop_token=tokenizer.end)
    answers = as_answers(tokenizer, batch, k)
    found = [Comparison([c.sequences[0][:c.start] + a.ids for a in some], c.start, ranks)
             for c, some, ranks in zip(old, answers, rank(prompts, answers, run.rng))]
    return [c for c in found if c.pairs] or old


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    model = load(cfg.init, "lm", tokenizer.vocab_size)
    reference = load(cfg.init, "lm", tokenizer.vocab_size).requires_grad_(False)
    examples, held_out = dpo.load_examples(cfg, tokenizer, model.config.block_size)
    prompts = [c.sequences[0][:c.start] for c in held_out[:32]]                         # to look at
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(model, reference)
    rank = labeller(cfg.by, run, tokenizer)
    dpo.add_reference(reference, run, held_out)
    optimizer = make_optimizer(model, cfg.lr)
    run.resume(model=model, optimizer=optimizer)
    for batch in batches([max(c.lengths) for c in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = fresh(run, model, tokenizer, rank, [examples[i] for i in batch]), Meter()
        dpo.add_reference(reference, run, rows)
        for some, share in run.micro_batches(rows, weights=[len(c.pairs) for c in rows]):
            loss, seen = dpo.pair_loss(model, run, some)
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
    run.finish(model, tokenizer, held_out=dpo.evaluate(model, run, held_out))


if __name__ == "__main__":
    main(Config, train, __doc__)
