"""Stage 1, supervised fine-tuning (SFT): imitate demonstrations.

    python sft.py                                       a new small GPT, on the embedded world
    python sft.py --data my.jsonl --init out/other      a checkpoint, on your own conversations

The loss is −log p(next token), as in pretraining, but only on the assistant's tokens. The user's words are
input; the model need not learn to write them. It must learn the <|im_end|> that closes a turn, or no answer
would ever end. On held-out conversations the loss shows overfitting, and samples how the answers read.

After SFT the model answers fluently, and about as well as the average demonstration: maximum likelihood
imitates bad demonstrations as faithfully as good ones. The later stages teach it to prefer good answers.
"""
import math
from dataclasses import dataclass

import torch

from data import loading
from data.batches import batches, encode_demonstrations
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.compute import Meter, pad
from runtime.flags import Training, flag
from runtime.launch import main
from runtime.models import load
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run
from runtime.terminal import print_numbers


@dataclass
class Config(Training):
    out: str = flag("out/sft", "folder that the run writes")
    data: str = flag(loading.WORLD, "demonstrations: a folder of the world's, or a file (.json, .jsonl)")
    held_out: str = flag("", "file of held-out demonstrations; without it every tenth record is held out")
    init: str = flag("", "checkpoint to start from; without it a new model of the shape below")
    tokenizer: str = flag("", "of a new model: gpt2 or a folder; none: the world's for its data, else gpt2",
                          unless="init")
    n_layer: int = flag(4, "layers of a new model", 1, unless="init")
    n_head: int = flag(3, "attention heads of a new model", 1, unless="init")
    n_embd: int = flag(96, "width of a new model", 1, unless="init")
    block_size: int = flag(128, "longest sequence of a new model, in tokens", 8, unless="init")
    epochs: int = flag(1, "passes over the demonstrations", 1)
    batch: int = flag(16, "conversations per optimiser step", 1)
    lr: float = flag(4e-3, "peak learning rate", 0)
    warmup: int = flag(50, "steps of linear warm-up, because Adam's averages are poor at first", 0)
    decay: str = flag("cosine", "how the learning rate falls to 0", choices=("constant", "linear", "cosine"))
    weight_decay: float = flag(0.1, "AdamW's weight decay, of matrices only", 0)
    evals: int = flag(4, "times to measure the held-out loss and print samples", 1)

    def __post_init__(self):
        GPTConfig(n_head=self.n_head, n_embd=self.n_embd)       # raises if heads do not divide the width
        if self.lora_rank > 0 and not self.init:
            raise ValueError("--lora_rank adapts a checkpoint: name one with --init")


def sft_loss(logprobs, mask):
    """The mean of −log p over the tokens to learn. logprobs (B, T) in nats; mask (B, T) bool. A scalar.

    The mean is over tokens, not over rows. If each row were averaged first, a token in a row with few tokens
    to learn would count more than others, and the loss would not be the cross-entropy per token."""
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


def demonstrations_loss(model, run, demonstrations):
    """sft_loss of some Demonstrations."""
    tokens = pad([d.ids for d in demonstrations]).to(run.device)
    mask = pad([d.learn for d in demonstrations]).to(run.device)
    return sft_loss(model.logprobs(tokens, mask), mask)


@torch.no_grad()
def evaluate(model, run, demonstrations):
    """The held-out loss, which is the mean of −log p over all tokens to learn of some Demonstrations, and its
    exp, the perplexity. Prints them."""
    stats = Meter()
    for some, share in run.micro_batches(demonstrations, weights=[sum(d.learn) for d in demonstrations]):
        stats.add(share, loss=demonstrations_loss(model, run, some))
    loss = stats.means()["loss"]
    print_numbers("held out:", {"loss": loss, "perplexity": math.exp(loss)})
    return {"held_out_loss": loss, "perplexity": math.exp(loss)}


def questions(conversations):
    """Conversations without the assistant's last answer, as prompts: a list of message lists."""
    return [messages[:max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
            for messages in conversations]


def start(cfg):
    """The model to train and its tokenizer, from a checkpoint or new."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        tokenizer = Tokenizer.load(cfg.init, cfg.system)
        return load(cfg.init, "lm", tokenizer.vocab_size), tokenizer
    tokenizer = loading.load_tokenizer(cfg.tokenizer, cfg.data, cfg.system)
    vocab_size = 64 * math.ceil(tokenizer.vocab_size / 64)      # faster matrix products
    shape = (vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(GPTConfig(*shape, mlp="gelu")), tokenizer        # GPT-2's GELU is slower on a CPU


def train(cfg):
    conversations, unseen = loading.load("demonstrations", cfg.data, cfg.held_out, cfg.max_dropped)
    model, tokenizer = start(cfg)
    loading.warn_if_foreign(tokenizer, conversations, cfg.data, cfg.init)
    block_size = model.config.block_size
    examples = encode_demonstrations(tokenizer, conversations, block_size, "demonstrations")
    held_out = encode_demonstrations(tokenizer, unseen, block_size, "held-out demonstrations")
    asked = questions(unseen)
    steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)
    every = max(1, steps // cfg.evals)
    run = Run(cfg, steps)
    run.place(model)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    run.resume(model=model, optimizer=optimizer)
    for batch in batches([len(d.ids) for d in examples], cfg.batch, cfg.epochs, cfg.seed, run.step):
        rows, stats = [examples[i] for i in batch], Meter()         # of similar length: less padding
        # share: the part of all tokens to learn that is in `some`. The gradients of share·mean add up to the
        # gradient of the mean over all of them, however few rows fit into memory at once.
        for some, share in run.micro_batches(rows, weights=[sum(d.learn) for d in rows]):
            loss = demonstrations_loss(model, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss)
        loss, lr = stats.means()["loss"], cfg.lr * schedule(run.step, steps, cfg.warmup, cfg.decay)
        norm = run.optimizer_step(optimizer, lr, loss, f"demonstrations {batch}")
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr}
        if (run.step + 1) % every == 0 and run.step + every < steps:            # the end measures anyway
            run.show_answers(model, tokenizer, asked)
            metrics |= evaluate(model, run, held_out)
        run.log(metrics)
    run.show_answers(model, tokenizer, asked)
    run.finish(model, tokenizer, **evaluate(model, run, held_out))


if __name__ == "__main__":
    main(Config, train, __doc__)
