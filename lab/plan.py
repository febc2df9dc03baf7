"""How much memory a stage needs on each device and how much it sends, computed before it runs.

    python -m lab.plan --stage ppo --processes 8 --n_layer 32 --n_embd 4096 --n_head 32 --n_kv_head 8 \\
        --mlp swiglu --mlp_hidden 14336 --norm rmsnorm --positions rotary --no-bias --no-tied \\
        --vocab_size 128256

docs/gpus.md says what is counted, and has a table of what fits where, from GPT-2 small to 70 B, on 1 to 64
GPUs.
"""
import math
from collections import namedtuple
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import get_args

import torch

import ppo
import reward_model
from model import GPT, GPTConfig
from runtime.flags import flag
from runtime.launch import main

TRAINED = {"sft": ["lm"], "reward_model": ["scalar"], "dpo": ["lm"], "ppo": ["lm", "scalar"]}    # their heads
FROZEN = {"sft": [], "reward_model": [], "dpo": [], "ppo": ["lm", "scalar"]}
CHUNK = 2 ** 24                         # logits that exist at once in training: see GPT.logprobs
SAMPLING_LOGITS = 5                     # float32 arrays (rows, V) that exist at once where tokens are sampled


@dataclass
class Stage:
    stage: str = flag("ppo", "stage", choices=tuple(TRAINED))
    processes: int = flag(8, "devices", 1)
    parallel: str = flag("fsdp", "how networks are spread over them", choices=("ddp", "fsdp"))
    batch: int = flag(64, "sequences per optimiser step, of all devices; ppo: prompts per rollout", 1)
    micro_batch: int = flag(4, "sequences per forward pass of a device", 1)
    sample_batch: int = flag(256, "answers that a device samples at once", 1)
    length: int = flag(1024, "tokens per sequence", 1)
    learnt: float = flag(0.5, "share of these tokens that the stage learns from: the answer", 0, 1)
    checkpoint_blocks: bool = flag(False, "as in training")
    gather_at_once: bool = flag(True, "as in training")
    normalize: int = flag(reward_model.Config.normalize, "as in reward_model.py", 0)
    bytes: int = flag(2, "per number in matrix products: 2 is bfloat16, 4 float32", 2, 4)
    debug: bool = flag(False, "show the traceback of an error")

    def __post_init__(self):
        self.shape = GPTConfig(**{name: getattr(self, name) for name, *_ in SHAPE}, block_size=self.length)


SHAPE = [(f.name, str if get_args(f.type) else f.type,
          flag(f.default, "as in model.GPTConfig", choices=get_args(f.type)))
         for f in fields(GPTConfig) if f.compare and f.type not in (float, dict) and f.name != "block_size"]
Config = make_dataclass("Config", SHAPE, bases=(Stage,))            # a flag for each field of the shape


# Numbers of parameters: all, those of one block, and the rest (embeddings, last norm, head).
Network = namedtuple("Network", "head all block ends")


def network(shape, head="lm"):
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1), head)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    ends = sum(p.numel() for p in model.parameters()) - block
    return Network(head, ends + shape.n_layer * block, block, ends)


