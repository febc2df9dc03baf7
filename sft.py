"""Stage 1, supervised fine-tuning: imitate demonstrations.

    python sft.py                                       the embedded world, a small GPT from nothing
    python sft.py --data my.jsonl --init out/other      go on from a checkpoint, on your own conversations

The loss is that of any language model, −log p(next token), on what the assistant says and nothing else: every
assistant turn of a conversation with the <|im_end|> that closes it, never the user's words. The model reads
those, but need not learn to say them. And it must learn to emit <|im_end|>, or no answer would ever end.

What comes out answers fluently, and as well as the average demonstration: maximum likelihood copies the
people who answer badly as faithfully as those who answer well. To prefer the good answers is the work of the
later stages.
"""
import math
from dataclasses import dataclass

import torch

from data import loading
from data.batches import batches, encode_demonstrations
from data.loading import WORLD
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.compute import Meter, pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run


@dataclass
class Config(Training):
    out: str = flag("out/sft", "folder that the run writes")
    data: str = flag(WORLD, "demonstrations: a folder of the world\'s, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out demonstrations; none holds out every tenth record")
    init: str = flag("", "checkpoint to start from; none starts a new model of the shape below")
    tokenizer: str = flag("", "of a new model: gpt2, or a folder; none takes the world's there, else gpt2")
    n_layer: int = flag(4, "layers of a new model", 1)
    n_head: int = flag(3, "attention heads of a new model", 1)
    n_embd: int = flag(96, "width of a new model", 1)
    block_size: int = flag(128, "longest sequence of a new model, in tokens", 8)
    epochs: int = flag(1, "passes over the demonstrations", 1)
    batch: int = flag(8, "conversations per optimiser step", 1)
    lr: float = flag(2e-3, "peak learning rate", 0)
    warmup: int = flag(20, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    evals: int = flag(4, "times to measure the held-out loss and print samples", 1)

    def __post_init__(self):
        GPTConfig(n_head=self.n_head, n_embd=self.n_embd)       # ValueError if heads do not divide the width
        if self.lora_rank > 0 and not self.init:
            raise ValueError("--lora_rank trains beside a checkpoint's weights: name one with --init")


# ----------------------------------------------------------------------------------------- the loss

def sft_loss(logprobs, mask):
    """−mean log p over the tokens to learn: logprobs (B, T) in nats, mask (B, T) bool; a scalar.

    The mean is over tokens, not over rows: averaged per row first, a token of a short answer would count more
    than one of a long answer, and the loss would no longer be the cross-entropy of the text."""
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


def demonstrations_loss(model, run, demonstrations):
    """sft_loss of some Demonstrations."""
    tokens = pad([d.ids for d in demonstrations]).to(run.device)
    mask = pad([d.learn for d in demonstrations]).to(run.device)
    return sft_loss(model.logprobs(tokens, mask), mask)


@torch.no_grad()
def evaluate(model, run, demonstrations):
    """sft_loss over all tokens to learn of held-out Demonstrations, in nats."""
    stats = Meter()
    for some, share in run.micro_batches(demonstrations, weights=[sum(d.learn) for d in demonstrations]):
        stats.add(share, loss=demonstrations_loss(model, run, some))
    return stats.means()["loss"]


# ----------------------------------------------------------------------------------------- the loop

def show_samples(model, tokenizer, run, conversations, first, n=3):
    """Print the model's own answers to the last question of n conversations, from number `first` on."""
    for number in range(first, first + n):
        messages = conversations[number % len(conversations)]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        if last == 0:                                           # it speaks before anybody has asked
            continue
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
        tokenizer = Tokenizer.load(cfg.init, cfg.system)
        return load(cfg.init, "lm", tokenizer.vocab_size), tokenizer
    tokenizer = loading.load_tokenizer(cfg.tokenizer, cfg.data, cfg.system)
    rounded = 64 * math.ceil(tokenizer.vocab_size / 64)         # matrix products are faster at round numbers
    config = GPTConfig(vocab_size=rounded, block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
                       n_embd=cfg.n_embd, mlp="gelu")           # on a CPU GPT-2's approximation is slow
    return GPT(config), tokenizer


def train(cfg):
    conversations, held_out_conversations = loading.load("demonstrations", cfg.data, cfg.held_out,
                                                         cfg.max_dropped)
    model, tokenizer = start(cfg)
    loading.warn_if_foreign(tokenizer, conversations, cfg.data, cfg.init)
    block_size = model.config.block_size
    examples = encode_demonstrations(tokenizer, conversations, block_size, "demonstrations",
                                     cfg.max_dropped)
    held_out = encode_demonstrations(tokenizer, held_out_conversations, block_size, "held-out demonstrations")
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)

    run = Run(cfg, steps)
    run.place(model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, learnt = sum(len(d.ids) for d in examples), sum(sum(d.learn) for d in examples)
    print(f"{parameters:,} parameters to train, {len(examples)} demonstrations, "
          f"{learnt:,} tokens to learn of {tokens:,}")
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)
    every = max(1, steps // cfg.evals)
    for batch in batches([len(d.ids) for d in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()
        # A row weighs as much as it has tokens to learn, so that the mean over rows is that over all tokens.
        for some, share in run.micro_batches(rows, weights=[sum(d.learn) for d in rows]):
            loss = demonstrations_loss(model, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss)
        loss = stats.means()["loss"]
        lr = cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, loss, f"demonstrations {batch}")
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr}
        look = (run.step + 1) % every == 0 and run.step + every < steps
        if look:
            held_out_loss = evaluate(model, run, held_out)
            metrics |= {"held_out_loss": held_out_loss, "perplexity": math.exp(held_out_loss)}
        run.log(metrics, show=True if look else None)
        if look:
            show_samples(model, tokenizer, run, held_out_conversations, first=run.step)
    held_out_loss = evaluate(model, run, held_out)
    print(f"held out:  loss {held_out_loss:.3f}  perplexity {math.exp(held_out_loss):.2f}")
    show_samples(model, tokenizer, run, held_out_conversations, first=0)
    run.finish(model, tokenizer, held_out_loss=held_out_loss)


if __name__ == "__main__":
    main(Config, train, __doc__)
