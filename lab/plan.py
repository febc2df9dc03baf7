"""How much memory a stage needs on each device, and how much it sends: on paper, before it runs.

    python -m lab.plan --stage ppo --processes 8 --n_layer 32 --n_embd 4096 --n_head 32 --n_kv_head 8 \\
        --mlp swiglu --mlp_hidden 14336 --norm rmsnorm --positions rotary --no-bias --no-tied \\
        --vocab_size 128256
    python -m lab.plan --table             what fits where, from GPT-2 small to 70 B, on 1 to 64 GPUs

Bytes, with P parameters, N processes and b bytes per number in matrix products; ppo with a critic, dpo with
--looks 0, which needs no reference, and neither with LoRA:

    state         16·P per trained network (float32 parameters, gradients, Adam's two moments), and in
                  bfloat16 the copy that computes, 2·P; b·P per frozen one; fsdp: 16·P and 4·P, ÷ N
    gathered      fsdp: what a block and the embeddings need whole, in b, and the next block's; to sample, all
                  of P in b, unless --no-gather_at_once
    sampling      sft's few answers; ppo's rollout; those of the SFT network that set a reward model's scale
    activations   what the backward pass needs of each token and block, counted below; with
                  --checkpoint_blocks only a block's input
    logits        V numbers of 4 bytes per token that is learnt, 16 million at a time: log-probabilities, and
                  two gradients
    in transit    fsdp: a block's gradients in b, and those of the block before in 4 bytes
    cache         keys and values of every row that is sampled, in b
    sent          fsdp: (2·b + 4)·P·(N − 1)/N per forward and backward pass, to gather twice and add gradients
                  up; ddp: 8·P·(N − 1)/N per optimiser step; ppo under fsdp also b·P·(N − 1)/N to sample, and
                  for each network that reads a micro-batch
"""
import math
from dataclasses import dataclass, fields, replace

import torch

from model import GPT, GPTConfig
from runtime.flags import flag
from runtime.launch import main

TRAINED = {"sft": ["lm"], "reward_model": ["scalar"], "dpo": ["lm"], "ppo": ["lm", "scalar"]}    # their heads
FROZEN = {"sft": [], "reward_model": [], "dpo": [], "ppo": ["lm", "scalar"]}
PPO_MINIBATCHES, PPO_EPOCHS = 2, 2                                  # ppo.py's defaults
CHUNK = 2 ** 24                                                     # logits that exist at once: GPT.logprobs
LOGITS = 5                              # float32 arrays (rows, V) that exist at once where tokens are sampled
GB, TB = 1e9, 1e12


@dataclass
class Config:
    stage: str = flag("ppo", "stage", choices=tuple(TRAINED))
    processes: int = flag(8, "devices", 1)
    parallel: str = flag("fsdp", "how networks are spread over them", choices=("ddp", "fsdp"))
    batch: int = flag(64, "sequences per optimiser step, of all devices; ppo: prompts per rollout", 1)
    micro_batch: int = flag(4, "sequences per forward pass of a device", 1)
    sample_batch: int = flag(256, "answers that a device samples at once", 1)
    length: int = flag(1024, "tokens per sequence", 1)
    learnt: float = flag(0.5, "share of them that is learnt from", 0, 1)
    checkpoint_blocks: bool = flag(False, "as in training")
    gather_at_once: bool = flag(True, "as in training")
    normalize: int = flag(256, "as in reward_model.py", 0)
    bytes: int = flag(2, "per number in matrix products: 2 is bfloat16, 4 float32", 2, 4)
    n_layer: int = flag(12, "layers", 1)
    n_head: int = flag(12, "heads", 1)
    n_kv_head: int = flag(0, "heads of keys and values; 0: as many", 0)
    n_embd: int = flag(768, "width", 1)
    mlp_hidden: int = flag(0, "width inside the MLP; 0: four times n_embd", 0)
    vocab_size: int = flag(50304, "vocabulary", 1)
    mlp: str = flag("gelu_tanh", "kind of MLP", choices=("gelu_tanh", "gelu", "swiglu"))
    norm: str = flag("layernorm", "kind of norm", choices=("layernorm", "rmsnorm"))
    positions: str = flag("learned", "kind of positions", choices=("learned", "rotary"))
    bias: bool = flag(True, "in linear layers")
    tied: bool = flag(True, "embedding and output layer are one")
    table: bool = flag(False, "print what fits where")
    debug: bool = flag(False, "show the traceback of an error")

    def __post_init__(self):
        shape = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}
        self.shape = GPTConfig(**shape, block_size=self.length)


@dataclass
class Network:
    """Numbers of parameters."""
    head: str
    all: int
    block: int              # one block's
    ends: int               # the embeddings', the last norm's and the head's


