"""What is measured: networks with random weights, in folders that both sides read, and the tasks on them."""
import math
import os
from dataclasses import dataclass

import torch

from data.tokenizer import learn
from model import GPT, GPTConfig

SHAPES = {
    "gpt2-6x384": dict(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "llama-6x384": dict(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_kv_head=2, n_embd=384,
                        mlp_hidden=1024, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False),
    "gpt2-small": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "world": dict(vocab_size=1024, block_size=128, n_layer=4, n_head=3, n_embd=96, mlp="gelu")}
SHAPES["llama-1b"] = dict(vocab_size=32000, block_size=2048, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048,
                          mlp_hidden=5632, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False,
                          tied=False)                                               # TinyLlama's
SHAPES["gpt2-64k"] = SHAPES["gpt2-6x384"] | {"vocab_size": 65536}
PROMPT = 64                         # tokens
MEAN_LENGTH = 24                    # of an answer, where answers end by themselves


@dataclass
class Task:
    kind: str                       # ppo, dpo, sample
    shape: str
    rows: int                       # answers, or pairs
    uneven: bool = False            # whether answers end by themselves
    lora_rank: int = 0
    answer: int = 64                # tokens
    epochs: int = 4                 # of PPO's update


TASKS = {                           # beside others: bench/__main__.py
    "ppo": Task("ppo", "gpt2-6x384", 32),
    "ppo-uneven": Task("ppo", "gpt2-6x384", 32, uneven=True),
    "ppo-llama": Task("ppo", "llama-6x384", 32),
    "ppo-lora": Task("ppo", "gpt2-6x384", 32, lora_rank=16),
    "dpo": Task("dpo", "gpt2-small", 8),
    "dpo-lora": Task("dpo", "gpt2-small", 8, lora_rank=16),
    "sample": Task("sample", "gpt2-6x384", 32),
    "sample-llama": Task("sample", "llama-6x384", 32),
    "sample-small": Task("sample", "gpt2-small", 32)}
GROWTH = {                          # by itself: bench/growth.py
    "ppo-4k": Task("ppo", "gpt2-6x384", 64, epochs=1),
    "ppo-64k": Task("ppo", "gpt2-64k", 64, epochs=1),
    "dpo-4k": Task("dpo", "gpt2-6x384", 32),
    "dpo-64k": Task("dpo", "gpt2-64k", 32),
    "sft-4k": Task("sft", "gpt2-6x384", 64),
    "sft-64k": Task("sft", "gpt2-64k", 64),
    "ppo-world": Task("ppo", "world", 128, uneven=True, answer=48, epochs=4)}  # its 2 epochs of 2 minibatches
# One of three sizes grows at a time: {name: (tokens in a sequence, sequences in a step, tokens known)}.
SIZES = {f"{length}x{rows}x{vocabulary}": (length, rows, vocabulary)
         for length, rows, vocabulary in [*((n, 8, 4096) for n in (128, 256, 512, 1024, 2048)),
                                          *((128, n, 4096) for n in (32, 128)),
                                          *((128, 8, n) for n in (1024, 16384, 50257, 150000))]}
for _name, (_length, _rows, _vocabulary) in SIZES.items():
    SHAPES[_name] = dict(vocab_size=_vocabulary, block_size=2048, n_layer=4, n_head=4, n_embd=256)
    GROWTH |= {f"{kind}-{_name}": Task(kind, _name, _rows, answer=_length - PROMPT, epochs=1)
               for kind in ("sft", "ppo")}


def make(task, folder):
    """Write the language model and the scalar model of a task into folder/lm and folder/scalar."""
    tokenizer = learn([""], 259)                                    # a token per byte
    for head in ("lm", "scalar"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPES[task.shape]), head)
        if task.uneven and head == "lm":
            draw_ends(model, tokenizer.end, task.answer)
        model.save(os.path.join(folder, head), tokens=tokenizer.ids())
        tokenizer.save(os.path.join(folder, head))


@torch.no_grad()
def draw_ends(model, end, answer):
    """Let every token be the end with a probability p for which answers have MEAN_LENGTH tokens: a large
    number that the last norm always adds meets a number in the end token's row alone."""
    p = 1 / MEAN_LENGTH
    for _ in range(100):                                # mean of min(geometric(p), answer): a fixed point
        p = (1 - (1 - p) ** answer) / MEAN_LENGTH
    rows = model.token_embedding.weight
    model.norm.bias[0] = 20.0
    noise = (20 ** 2 + rows.shape[1]) * 0.02 ** 2                   # variance of another token's logit
    logit = math.log(p / (1 - p) * len(rows)) + noise / 2
    rows[end], rows[end, 0] = 0.0, logit / 20
