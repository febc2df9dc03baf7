"""How much memory a stage needs on each device, on paper, before a cluster is asked for.

    python plan.py --stage ppo --processes 8 --n_layer 32 --n_embd 4096 --n_head 32 --n_kv_head 8 \\
        --mlp swiglu --mlp_hidden 14336 --norm rmsnorm --positions rotary --no-bias --no-tied --vocab_size 128256
    python plan.py --table                                    what fits where, from GPT-2 small to 70 B, on 1 to 64 GPUs

Bytes, with P parameters, N processes and b bytes a number in matrix products:

    state          16·P a trained network (float32 parameters, gradients, Adam's two moments), 4·P a frozen one; fsdp: ÷ N
    gathered       fsdp: what one block and its successor need whole, and the embeddings, in b; to sample, all of P in b,
                   unless --no-gather_at_once
    activations    what the backward pass needs of each token and block, counted below; --checkpoint_blocks: a block's input
    logits         3 · V · 4 a token that is learnt: log-probabilities, their gradient and that of the logits
    cache          keys and values of every row that is sampled, in b
"""
from dataclasses import dataclass, replace

import torch

import runtime
from model import GPT, GPTConfig
from flags import flag

NETWORKS = {"sft": (1, 0), "reward_model": (1, 0), "dpo": (1, 0), "ppo": (2, 2)}        # trained, frozen
GB = 1e9


@dataclass
class Config:
    stage: str = flag("ppo", "stage", choices=tuple(NETWORKS))
    processes: int = flag(8, "devices", 1)
    parallel: str = flag("fsdp", "how", choices=("ddp", "fsdp"))
    micro_batch: int = flag(4, "rows a forward pass", 1)
    length: int = flag(1024, "tokens a row", 1)
    learnt: float = flag(0.5, "share of them that is learnt from", 0, 1)
    rollout: int = flag(32, "rows that a device samples at once (ppo)", 1)
    checkpoint_blocks: bool = flag(False, "as in training")
    gather_at_once: bool = flag(True, "as in ppo.py")
    bytes: int = flag(2, "a number in matrix products: 2 is bfloat16, 4 float32", 2, 4)
    n_layer: int = flag(12, "layers", 1)
    n_head: int = flag(12, "heads", 1)
    n_kv_head: int = flag(0, "heads of keys and values; 0: as many", 0)
    n_embd: int = flag(768, "width", 1)
    mlp_hidden: int = flag(0, "width inside the MLP; 0: four times n_embd", 0)
    vocab_size: int = flag(50304, "vocabulary", 1)
    mlp: str = flag("gelu_tanh", "", choices=("gelu_tanh", "gelu", "swiglu"))
    norm: str = flag("layernorm", "", choices=("layernorm", "rmsnorm"))
    positions: str = flag("learned", "", choices=("learned", "rotary"))
    bias: bool = flag(True, "in linear layers")
    tied: bool = flag(True, "embedding and output layer are one")
    table: bool = flag(False, "print what fits where")
    debug: bool = flag(False, "show the traceback of an error")

    def __post_init__(self):
        self.shape = GPTConfig(**{name: getattr(self, name) for name in (
            "n_layer", "n_head", "n_kv_head", "n_embd", "mlp_hidden", "vocab_size", "mlp", "norm", "positions", "bias", "tied")},
            block_size=self.length)


def parameters(shape):
    """(of all, of a block)."""
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    return sum(p.numel() for p in model.parameters()) + (shape.n_layer - 1) * block, block


