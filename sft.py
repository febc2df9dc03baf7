"""Stage 1, supervised fine-tuning: imitate demonstrations.

    python sft.py                                             the embedded world, a small GPT from nothing
    python sft.py --data my.jsonl --init out/other            go on from a checkpoint on conversations of your own

The loss is that of any language model, −log p(next token), on what the assistant says and nothing else: every
assistant turn of a conversation with the <|im_end|> that closes it, never the user's words (which the model reads
but need not learn to say). What comes out answers fluently, and as well as the average demonstration: no better.
"""
import math
from dataclasses import dataclass

import torch

import parallel
import runtime
from data import loading
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from flags import Training, flag


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
    batch: int = flag(16, "conversations an optimiser step", 1)
    micro_batch: int = flag(16, "conversations a forward pass: lower it if memory runs out; the gradient is the same", 1)
    lr: float = flag(3e-3, "peak learning rate", 0)
    warmup: int = flag(20, "steps of linear warm-up", 0)
    decay: str = flag("cosine", "of the learning rate, to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    evals: int = flag(4, "times to measure the held-out loss and print samples", 1)

    def __post_init__(self):
        GPTConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)         # heads that do not divide the width


def sft_loss(logprobs, mask):
    """−mean log p over the tokens to learn: logprobs (B, T) in nats, mask (B, T) bool; a scalar."""
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


@torch.no_grad()
def held_out_loss(model, run, examples, batch):
    """Mean −log p per learnt token, in nats, over examples of (ids, learn)."""
    total = tokens = 0
    examples = sorted(examples, key=lambda e: len(e[0]))
    for rows, live in parallel.micro_batches(examples, batch):
        ids, learn = zip(*rows)
        mask = loading.pad(learn).to(run.device)
        with run.autocast():
            total -= live * model.logprobs(loading.pad(ids).to(run.device), mask).sum().item()
        tokens += live * mask.sum().item()
    return parallel.total(total) / parallel.total(tokens)


def show_samples(model, tokenizer, run, conversations, n=3):
    """Print the model's own answers to the last question of n conversations."""
    for messages in conversations[:n]:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = tokenizer.prompt(messages[:last])
        room = min(64, model.config.block_size - len(prompt))
        if room < 1:
            continue
        with parallel.gathered(model) as anyone:
            out = model.generate(torch.tensor([prompt], device=run.device), torch.tensor([len(prompt)], device=run.device),
                                 room, stop_token=tokenizer.end, anyone=anyone)
        print(f"    {messages[last - 1]['content'][:70]!r} -> {tokenizer.decode(out[0][0][out[1][0]].tolist())[:200]!r}")


def train(cfg):
    demonstrations, held_out = loading.load("demonstrations", cfg.data, cfg.held_out)
    torch.manual_seed(cfg.seed)                                 # before the weights of a new model are drawn
    if cfg.init:
        runtime.require(cfg.init, "sft")
        tokenizer, model = Tokenizer.load(cfg.init), parallel.load(cfg.init, head="lm")
    else:
        tokenizer = loading.load_tokenizer(cfg.tokenizer, cfg.data)
        model = GPT(GPTConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, block_size=cfg.block_size,
                              n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
                              mlp="gelu"))                      # three times as fast on a CPU as GPT-2's approximation
    size, length = model.config.block_size, lambda e: len(e[0])
    examples = loading.fit([tokenizer.chat(m) for m in demonstrations], length, size, "demonstrations")
    held_out_examples = loading.fit([tokenizer.chat(m) for m in held_out], length, size, "held-out demonstrations")

    steps = cfg.epochs * -(-len(examples) // cfg.batch)
    run = runtime.Run(cfg, steps)
    parallel.prepare(run, model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(examples)} demonstrations, "
          f"{sum(sum(learn) for _, learn in examples):,} tokens to learn of {sum(map(length, examples)):,}")
    optimizer = runtime.make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)
    for batch in loading.batches([len(ids) for ids, _ in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        total = sum(sum(examples[i][1]) for i in batch)         # tokens to learn in the whole optimiser step
        loss = places = 0
        for rows, live in parallel.micro_batches(batch, cfg.micro_batch, cfg.micro_tokens, lambda i: len(examples[i][0])):
            ids, learn = zip(*(examples[i] for i in rows))
            tokens, mask = loading.pad(ids).to(run.device), loading.pad(learn).to(run.device)
            with run.autocast():
                part = sft_loss(model.logprobs(tokens, mask), mask) * mask.sum() / total * live    # live: 0 for a filler
            part.backward()
            loss, places = loss + part.item(), places + tokens.numel() * live
        loss, places = parallel.total(loss), parallel.total(places)
        lr = cfg.lr * runtime.schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.descend(optimizer, lr, cfg.max_norm, loss, f"demonstrations {batch}")
        used = sum(len(examples[i][0]) for i in batch)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "padding": 1 - used / places}
        evaluate = (run.step + 1) % max(1, steps // cfg.evals) == 0 and steps - run.step > steps // cfg.evals
        if evaluate:
            held = held_out_loss(model, run, held_out_examples, cfg.micro_batch)
            metrics |= {"held_out_loss": held, "perplexity": math.exp(held)}
        run.log(metrics, show=evaluate or None)
        if evaluate:
            show_samples(model, tokenizer, run, held_out[run.step % 97:])
    held = held_out_loss(model, run, held_out_examples, cfg.micro_batch)
    print(f"held out:  loss {held:.3f}  perplexity {math.exp(held):.2f}")
    show_samples(model, tokenizer, run, held_out)
    run.finish(model, tokenizer, held_out_loss=held)


if __name__ == "__main__":
    runtime.main(Config, train, __doc__)
