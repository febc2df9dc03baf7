"""How much memory a stage needs on each device, and how much it sends, on paper, before a cluster is asked
for.

    python plan.py --stage ppo --processes 8 --n_layer 32 --n_embd 4096 --n_head 32 --n_kv_head 8 \\
        --mlp swiglu --mlp_hidden 14336 --norm rmsnorm --positions rotary --no-bias --no-tied --vocab_size 128256
    python plan.py --table                                    what fits where, from GPT-2 small to 70 B, on 1 to 64 GPUs

Bytes, with P parameters, N processes and b bytes a number in matrix products:

    state          16·P a trained network (float32 parameters, gradients, Adam's two moments), 4·P a frozen one; fsdp: ÷ N
    gathered       with other processes: what a block and the embeddings need whole, in b, and fsdp the next block's; to
                   sample, all of P in b, unless --no-gather_at_once
    sampling       sft's few answers; ppo's rollout; the SFT network's, 64 at a time, that set a reward model's scale at its end
    activations    what the backward pass needs of each token and block, counted below; --checkpoint_blocks: a block's input
    logits         of V numbers of 4 bytes a token that is learnt: log-probabilities, their gradient and that of the logits
    on their way   with other processes: a block's gradients in b, and those of the block before in 4 bytes
    cache          keys and values of every row that is sampled, in b
    sent           fsdp: (2·b + 4)·P·(N − 1)/N a forward and backward pass, to gather twice and add gradients up; ddp: 8·P·(N − 1)/N
                   an optimiser step; ppo and fsdp besides: b·P·(N − 1)/N to sample, and for each network that reads a micro-batch
"""
import math
from dataclasses import dataclass, replace

import torch

import runtime
from model import GPT, GPTConfig
from flags import flag

NETWORKS = {"sft": (["lm"], []), "reward_model": (["scalar"], []), "dpo": (["lm"], []),
            "ppo": (["lm", "scalar"], ["lm", "scalar"])}            # heads of those that are trained, and frozen
GB = 1e9


@dataclass
class Config:
    stage: str = flag("ppo", "stage", choices=tuple(NETWORKS))
    processes: int = flag(8, "devices", 1)
    parallel: str = flag("fsdp", "how", choices=("ddp", "fsdp"))
    batch: int = flag(64, "rows an optimiser step, of all devices; ppo: prompts a rollout", 1)
    micro_batch: int = flag(4, "rows a forward pass of a device", 1)
    length: int = flag(1024, "tokens a row", 1)
    learnt: float = flag(0.5, "share of them that is learnt from", 0, 1)
    checkpoint_blocks: bool = flag(False, "as in training")
    gather_at_once: bool = flag(True, "as in ppo.py; the others do where it fits")
    normalize: int = flag(256, "as in reward_model.py", 0)
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