class Plan:
    """The bytes of a stage on each device. cfg: a Config."""

    def __init__(self, cfg):
        self.cfg, self.shape, self.b = cfg, cfg.shape, cfg.bytes
        self.trained = [network(cfg.shape, head) for head in TRAINED[cfg.stage]]
        self.P_trained = sum(net.all for net in self.trained)
        self.P_frozen = sum(network(cfg.shape, head).all for head in FROZEN[cfg.stage])
        self.shards = cfg.processes if cfg.parallel == "fsdp" else 1
        self.is_sharded = self.shards > 1
        self.minibatches = ppo.Config.minibatches if cfg.stage == "ppo" else 1
        self.passes = math.ceil(cfg.batch / self.minibatches / cfg.processes / cfg.micro_batch)  # per step
        # Numbers per token: the queries of all heads, their keys, and an MLP's activations before and after
        # the nonlinearity, with a gate also the gate and the product.
        self.q, self.kv = cfg.shape.n_head * cfg.shape.head_dim, cfg.shape.n_kv_head * cfg.shape.head_dim
        self.mlp = cfg.shape.mlp_hidden * (4 if cfg.shape.mlp == "swiglu" else 2)

    def numbers(self):
        """{name: bytes}. The peak is reached in a backward pass or in sampling."""
        state = (12 * self.P_trained + 4 * self.P_frozen) / self.shards             # without gradients
        if not self.is_sharded:
            state = (12 if self.b == 4 else 14) * self.P_trained + self.b * self.P_frozen
        gradients, backward = 0, 0
        for net in self.trained:                # one after the other, beside the gradients of those before
            backward = max(backward, self.backward(net, gradients))
            gradients += 4 * net.all / self.shards
        sampling = self.sampling()
        return {"state": state + gradients, "backward": backward, "sampling": sampling,
                "peak": state + max(backward, sampling), "sent per step": self.sent()}

    def activations(self):
        """Bytes that the backward pass needs of each token of a block."""
        attention = 2 * self.q + 2 * self.kv                # queries, keys, values and attention's output
        if self.shape.positions == "rotary":
            attention += self.q + self.kv                   # queries and keys before the rotation, too
        norms = 4 if self.shape.norm == "layernorm" else 6  # of two norms: in, out, and RMSNorm's product
        return (norms * self.shape.n_embd + attention + self.mlp) * self.b

    def gathered(self, ends):
        """fsdp: bytes of the parameters that are whole while they are used, with the block that is gathered
        ahead. For a moment the last piece exists twice, as it was received and as it is used."""
        if not self.is_sharded:
            return 0
        return (max(ends, self.trained[0].block) + ends + self.trained[0].block) * self.b

    def backward(self, net, earlier):
        """Peak bytes of a network's forward and backward pass, gradients included, the rest of the state not.
        earlier: the gradients of the networks before it."""
        cfg, C, L, b = self.cfg, self.shape.n_embd, self.shape.n_layer, self.b
        tokens, embedding, half = cfg.micro_batch * cfg.length, self.shape.vocab_size * C * b, 0
        kept, recomputed = tokens * self.activations(), 0                           # of each block
        if cfg.checkpoint_blocks:
            kept, recomputed = tokens * C * b, kept
        # In a block's backward pass: the gradients of its activations; under fsdp also of its parameters, and
        # in float32 those of the block before, in transit.
        inside = recomputed + tokens * (self.mlp / 2 + 2 * C) * b
        inside += net.block * (b + 4) if self.is_sharded else 0
        own, moments = 4 * net.all / self.shards, []
        before, new = (earlier, own) if self.passes == 1 else (earlier + own, 0)
        if net.head == "lm":
            logits = min(tokens * cfg.learnt * self.shape.vocab_size, CHUNK) * 4
            half = embedding if self.shape.tied else 0          # the head's part of a tied gradient waits
            moments.append(L * kept + 3 * logits + embedding - half)                            # in the head
        moments += [(L - 1) * kept + inside + half, new + inside + half]        # in the last block, the first
        # At the end comes the embedding's gradient: both parts of a tied one and their sum, or one alone;
        # under fsdp also all that is in transit.
        end = embedding * (3 if half else 1)
        if self.is_sharded:
            end = max(end + (net.ends + net.block) * b, net.ends * (b + 4 + 4 / self.shards))
        return max(before + self.gathered(net.ends) + max(moments), earlier + own + end)

    def sampling(self):
        """Peak bytes of sampling apart from the state: weights, cache, and the activations of the prompts or
        the logits of one token. sft.py samples a few answers one by one, reward_model.py those of the SFT
        network that set its scale."""
        cfg, shape, b = self.cfg, self.shape, self.b
        lm, prompt, answer, extra, weights = network(shape), cfg.length * (1 - cfg.learnt), 64, 0, 0
        if self.is_sharded:
            weights = (lm.all + 2 * lm.block) * b if cfg.gather_at_once else self.gathered(lm.ends)
        if cfg.stage == "sft":
            return weights
        if cfg.stage == "ppo":
            rows, answer = cfg.batch, cfg.length * cfg.learnt
        elif cfg.stage == "reward_model" and cfg.normalize:
            rows, extra = cfg.normalize, 4 * lm.all / self.shards if self.is_sharded else b * lm.all
        else:
            return 0
        rows = min(cfg.sample_batch, rows / cfg.processes)
        cache = rows * (prompt + answer) * 2 * shape.n_layer * self.kv * b
        reading = rows * prompt * (self.mlp + 2 * shape.n_embd + 2 * self.q) * b
        return weights + extra + cache + max(reading, SAMPLING_LOGITS * rows * shape.vocab_size * 4)

    def sent(self):
        """Bytes that each process sends per step; of ppo, per rollout with its updates."""
        cfg, b, share = self.cfg, self.b, (self.cfg.processes - 1) / self.cfg.processes
        updates = ppo.Config.epochs * self.minibatches if cfg.stage == "ppo" else 1
        if not self.is_sharded:
            return 8 * self.P_trained * share * updates
        sent = self.P_trained * (2 * b + 4) * share * self.passes * updates
        if cfg.stage == "ppo":                  # the answers are sampled, then all networks read them
            policy, readers = self.trained[0].all, self.P_trained + self.P_frozen
            if b == 4:                          # only in bfloat16 the policy reads its own answers once more
                readers -= policy
            times = 1 if cfg.gather_at_once else int(cfg.length * cfg.learnt)
            micro_batches = math.ceil(cfg.batch / cfg.processes / cfg.micro_batch)
            sent += b * share * (policy * times + readers * micro_batches)
        return sent


def show(cfg):
    numbers = "  ".join(f"{name} {size / 1e9:.2f} GB" for name, size in Plan(cfg).numbers().items())
    size = f"{network(cfg.shape).all / 1e9:.2f} B parameters"
    print(f"{cfg.stage} of {size}, {cfg.parallel} on {cfg.processes}:  {numbers}")


if __name__ == "__main__":
    main(Config, show, __doc__)