def activations(shape, b):
    """Bytes that the backward pass needs of a token: (of a block, of a block's input)."""
    C, H, kv = shape.n_embd, shape.mlp_hidden, shape.n_kv_head * (shape.n_embd // shape.n_head)
    attention = C + 2 * kv + C                                  # queries, keys and values, and what attention makes of them
    if shape.positions == "rotary":
        attention += C + kv                                     # turned queries and keys besides
    mlp = 4 * H if shape.mlp == "swiglu" else 2 * H             # before and after the nonlinearity; gate and product
    norms = 4 * C if shape.norm == "layernorm" else 6 * C       # in and out, and RMSNorm's product, of both
    return (norms + attention + mlp) * b, C * b


def plan(cfg):
    """{what: bytes on each device}, at the moment when most is there: the first backward pass after one whose gradients
    are kept."""
    shape, b = cfg.shape, cfg.bytes
    P, block = parameters(shape)
    trained, frozen = NETWORKS[cfg.stage]
    shards = cfg.processes if cfg.parallel == "fsdp" else 1
    tokens = cfg.micro_batch * cfg.length
    of_block, of_input = activations(shape, b)
    logits = 3 * tokens * cfg.learnt * shape.vocab_size * 4
    # In a block's backward pass: gradients of what is inside, and of a tied embedding, which waits for its other half.
    inside = tokens * (shape.mlp_hidden * (2 if shape.mlp == "swiglu" else 1) + 2 * shape.n_embd) * b
    inside += shape.vocab_size * shape.n_embd * 4 if shape.tied else 0
    if cfg.checkpoint_blocks:
        need = tokens * shape.n_layer * of_input + max(logits, tokens * of_block + inside)
    else:
        need = tokens * shape.n_layer * of_block + max(logits, inside)
    out = {"state": (16 * trained + 4 * frozen) * P / shards, "activations and logits": need, "gathered": 0.0, "sampling": 0.0}
    if shards > 1:
        out["gathered"] = (P - (shape.n_layer - 2) * block) * b if shape.n_layer > 2 else P * b
    if cfg.stage == "ppo":
        cache = cfg.rollout * cfg.length * shape.n_layer * 2 * shape.n_kv_head * (shape.n_embd // shape.n_head) * b
        out["sampling"] = cache + (0 if shards == 1 else P * b if cfg.gather_at_once else out["gathered"])
    # sampling and the backward pass take turns
    out["peak"] = out["state"] + max(out["activations and logits"] + out["gathered"], out["sampling"])
    # what a process sends and receives for one step: gathers for forward and backward, and the gradients' reduction
    sends = (shards - 1) / shards if shards > 1 else 2 * (cfg.processes - 1) / cfg.processes
    out["moved a step"] = trained * P * sends * ((2 * b + 4) if shards > 1 else 4)
    return out


LLAMA = dict(mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False, tied=False)
MODELS = {
    "GPT-2 small, 124 M": dict(),
    "GPT-2 XL, 1.6 B": dict(n_layer=48, n_head=25, n_embd=1600),
    "Llama 3.2 3 B": dict(n_layer=28, n_head=24, n_kv_head=8, n_embd=3072, mlp_hidden=8192, vocab_size=128256, **{**LLAMA, "tied": True}),
    "Llama 3.1 8 B": dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, mlp_hidden=14336, vocab_size=128256, **LLAMA),
    "Llama 3.1 70 B": dict(n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, mlp_hidden=28672, vocab_size=128256, **LLAMA),
}


def table():
    """Lines of Markdown: gigabytes a device for SFT and for PPO under fsdp, one row of 1,024 tokens a forward pass, eight
    sampled at once, block by block, and recomputed blocks."""
    counts = (1, 8, 16, 64)
    lines = ["| model | stage | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts) + " |", "|---" * (2 + len(counts)) + "|"]
    for name, shape in MODELS.items():
        for stage in ("sft", "ppo"):
            needs = [plan(Config(stage=stage, processes=n, micro_batch=1, rollout=8, checkpoint_blocks=True, gather_at_once=False, **shape))["peak"] / GB
                     for n in counts]
            lines.append(f"| {name} | {stage} | " + " | ".join(f"{x:.0f} GB" if x >= 10 else f"{x:.1f} GB" for x in needs) + " |")
    return lines


def main(cfg):
    if cfg.table:
        print("\n".join(table()))
        return
    P, _ = parameters(cfg.shape)
    print(f"{cfg.stage} of {P / 1e9:.2f} B parameters, {cfg.parallel} on {cfg.processes}:  " + "  ".join(
        f"{what} {n / GB:.2f} GB" for what, n in plan(cfg).items()))


if __name__ == "__main__":
    runtime.main(Config, main, __doc__)