def parameters(shape, head="lm"):
    """(of all, of a block, of the embeddings and the head)."""
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1), head)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    ends = sum(p.numel() for p in model.parameters()) - block
    return ends + shape.n_layer * block, block, ends


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
    """{what: bytes on each device, or sent by it}. The peak is the largest of three: in a backward pass, at
    its end, where the embeddings' gradients are, and while sampling."""
    shape, b, N = cfg.shape, cfg.bytes, cfg.processes
    trained, frozen = ([parameters(shape, head) for head in heads] for heads in NETWORKS[cfg.stage])
    shards = N if cfg.parallel == "fsdp" else 1
    P_trained, P_frozen = (sum(P for P, _, _ in nets) for nets in (trained, frozen))
    P, block, ends = trained[0]
    lm = NETWORKS[cfg.stage][0][0] == "lm"
    minibatches, epochs = (2, 2) if cfg.stage == "ppo" else (1, 1)          # ppo.py's defaults
    passes = math.ceil(cfg.batch / minibatches / N / cfg.micro_batch)       # of an optimiser step
    held = (12 * P_trained + 4 * P_frozen) / shards                         # without gradients
    gradients = 4 * P_trained / shards

    tokens = cfg.micro_batch * cfg.length
    of_block, of_input = activations(shape, b)
    if cfg.checkpoint_blocks:
        kept, again = tokens * shape.n_layer * of_input, tokens * of_block
    else:
        kept, again = tokens * shape.n_layer * of_block, 0
    numbers = lm * tokens * cfg.learnt * shape.vocab_size * 4               # a tensor of logits; PPO's entropy has its own
    saved, more = (2 * numbers, 3 * numbers) if cfg.stage == "ppo" else (numbers, 2 * numbers)
    embedding = shape.vocab_size * shape.n_embd * (b if N > 1 else 4)
    # What has been gathered is there twice for a moment: as it came, and as it is used. fsdp gathers a block
    # ahead.
    def at_hand(ends):
        return 0 if N == 1 else max(2 * ends + block, ends + 2 * block * (shards > 1)) * b
    cast = P_trained * b if N == 1 and b < 4 else 0                         # autocast's copies, which the backward pass uses
    # In a block's backward pass: gradients of what is inside; with other processes its parameters' gradients,
    # and in float32 those of the block before, on their way.
    inside = again + tokens * (shape.mlp_hidden * (2 if shape.mlp == "swiglu" else 1) + 2 * shape.n_embd) * b
    inside += block * (b + 4) * (N > 1)
    waiting, moments = kept * len(trained) + saved, []
    for head, (P_one, _, _) in reversed(list(zip(NETWORKS[cfg.stage][0], trained))):            # the critic's turn comes first
        left = 4 * P_one / shards * (passes == 1)                           # its gradients, if none were there before
        if head == "lm":
            moments.append(waiting + more + embedding * (not shape.tied))   # the head's gradient
            waiting -= saved
        half = embedding * (shape.tied and head == "lm")                    # a tied embedding's, waiting for its other half
        moments += [waiting - kept / shape.n_layer + inside + half, waiting - kept + left + inside + half]   # first and last block
        waiting += left - kept
    backward = gradients * (passes > 1) + cast + at_hand(ends) + max(moments)
    ends_with = embedding * (3 if shape.tied and lm else 1)                 # both halves of the gradient, and their sum
    if N > 1:                                                               # or the gradients of all that, on their way
        ends_with = max(ends_with + (ends + block) * b, ends * (b + 4 + 4 / shards))
        ends_with += 4 * sum(e for _, _, e in trained[1:])                  # the critic's wait until the actor's are there
    ends_with += gradients
    sampling, prompt = 0, cfg.length * (1 - cfg.learnt)
    if cfg.stage == "sft":                                      # shows some answers
        sampling = ((P + 2 * block) * b if cfg.gather_at_once else at_hand(ends)) * (N > 1)
    if cfg.stage == "ppo" or (cfg.stage == "reward_model" and cfg.normalize):
        ppo, (P_lm, _, ends_lm) = cfg.stage == "ppo", parameters(shape)
        rows, answer = (cfg.batch / N, cfg.length - prompt) if ppo else (min(64, cfg.normalize / N), 64)
        sharded = N > 1 and (ppo or shards > 1)                 # by fully_shard: else it is there whole, in float32
        width = b if sharded else 4
        cache = rows * (prompt + answer) * shape.n_layer * 2 * shape.n_kv_head * (shape.n_embd // shape.n_head) * width
        reading = rows * ((4 if shape.mlp == "swiglu" else 2) * shape.mlp_hidden + 4 * shape.n_embd) * width     # a token a row
        sampling = cache + max(reading * prompt, 5 * rows * shape.vocab_size * 4)
        if not ppo:                                             # which reads micro-batches; here all rows are scored at once
            sampling = max(sampling, reading * (prompt + answer)) + 4 * P_lm / shards
        sampling += ((P_lm + 2 * block) * b if cfg.gather_at_once or not ppo else at_hand(ends_lm)) * sharded

    share = (N - 1) / N
    if shards == 1:
        sent = 8 * P_trained * share * epochs * minibatches
    else:
        sent = P_trained * (2 * b + 4) * share * passes * epochs * minibatches
    if cfg.stage == "ppo" and shards > 1:                       # a rollout is sampled, then read by all four networks
        rollout = math.ceil(cfg.batch / N / cfg.micro_batch)
        sent += b * share * (P * (1 if cfg.gather_at_once else int(cfg.length * cfg.learnt)) + (P_trained + P_frozen - P * (b == 4)) * rollout)
    return {"state": held + gradients, "backward": backward - gradients * (passes > 1), "sampling": sampling,
            "peak": held + max(backward, ends_with, sampling), "sent a step": sent}


LLAMA = dict(mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False, tied=False)
MODELS = {
    "GPT-2 small, 124 M": dict(),
    "GPT-2 XL, 1.6 B": dict(n_layer=48, n_head=25, n_embd=1600),
    "Llama 3.2 3 B": dict(n_layer=28, n_head=24, n_kv_head=8, n_embd=3072, mlp_hidden=8192, vocab_size=128256, **{**LLAMA, "tied": True}),
    "Llama 3.1 8 B": dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, mlp_hidden=14336, vocab_size=128256, **LLAMA),
    "Llama 3.1 70 B": dict(n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, mlp_hidden=28672, vocab_size=128256, **LLAMA),
}


def table():
    """Lines of Markdown for SFT and PPO under fsdp, in bfloat16 with recomputed blocks: what each device
    holds, and what it sends for a step on eight of them. Eight rows of 1,024 tokens a device, one a forward
    pass; the policy is gathered at once to sample if that is less than 40 GB."""
    def size(n):
        unit, name = (1e12, "TB") if n >= 1e13 else (GB, "GB")
        return f"{n / unit:.0f} {name}" if n >= 10 * unit else f"{n / unit:.1f} {name}"

    counts = (1, 8, 16, 64)
    lines = ["| model | stage | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts) + " | each of 8 sends a step |",
             "|---" * (3 + len(counts)) + "|"]
    for name, shape in MODELS.items():
        for stage in ("sft", "ppo"):
            plans = {n: Config(stage=stage, processes=n, batch=8 * n, micro_batch=1, checkpoint_blocks=True, **shape) for n in counts}
            for cfg in plans.values():
                cfg.gather_at_once = parameters(cfg.shape)[0] * cfg.bytes < 40 * GB
            lines.append(f"| {name} | {stage} | " + " | ".join(size(plan(cfg)["peak"]) for cfg in plans.values())
                         + f" | {size(plan(plans[8])['sent a step'])} |")
    return lines


def main(cfg):
    if cfg.table:
        print("\n".join(table()))
        return
    P = parameters(cfg.shape)[0]
    print(f"{cfg.stage} of {P / 1e9:.2f} B parameters, {cfg.parallel} on {cfg.processes}:  " + "  ".join(
        f"{what} {n / GB:.2f} GB" for what, n in plan(cfg).items()))


if __name__ == "__main__":
    runtime.main(Config, main, __doc__)