def network(shape, head="lm"):
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1), head)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    ends = sum(p.numel() for p in model.parameters()) - block
    return Network(head, ends + shape.n_layer * block, block, ends)


class Plan:
    """The bytes of a stage, on each device. cfg: a Config."""

    def __init__(self, cfg):
        self.cfg, self.shape, self.b, self.N = cfg, cfg.shape, cfg.bytes, cfg.processes
        self.trained = [network(cfg.shape, head) for head in TRAINED[cfg.stage]]
        self.P_trained = sum(net.all for net in self.trained)
        self.P_frozen = sum(network(cfg.shape, head).all for head in FROZEN[cfg.stage])
        self.shards = cfg.processes if cfg.parallel == "fsdp" else 1
        self.is_sharded = self.shards > 1
        self.minibatches, self.epochs = (PPO_MINIBATCHES, PPO_EPOCHS) if cfg.stage == "ppo" else (1, 1)
        self.passes = math.ceil(cfg.batch / self.minibatches / self.N / cfg.micro_batch)  # per optimiser step
        self.embedding = cfg.shape.vocab_size * cfg.shape.n_embd * self.b
        # Numbers per token before and after an MLP's nonlinearity; with a gate, also its and the product.
        self.mlp = cfg.shape.mlp_hidden * (4 if cfg.shape.mlp == "swiglu" else 2)

    def numbers(self):
        """{what: bytes}. The peak is the largest of three: in a backward pass, at its end, where the
        embeddings' gradients are, and while sampling."""
        state = (12 * self.P_trained + 4 * self.P_frozen) / self.shards             # without gradients
        if not self.is_sharded:
            state = 12 * self.P_trained + self.b * self.P_frozen
            state += 2 * self.P_trained if self.b < 4 else 0
        gradients, backward, end = 0, 0, 0
        for net in self.trained:                # one after the other, beside the gradients of those before
            backward = max(backward, self.backward(net, gradients))
            end = max(end, self.end_of_backward(net, gradients))
            gradients += 4 * net.all / self.shards
        sampling = self.sampling()
        return {"state": state + gradients, "backward": backward, "sampling": sampling,
                "peak": state + max(backward, end, sampling),
                "sent per step": self.sent()}

    def activations(self):
        """Bytes that the backward pass needs per token of a block."""
        shape, C = self.shape, self.shape.n_embd
        kv = shape.n_kv_head * (C // shape.n_head)
        attention = C + 2 * kv + C                # queries, keys and values, and what attention makes of them
        if shape.positions == "rotary":
            attention += C + kv                         # also turned queries and keys
        norms = 4 * C if shape.norm == "layernorm" else 6 * C     # in and out, and RMSNorm's product, of both
        return (norms + attention + self.mlp) * self.b

    def gathered(self, ends):
        """Parameters that are whole while others read them. What has just been gathered is there twice for a
        moment: as it came, and as it is used. fsdp gathers a block ahead."""
        if not self.is_sharded:
            return 0
        return (max(ends, self.trained[0].block) + ends + self.trained[0].block) * self.b

    def backward(self, net, earlier):
        """The most that a network's forward and backward pass needs, apart from the rest of the state:
        gradients too. earlier: those that are there before."""
        cfg, shape, b = self.cfg, self.shape, self.b
        tokens = cfg.micro_batch * cfg.length
        of_block, recomputed = tokens * self.activations(), 0
        if cfg.checkpoint_blocks:                                   # its input alone
            of_block, recomputed = tokens * shape.n_embd * b, of_block
        # In a block's backward pass: gradients of what is inside; under fsdp its parameters' gradients, and
        # in float32 those of the block before, in transit.
        inside = recomputed + tokens * (self.mlp / 2 + 2 * shape.n_embd) * b
        if self.is_sharded:
            inside += net.block * (b + 4)
        gradients, half, moments = 4 * net.all / self.shards, 0, []
        if self.passes > 1:                                         # its own are there from the first on
            earlier, gradients = earlier + gradients, 0
        if net.head == "lm":
            logits = min(tokens * cfg.learnt * shape.vocab_size, CHUNK) * 4
            if shape.tied:
                half = self.embedding                               # its gradient waits for its other half
            moments.append(shape.n_layer * of_block + 3 * logits + self.embedding - half)   # the head's
        moments.append((shape.n_layer - 1) * of_block + inside + half)              # in the last block
        moments.append(gradients + inside + half)                                   # in the first block
        return earlier + self.gathered(net.ends) + max(moments)

    def end_of_backward(self, net, earlier):
        """When the embedding's gradient is made: both halves of a tied one and their sum, or that of the
        lookup alone; under fsdp also all that is in transit."""
        need = self.embedding * (3 if self.shape.tied and net.head == "lm" else 1)
        if self.is_sharded:
            need = max(need + (net.ends + net.block) * self.b, net.ends * (self.b + 4 + 4 / self.shards))
        return earlier + 4 * net.all / self.shards + need

    def sampling(self):
        """The most that sampling needs, apart from the state: weights, cache, activations of one token."""
        cfg, shape, b = self.cfg, self.shape, self.b
        lm, prompt, extra, weights = network(shape), cfg.length * (1 - cfg.learnt), 0, 0
        if self.is_sharded:
            weights = (lm.all + 2 * lm.block) * b if cfg.gather_at_once else self.gathered(lm.ends)
        if cfg.stage == "sft":                                          # a few answers, one at a time
            return weights
        if cfg.stage == "ppo":
            rows, answer = min(cfg.sample_batch, cfg.batch / self.N), cfg.length * cfg.learnt
        elif cfg.stage == "reward_model" and cfg.normalize:             # its SFT network is there only now
            rows, answer = min(cfg.sample_batch, cfg.normalize / self.N), 64
            extra = 4 * lm.all / self.shards if self.is_sharded else b * lm.all
        else:
            return 0
        cache = rows * (prompt + answer) * 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * b
        reading = rows * prompt * (self.mlp + 4 * shape.n_embd) * b
        return weights + extra + cache + max(reading, LOGITS * rows * shape.vocab_size * 4)

    def sent(self):
        """Bytes that each process sends per step: a rollout with its updates, in ppo."""
        cfg, b, share = self.cfg, self.b, (self.N - 1) / self.N
        updates = self.epochs * self.minibatches
        if not self.is_sharded:
            return 8 * self.P_trained * share * updates
        sent = self.P_trained * (2 * b + 4) * share * self.passes * updates
        if cfg.stage == "ppo":                  # answers are sampled, then read by the other networks ...
            policy = self.trained[0].all
            readers = self.P_trained + self.P_frozen
            if b == 4:                          # in bfloat16 the policy reads its own answers once more
                readers -= policy
            times = 1 if cfg.gather_at_once else int(cfg.length * cfg.learnt)
            micro_batches = math.ceil(cfg.batch / self.N / cfg.micro_batch)
            sent += b * share * (policy * times + readers * micro_batches)
        return sent


LLAMA = dict(mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False, n_kv_head=8, vocab_size=128256)
MODELS = {
    "GPT-2 small, 124 M": dict(),
    "GPT-2 XL, 1.6 B": dict(n_layer=48, n_head=25, n_embd=1600),
    "Llama 3.2 3 B": dict(LLAMA, n_layer=28, n_head=24, n_embd=3072, mlp_hidden=8192),
    "Llama 3.1 8 B": dict(LLAMA, n_layer=32, n_head=32, n_embd=4096, mlp_hidden=14336, tied=False),
    "Llama 3.1 70 B": dict(LLAMA, n_layer=80, n_head=64, n_embd=8192, mlp_hidden=28672, tied=False),
}


def in_words(size):
    if size >= 10 * TB:
        return f"{size / TB:.0f} TB"
    return f"{size / GB:.0f} GB" if size >= 10 * GB else f"{size / GB:.1f} GB"


def table():
    """Lines of Markdown for SFT and PPO under fsdp, in bfloat16 with recomputed blocks: what each device
    holds, and what it sends per step on eight of them. Eight sequences of 1,024 tokens per device, one per
    forward pass; the policy is gathered at once to sample if that is less than 40 GB."""
    counts = (1, 8, 16, 64)
    heads = " | ".join("1 GPU" if n == 1 else f"{n} GPUs" for n in counts)
    lines = [f"| model | stage | {heads} | each of 8 sends per step |", "|---" * (3 + len(counts)) + "|"]
    for name, shape in MODELS.items():
        for stage in ("sft", "ppo"):
            found = {}
            for n in counts:
                cfg = Config(stage, n, batch=8 * n, micro_batch=1, checkpoint_blocks=True, **shape)
                cfg.gather_at_once = network(cfg.shape).all * cfg.bytes < 40 * GB
                found[n] = Plan(cfg).numbers()
            peaks = " | ".join(in_words(found[n]["peak"]) for n in counts)
            lines.append(f"| {name} | {stage} | {peaks} | {in_words(found[8]['sent per step'])} |")
    return lines


def show(cfg):
    if cfg.table:
        print("\n".join(table()))
        return
    numbers = (f"{what} {size / GB:.2f} GB" for what, size in Plan(cfg).numbers().items())
    billions = network(cfg.shape).all / 1e9
    print(f"{cfg.stage} of {billions:.2f} B parameters, {cfg.parallel} on {cfg.processes}:  "
          + "  ".join(numbers))


if __name__ == "__main__":
    main(Config, show, __doc__)
