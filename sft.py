"""Stage 1, supervised fine-tuning: imitate demonstrations.

    python sft.py                                             the embedded world, a small GPT from nothing
    python sft.py --data my.jsonl --init out/other            go on from a checkpoint, on your own conversations

The loss is that of any language model, −log p(next token), on what the assistant says and nothing else: every
assistant turn of a conversation with the <|im_end|> that closes it, never the user's words. The model reads
those, but need not learn to say them. And it must learn to emit <|im_end|>, or no answer would ever end.

What comes out answers fluently, and as well as the average demonstration: maximum likelihood copies the
people who answer badly as faithfully as those who answer well. To prefer the good answers is the work of the
later stages. """
import math
from dataclasses import dataclass

import torch

from data import loading
from data.batches import batches, fit
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.compute import pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load, require
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run


@dataclass
class Config(Training):
    out: str = flag("out/sft", "folder that the run writes")
    data: str = flag("world", "demonstrations: world, or a file (.json, .jsonl, .jsonl.gz)")
    held_out: str = flag("", "file of held-out demonstrations; none holds out every tenth record")
    init: str = flag("", "checkpoint to start from; none starts a new model of the shape below")
    tokenizer: str = flag("", "of a new model: gpt2, or a folder; none takes the world's for the world, else gpt2")
    n_layer: int = flag(4, "layers of a new model", 1)
    n_head: int = flag(3, "attention heads of a new model", 1)
    n_embd: int = flag(96, "width of a new model", 1)
    block_size: int = flag(128, "longest sequence of a new model, in tokens", 8)
    epochs: int = flag(1, "passes over the demonstrations", 1)
    batch: int = flag(16, "conversations per optimiser step", 1)
    lr: float = flag(3e-3, "peak learning rate", 0)
    warmup: int = flag(20, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    evals: int = flag(4, "times to measure the held-out loss and print samples", 1)

    def __post_init__(self):
        GPTConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)     # refuses what does not divide


# ----------------------------------------------------------------------------------------- the loss

def sft_loss(logprobs, mask):
    """−mean log p over the tokens to learn: logprobs (B, T) in nats, mask (B, T) bool; a scalar.

    The mean is over tokens, not over rows: averaged per row first, a token of a short answer would count more
    than one of a long answer, and the loss would no longer be the cross-entropy of the text. """
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


@dataclass
class Demonstration:
    """A conversation as tokens."""
    ids: list               # all turns
    learn: list             # bools: true on what the assistant says


def encode(tokenizer, conversations, block_size, what):
    """Conversations (message lists) to those Demonstrations that fit into block_size tokens."""
    examples = [Demonstration(*tokenizer.chat(messages)) for messages in conversations]
    return fit(examples, lambda e: len(e.ids), block_size, what)


def mean_loss(mean, model, run, examples):
    """sft_loss over all tokens that some Demonstrations teach, in nats. mean: run.accumulate, which adds its
    gradient to the model's, or run.average, which only measures."""
    def loss(examples):
        tokens = pad([e.ids for e in examples]).to(run.device)
        mask = pad([e.learn for e in examples]).to(run.device)
        return {"loss": sft_loss(model.logprobs(tokens, mask), mask)}
    # A row weighs as much as it has tokens to learn: then a mean of means is the mean over all tokens.
    return mean(loss, examples, weights=[sum(e.learn) for e in examples], lengths=[len(e.ids) for e in examples])["loss"]


# ----------------------------------------------------------------------------------------- the loop

def show_samples(model, tokenizer, run, conversations, first, n=3):
    """Print the model's own answers to the last question of n conversations, from number `first` on."""
    for i in range(n):
        messages = conversations[(first + i) % len(conversations)]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = tokenizer.prompt(messages[:last])
        room = min(64, model.config.block_size - len(prompt))
        if room < 1:
            continue
        answer = run.sample(model, [prompt], run.seeds(1), room, stop_token=tokenizer.end)
        text = tokenizer.decode(answer["tokens"][answer["mask"]].tolist())
        print(f"    {messages[last - 1]['content'][:70]!r} -> {text[:200]!r}")


def start(cfg):
    """The model to train and its tokenizer: those of a checkpoint, or new ones."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        require(cfg.init, "sft")
        return load(cfg.init, head="lm"), Tokenizer.load(cfg.init)
    tokenizer = loading.load_tokenizer(cfg.tokenizer, cfg.data)
    padded = 64 * math.ceil(tokenizer.vocab_size / 64)          # matrix products like round numbers
    config = GPTConfig(vocab_size=padded, block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
                       n_embd=cfg.n_embd, mlp="gelu")  # three times as fast on a CPU as GPT-2's approximation
    return GPT(config), tokenizer


def train(cfg):
    demonstrations, held_out = loading.load("demonstrations", cfg.data, cfg.held_out)
    model, tokenizer = start(cfg)
    loading.warn_if_foreign(tokenizer, demonstrations, cfg.data, cfg.init)
    examples = encode(tokenizer, demonstrations, model.config.block_size, "demonstrations")
    held_out_examples = encode(tokenizer, held_out, model.config.block_size, "held-out demonstrations")
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(model)
    parameters, tokens = sum(p.numel() for p in model.parameters()), sum(len(e.ids) for e in examples)
    print(f"{parameters:,} parameters, {len(examples)} demonstrations, "
          f"{sum(sum(e.learn) for e in examples):,} tokens to learn of {tokens:,}")
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)
    every = max(1, steps // cfg.evals)
    for batch in batches([len(e.ids) for e in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        loss = mean_loss(run.accumulate, model, run, [examples[i] for i in batch])
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, loss, f"demonstrations {batch}")
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr}
        evaluate = (run.step + 1) % every == 0 and run.step + every < steps
        if evaluate:
            held = mean_loss(run.average, model, run, held_out_examples)
            metrics |= {"held_out_loss": held, "perplexity": math.exp(held)}
        run.log(metrics, show=evaluate or None)
        if evaluate:
            show_samples(model, tokenizer, run, held_out, first=run.step)
    held = mean_loss(run.average, model, run, held_out_examples)
    print(f"held out:  loss {held:.3f}  perplexity {math.exp(held):.2f}")
    show_samples(model, tokenizer, run, held_out, first=0)
    run.finish(model, tokenizer, held_out_loss=held)


if __name__ == "__main__":
    main(Config, train, __doc__)
