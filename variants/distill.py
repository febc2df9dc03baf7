"""On-policy distillation: a student learns from a teacher's probabilities for its own answers.

    python -m variants.distill --teacher out/ppo

SFT on a teacher's answers shows the student states that it may never reach. It does not show what to do after
the student's own mistakes. Here the student answers, and the teacher says of each token how likely it would
have been (Agarwal et al. 2023, arXiv 2306.13649). The change to variants/grpo.py: no reward model, no groups,
and an advantage for each token,

    A_t = log π_teacher − log π_old         of the token that was sampled

Its mean under π_old is −KL(π_old ‖ π_teacher) in this state, and at the first optimiser step the policy
gradient E[A·∇log π] is −∇KL(π ‖ π_teacher). For the gradient of Σ π·log(π/π_teacher) has two parts. One is
Σ ∇π·log(π/π_teacher), with ∇π = π·∇log π. The other is Σ π·∇log π = Σ ∇π, which is 0. In later steps of the
same rollout PPO's ratio and clip take over, as with any advantage.

This KL is large where the student says what the teacher never would; SFT on the teacher's answers lowers
KL(π_teacher ‖ π). Only the next token counts here, as with a discount γ of 0. MiniLLM (Gu et al. 2023, arXiv
2306.08543) also counts what follows from a token. A reward model gives one number per answer, a teacher one
per token.
"""
from dataclasses import dataclass

import ppo
from data.answers import answer_metrics, rollout_examples
from data.loading import WORLD, load_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Meter, select
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run


@dataclass
class Config(Training):
    out: str = flag("out/distill", "folder that the run writes")
    init: str = flag("out/sft", "the student: where the policy starts")
    teacher: str = flag("out/ppo", "the model that it learns from, with the same tokenizer")
    data: str = flag(WORLD, "prompts: a folder of the world's, or a file (.json, .jsonl)")
    steps: int = flag(40, "steps of rollout and update", 1)
    batch: int = flag(128, "answers per rollout", 2)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    temperature: float = flag(1.0, "of sampling, and of all log-probabilities", 0.01)
    epochs: int = flag(2, "passes over a rollout", 1)
    minibatches: int = flag(2, "optimiser steps per epoch", 1)
    lr: float = flag(1e-3, "peak learning rate", 0)
    warmup: int = flag(3, "steps of linear warm-up", 0)
    decay: str = flag("linear", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    clip: float = flag(0.2, "ε, the clip range of the ratio π/π_old", 0)


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    tokenizer.check_same(cfg.teacher)
    policy = load(cfg.init, "lm", tokenizer.vocab_size)
    teacher = load(cfg.teacher, "lm", tokenizer.vocab_size).requires_grad_(False)
    size = min(policy.config.block_size, teacher.config.block_size)
    prompts = load_prompts(cfg, tokenizer, size - cfg.max_new_tokens)
    run = Run(cfg, cfg.steps)
    run.place(policy, teacher)
    optimizer = make_optimizer(policy, cfg.lr, eps=1e-5)
    run.resume(policy=policy, optimizer=optimizer)
    run.show_answers(policy, tokenizer, prompts)
    while run.step < cfg.steps:
        asked = run.rng.choices(prompts, k=cfg.batch)
        answers, batch = ppo.rollout(run, tokenizer, asked, policy, teacher)
        gap = batch["ref_logprobs"] - batch["old_logprobs"]             # 0 outside the mask, as both are
        batch |= {"scores": gap.sum(1), "rewards": gap, "advantages": gap}
        lr = cfg.lr * schedule(run.step, cfg.steps, cfg.warmup, cfg.decay)
        history = []
        for rows in ppo.minibatches(cfg):
            minibatch, stats = select(batch, rows), Meter()
            for b, share in run.micro_batches(minibatch, weights=minibatch["mask"].sum(1)):
                logprobs = policy.logprobs(b["tokens"], b["mask"], cfg.temperature)
                loss, clip_fraction = ppo.policy_loss(logprobs, b["old_logprobs"], b["advantages"], b["mask"],
                                                      cfg.clip)
                (share * loss).backward()
                stats.add(share, policy_loss=loss, clip_fraction=clip_fraction,
                          approx_kl=ppo.approximate_kl(logprobs, b["old_logprobs"], b["mask"]))
            history.append(stats.means())
            run.optimizer_step(optimizer, lr, history[-1]["policy_loss"], f"rows {rows.tolist()}")
        run.write_examples("rollout", rollout_examples(tokenizer, asked, batch))
        run.log({"kl_to_teacher": -gap.sum(1).mean(), **answer_metrics(batch, asked, answers),
                 **{name: sum(m[name] for m in history) / len(history) for name in history[0]}})
    run.show_answers(policy, tokenizer, prompts)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
