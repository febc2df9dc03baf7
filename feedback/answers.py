"""Answers that a model samples to prompts, to be ranked by somebody."""
import math
from dataclasses import dataclass

from data import loading
from data.batches import fit_prompts
from data.tokenizer import Tokenizer
from runtime.compute import row_seeds
from runtime.flags import Settings, flag
from runtime.models import load


@dataclass
class Sampling(Settings):
    """The flags of a script in which a model answers prompts."""
    model: str = flag("out/sft", "model that answers")
    data: str = flag(loading.WORLD, "prompts: a file, or a folder of the world's files")
    prompts: int = flag(1000, "prompts drawn at random", 1)
    answers: int = flag(4, "answers sampled to each prompt; equal ones count once", 2, 9)
    temperature: float = flag(1.0, "sampling temperature; 0 is greedy", 0)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)


@dataclass
class Answer:
    text: str
    ids: list           # with the end token, if the answer has one
    ended: bool         # whether it has


def as_answers(batch, tokenizer, k):
    """A batch of Compute.sample with k rows for each prompt: for each prompt a list of k Answers."""
    ids = [tokens[mask].tolist() for tokens, mask in zip(batch["tokens"], batch["mask"])]
    answers = [Answer(tokenizer.decode(x), x, ended) for x, ended in zip(ids, batch["ended"].tolist())]
    return [answers[i:i + k] for i in range(0, len(answers), k)]


def answer_prompts(cfg, run, rng):
    """What cfg.model answers to cfg.prompts prompts, all of which are drawn once before any comes again.

    cfg: Sampling; run: Compute; rng: random.Random. Returns (prompt, Answers) of each prompt to which there
    are at least two different answers. Raises ValueError if there is none."""
    tokenizer = Tokenizer.load(cfg.model)
    model = load(cfg.model, vocab_size=tokenizer.vocab_size).requires_grad_(False)
    if model.head_kind != "lm":
        raise ValueError(f"{cfg.model} is a reward model: it gives scores, not answers")
    run.place(model)
    prompts, _ = loading.load("prompts", cfg.data, "", cfg.max_dropped)
    room = model.config.block_size - cfg.max_new_tokens
    prompts = fit_prompts(tokenizer, prompts, room, "prompts", cfg.max_dropped)
    times = math.ceil(cfg.prompts / len(prompts))
    drawn = [p for _ in range(times) for p in rng.sample(prompts, len(prompts))][:cfg.prompts]
    print(f"{cfg.model} answers {len(drawn)} prompts {cfg.answers} times ...", flush=True)
    rows = [tokenizer.prompt(p) for p in drawn for _ in range(cfg.answers)]
    batch = run.sample(model, rows, row_seeds(rng, len(rows)), cfg.max_new_tokens,
                       temperature=cfg.temperature, stop_token=tokenizer.end)
    different = [list({a.text: a for a in some if a.text.strip()}.values())
                 for some in as_answers(batch, tokenizer, cfg.answers)]
    found = [(prompt, some) for prompt, some in zip(drawn, different) if len(some) > 1]
    if not found:
        raise ValueError("no prompt got two different answers: a higher --temperature may give some")
    return found
