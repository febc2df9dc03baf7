"""A GPT in one file: the network, sampling with a KV cache, a scalar head, LoRA.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=1024))
    logits = model(tokens)                                  # (B, T) -> (B, T, V)
    logprobs = model.logprobs(tokens, mask)                 # (B, T), 0 where mask is false
    answers = model.generate(prompts, lengths, 64, stop_token=end)

The defaults are GPT-2 (Radford et al. 2019). Switches in the config turn the same code into a Llama, a
Mistral or a Qwen: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

One layout everywhere: `tokens` (B, T) is right-padded, so causal attention never sees padding and needs no
mask: what stands to the right of a token cannot reach it.

Letters in shapes: B rows, T tokens, V vocabulary, C channels, H heads, D channels per head, L layers; S
positions of the cache, b rows that are still being sampled, n positions that a mask names.

Left out: dropout (small data is read a few times here, and PPO has to do without it, because the new
log-probabilities must differ from the old ones by the update alone), and biases of attention scores.
"""
import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """All of a network's shape. Raises ValueError naming the first field that cannot be."""
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64; the chat tokens live in the padding
    block_size: int = 1024         # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0             # grouped-query attention: key and value heads; 0 means as many as n_head
    head_dim: int = 0              # channels per head; 0 means n_embd / n_head
    mlp_hidden: int = 0            # width inside the MLP; 0 means 4·n_embd
    positions: str = "learned"     # or "rotary" (Su et al. 2021)
    rope_theta: float = 10000.0    # base of the rotary frequencies
    rope_scaling: dict = None      # Llama 3's, for sequences longer than it was first trained on
    norm: str = "layernorm"        # or "rmsnorm" (Zhang & Sennrich 2019)
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"         # GPT-2's approximation; or "gelu" itself, or "swiglu" (Shazeer 2020)
    bias: bool = True              # in linear layers and LayerNorm
    qkv_bias: bool = False         # in queries, keys and values alone (Qwen 2), where bias is off
    qk_norm: bool = False          # RMSNorm of each head's queries and keys (Qwen 3)
    tied: bool = True              # the token embedding doubles as the output layer
    # config.json of the folder that it came from, all of which the next one keeps.
    source: dict = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim",
                     "mlp_hidden"):
            value, least = getattr(self, name), 0 if name in ("mlp_hidden", "head_dim") else 1
            if type(value) is not int or value < least:
                raise ValueError(f"GPTConfig.{name} must be a whole number of at least {least}, "
                                 f"not {value!r}")
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd
        for name in ("rope_theta", "norm_eps"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"GPTConfig.{name} must be a number above 0, not {getattr(self, name)!r}")
        allowed = {"positions": ("learned", "rotary"), "norm": ("layernorm", "rmsnorm"),
                   "mlp": ("gelu_tanh", "gelu", "swiglu")}
        allowed |= dict.fromkeys(("bias", "qkv_bias", "qk_norm", "tied"), (True, False))
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"GPTConfig.{name} must be one of {choices}, not {getattr(self, name)!r}")
        for big, small in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
            if getattr(self, big) % getattr(self, small) and not (big == "n_embd" and self.head_dim):
                raise ValueError(f"GPTConfig.{big} {getattr(self, big)} is not a multiple of "
                                 f"{small} {getattr(self, small)}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError("GPTConfig: rotary positions need an even number of channels per head")


# -------------------------------------------------------------------------------------- the network

def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def frequencies(config, device, dtype):
    """Of the rotary positions, in radians per token: theta^(-2i/D) for i = 0 .. D/2 − 1 (Su et al. 2021).

    rope_scaling stretches them over longer sequences, as Llama 3.1 does: waves that fit into the context of
    its first training more than `high_freq_factor` times stay as they are, those that fit less than
    `low_freq_factor` times are slowed down by `factor`, and those between are mixed."""
    half = config.head_dim // 2
    f = config.rope_theta ** (-torch.arange(half, device=device, dtype=dtype) / half)
    if config.rope_scaling:
        s = config.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        waves = s["original_max_position_embeddings"] * f / (2 * math.pi)        # that fit into that context
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        f = kept * f + (1 - kept) * f / s["factor"]
    return f


def rotation(config, positions, dtype):
    """cos and sin of the angle position·frequency: (T, D/2) for positions (T,), or (B, 1, 1, D/2) for
    positions (B, 1), when each row stands somewhere else. In float32 or finer: bfloat16 cannot tell late
    positions apart."""
    dtype = torch.promote_types(dtype, torch.float32)
    angles = positions.to(dtype)[..., None] * frequencies(config, positions.device, dtype)
    if angles.dim() == 3:
        angles = angles[:, None]                                                # the same for every head
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, eq. 34): turn channel pairs (i, i + D/2) of x (B, H, T, D). Pairs are
    split by halves, as Llama's published weights have them."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """y = W·x + b. With an adapter y = W·x + b + (α/r)·B·A·x, and only A (r, C_in) and B (C_out, r) learn:
    GPT.add_adapters freezes W and b. LoRA (Hu et al. 2021, eq. 3).

    What fine-tuning adds to W is close to a matrix of low rank. Written as B·A it has r·(C_in + C_out)
    numbers, and only these need gradients and Adam's moments. B starts at 0, so that the first step starts
    from W. The sum over r terms grows with r; divided by it, the same learning rate serves for every rank."""
    scale = 0.0                                                 # α/r; 0 without an adapter

    def add_adapter(self, rank, alpha):
        self.A = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        y = self.without_adapter(x)
        return y + F.linear(self.scale * F.linear(x, self.A), self.B) if self.scale else y

    def without_adapter(self, x):
        """W·x + b. This and the next: runtime/nf4.py has a layer whose W is in 4 bits."""
        return super().forward(x)

    def frozen_matrix(self, whole):
        return whole(self.weight)

    def matrix(self, whole=lambda x: x):
        """W + (α/r)·B·A. whole: makes an ordinary tensor of one that is sharded over processes."""
        W = self.frozen_matrix(whole)
        return W + self.scale * whole(self.B) @ whole(self.A) if self.scale else W

    def merge(self):
        """Make W + (α/r)·B·A the weight, and drop the adapter."""
        self.weight = nn.Parameter(self.matrix().detach())
        self.scale, self.A, self.B = 0.0, None, None


class Places(NamedTuple):
    """Where the tokens of a forward pass stand: what all layers need of it."""
    positions: torch.Tensor         # (T,): whole sequences; (B, 1): one new token per row
    turns: tuple = None             # their rotation, if positions are rotary
    seen: torch.Tensor = None       # (B, 1, 1, S): 0 where a new token may look back, and −∞ elsewhere


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.is_grouped = config, config.n_kv_head < config.n_head
        C, D = config.n_embd, config.head_dim
        width, kv_width = config.n_head * D, config.n_kv_head * D
        self.q = Linear(C, width, bias=config.bias or config.qkv_bias)
        self.k = Linear(C, kv_width, bias=config.bias or config.qkv_bias)
        self.v = Linear(C, kv_width, bias=config.bias or config.qkv_bias)
        self.out = Linear(width, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x, places, cache=None):
        """x (B, T, C): whole sequences, whose keys and values are kept in the cache if there is one; or one
        new token per row, T = 1, which looks back through the cache (2, B, H_kv, S, D)."""
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.config.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                    # (B, H, T, D)
        if places.turns:
            q, k = rotate(q, *places.turns), rotate(k, *places.turns)
        if places.seen is not None:
            y = self.look_back(q, k, v, places, cache)
        else:
            if cache is not None:   # padding writes keys too: look_back masks them till tokens overwrite them
                cache[0, :, :, :T], cache[1, :, :, :T] = k, v
            y = self.attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v):
        """Causal attention: q (B, H, T, D) over k and v (B, H_kv, T, D)."""
        B, H, T, D = q.shape
        if not (q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and T <= 256):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
        # There, PyTorch's fused kernel takes three times as long, forward and backward, as its single steps.
        k, v = (x.repeat_interleave(H // self.config.n_kv_head, dim=1) for x in (k, v))
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
        return (scores.softmax(dim=-1) @ v).view(B, H, T, D)

    def look_back(self, q, k, v, places, cache):
        """Attention of one query per row: q (B, H, 1, D), over its cached keys up to its own position."""
        here = torch.arange(len(q), device=q.device), slice(None), places.positions[:, 0]
        cache[0][here], cache[1][here] = k[:, :, 0], v[:, :, 0]
        return F.scaled_dot_product_attention(q, *cache, attn_mask=places.seen, enable_gqa=self.is_grouped)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated, self.approximate = config.mlp == "swiglu", "tanh" if config.mlp == "gelu_tanh" else "none"
        if self.gated:
            self.gate = Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.up = Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.down = Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.gated:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.attention = make_norm(config), Attention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, places, cache=None, recompute=False):
        if recompute:   # in here, so that what wraps a block (FSDP, torch.compile) is not done twice
            return checkpoint(self.forward, x, places, use_reentrant=False)
        x = x + self.attention(self.norm1(x), places, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """head="lm" scores the next token; head="scalar" gives one number per position (a reward or a value)."""
    look_every = 1      # tokens after which sampling asks which rows have ended: a GPU has to be waited for
    known = None        # of a reward model: where its scores are guesses (uncertainty.py)

    def __init__(self, config, head="lm"):
        super().__init__()
        if head not in ("lm", "scalar"):
            raise ValueError(f'GPT: head must be "lm" or "scalar", not {head!r}')
        self.config, self.head_kind = config, head
        self.checkpoint_blocks = False      # True: recompute a block's activations in the backward pass
        self.folder, self.has_new_tokens = "", False        # where it is from; whether its vocabulary grew
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        if head == "scalar":
            self.head = nn.Linear(config.n_embd, 1)
        elif not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init)
        for block in self.blocks:       # GPT-2: the residual stream is a sum of 2L terms; keep its size at 1
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if self.head_kind == "scalar" and module is self.head:
            # So that scores start with a standard deviation of about 1 (Stiennon et al. 2020).
            nn.init.normal_(module.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    def add_adapters(self, rank, alpha, targets):
        """Freeze the network, but for a scalar head, and give the linear layers named in targets ("q", "k",
        "v", "out", "gate", "up", "down") an adapter each: see Linear."""
        self.requires_grad_(False)
        for name, module in self.blocks.named_modules():
            if name.split(".")[-1] in targets:
                module.add_adapter(rank, alpha)
        if self.head_kind == "scalar":
            self.head.requires_grad_(True)

    def adapted(self):
        """{name: Linear} of the layers that have an adapter."""
        return {name: module for name, module in self.named_modules() if getattr(module, "scale", 0)}

    @property
    def device(self):
        return self.token_embedding.weight.device

    def hidden(self, tokens, positions=None, cache=None):
        """The network under the head: tokens (B, T) int64 to (B, T, C)."""
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"sequence of {tokens.shape[1]} tokens is longer than "
                             f"block_size {self.config.block_size}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x, turns, seen = self.token_embedding(tokens), None, None
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            turns = rotation(self.config, positions, x.dtype)
        if positions.dim() == 2:
            ahead = torch.arange(cache[0].shape[3], device=tokens.device) > positions           # (B, S)
            seen = x.new_zeros(ahead.shape).masked_fill_(ahead, -torch.inf)[:, None, None]
        recompute = self.checkpoint_blocks and cache is None and torch.is_grad_enabled()
        places = Places(positions, turns, seen)
        for i, block in enumerate(self.blocks):
            x = block(x, places, None if cache is None else cache[i], recompute)
        return self.norm(x)

    def unembed(self, x):
        """Hidden states (..., C) to logits (..., V). Raises ValueError if this is not a language model."""
        if self.head_kind != "lm":
            raise ValueError('this GPT has head="scalar": it gives scores, not tokens')
        W = self.token_embedding.weight if self.config.tied else self.head.weight
        if x.is_cuda:       # as TF32, which holds bfloat16 exactly: sums in float32, not rounded at the end
            x, W = at_least_float32(x), at_least_float32(W)
        return F.linear(x, W)

    def forward(self, tokens):
        """tokens (B, T) int64, right-padded: logits (B, T, V), or one scalar per position (B, T)."""
        x = self.hidden(tokens)
        if self.head_kind == "lm":
            return self.unembed(x)
        return self.head(x.to(self.head.weight.dtype)).squeeze(-1)

    def score(self, tokens, lengths):
        """The scalar at each row's last token, (B,): it alone has seen the whole row. tokens (B, T)
        right-padded, lengths (B,)."""
        return self(tokens).gather(1, lengths[:, None] - 1)[:, 0]

    def last_state(self, tokens, lengths):
        """What the head reads there, (B, C)."""
        return self.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def logprobs(self, tokens, mask, temperature=1.0, entropy=False, entropy_grad=False):
        """Log-probability of each token that the mask names, given those before it.

        tokens (B, T) int64; mask (B, T) bool, its first column is ignored (nothing precedes it). Returns (B,
        T) in nats: column t is log p(tokens[:, t] | tokens[:, :t]), 0 outside the mask. With entropy=True
        also the entropy of each of those distributions, (B, T); only entropy_grad=True keeps what its
        gradient would need. Logits exist only where the mask is true, and for some 16 million numbers at a
        time. The backward pass computes them again."""
        mask = mask.clone()
        mask[:, 0] = False
        # The state at column t − 1 has read tokens[:, :t], and predicts column t: hence the shift by one.
        x = self.hidden(tokens)[:, :-1][mask[:, 1:]]                                        # (n, C)
        rows = max(1, 2 ** 24 // self.config.vocab_size)
        read, found = self.read_logprobs, []
        if len(x) > rows and torch.is_grad_enabled():
            read = functools.partial(checkpoint, self.read_logprobs, use_reentrant=False)
        for some, chosen in zip(x.split(rows), tokens[mask].split(rows)):
            found.append(read(some, chosen, temperature, entropy, entropy_grad))
        columns = [torch.cat(parts) for parts in zip(*found)]
        zeros = torch.zeros(tokens.shape, dtype=columns[0].dtype, device=x.device)
        out = [zeros.masked_scatter(mask, column) for column in columns]
        return out if entropy else out[0]

    def read_logprobs(self, x, chosen, temperature, entropy, entropy_grad):
        """From states (n, C): the log-probability of each one's chosen token, (n,), and the entropy, (n,)."""
        logits = at_least_float32(self.unembed(x))                                          # (n, V)
        logp = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
        found = [logp.gather(-1, chosen[:, None])[:, 0]]
        if entropy:
            logp = logp if entropy_grad else logp.detach()
            found.append(-torch.linalg.vecdot(logp.exp(), logp))
        return found

    # ------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, prompts, lengths, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
                 seeds=None):
        """Continue each prompt until stop_token (kept) or for max_new_tokens.

        prompts (B, T) int64, right-padded; lengths (B,) int64, at least 1. temperature 0 is greedy. top_k 0
        and top_p 1 leave the distribution whole. seeds (B,) int64 give each row its own noise: a row's answer
        depends on its prompt and its seed, not on its neighbours, the batch or the process; None draws them
        from torch's generator.

        Returns tokens (B, T'), prompt then answer then zeros; mask (B, T') bool, true on what was generated;
        logprobs (B, T'), of each generated token at this temperature before top_k and top_p (for temperature
        0: at temperature 1). Raises ValueError if the longest prompt leaves no room for max_new_tokens, and
        for settings out of range."""
        B, longest = len(prompts), int(lengths.max())
        S = longest + max_new_tokens                                # positions that any row may come to use
        self.check_sampling(prompts, lengths, S, temperature, top_k, top_p)
        if seeds is None:
            seeds = torch.randint(2 ** 62, (B,)).to(prompts.device)
        column = torch.arange(S, device=prompts.device)
        tokens = F.pad(prompts[:, :longest], (0, max_new_tokens))
        tokens.masked_fill_(column >= lengths[:, None], 0)
        ends = lengths.clone()                                          # one past each row's last token
        x, cache = self.prefill(tokens[:, :longest], lengths, S)
        logprobs = torch.zeros(B, S, dtype=torch.promote_types(x.dtype, torch.float32), device=tokens.device)
        rows = torch.arange(B, device=tokens.device)                    # (b,): the rows still in the batch
        running = torch.ones_like(rows, dtype=torch.bool)               # (b,): those that have not ended
        for step in range(max_new_tokens):
            position = lengths[rows] + step
            logits = at_least_float32(self.unembed(x))
            p = (logits / (temperature or 1.0)).softmax(dim=-1)                                 # (b, V)
            u = uniform(seeds[rows], step)
            chosen = sample(p, top_k, top_p, u) if temperature > 0 else logits.argmax(dim=-1)
            tokens[rows, position] = chosen * running
            logprobs[rows, position] = p.gather(-1, chosen[:, None])[:, 0].log() * running
            ends[rows] += running
            if stop_token is not None:
                running = running & (chosen != stop_token)
            if step + 1 == max_new_tokens:
                break
            # Rows that have ended leave the batch when they are a fifth of it: copying the cache takes about
            # as long as a step. Until then they go on, and nothing of that is written.
            if (step + 1) % self.look_every == 0:
                alive = int(running.sum())
                if self.rows_left(alive) == 0:
                    break
                if 0 < alive <= 0.8 * len(rows):
                    rows, chosen, position = rows[running], chosen[running], position[running]
                    for i, layer in enumerate(cache):           # one after the other, not all twice in memory
                        cache[i] = layer[:, running]
                    running = running[running]
            reach = longest + step + 1                                  # no row's position is beyond this
            x = self.hidden(chosen[:, None], position[:, None],
                            [layer[:, :, :, :reach] for layer in cache])[:, 0]
        T = int(ends.max())
        mask = (column >= lengths[:, None]) & (column < ends[:, None])
        return tokens[:, :T], mask[:, :T], logprobs[:, :T]

    def check_sampling(self, prompts, lengths, S, temperature, top_k, top_p):
        if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError("generate: temperature and top_k must be at least 0, top_p in (0, 1]")
        if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
            raise ValueError(f"generate: lengths must lie between 1 and {prompts.shape[1]}")
        if S > self.config.block_size:
            raise ValueError(f"generate: the longest prompt and its answer may take {S} tokens, which do not "
                             f"fit block_size {self.config.block_size}")

    def prefill(self, tokens, lengths, S):
        """Read whole prompts: the state (B, C) at each one's last token, which chooses the next, and a cache
        with room for S positions, (2, B, H_kv, S, D) for each layer."""
        dtype, device = self.norm.weight.dtype, tokens.device
        shape = (2, len(tokens), self.config.n_kv_head, S, self.config.head_dim)
        cache = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks]
        x = self.hidden(tokens, cache=cache)
        return x[torch.arange(len(tokens), device=device), lengths - 1], cache

    def rows_left(self, alive):
        """How many rows go on, of `alive` here; processes that can only sample together count all theirs."""
        return alive

    # ---------------------------------------------------------------------------------------- files

    def save(self, folder, **how):
        """Write the network as a Hugging Face model folder: see runtime/folders.py."""
        from runtime import folders  # here, because the network itself needs nothing else of this project
        folders.save(self, folder, **how)

    @classmethod
    def load(cls, folder, head=None, device="cpu", mapped=False):
        """The network in a Hugging Face model folder, ours or anyone's: see runtime/folders.py. head: as it
        is there if None; another kind starts that head anew on the same trunk (a reward model from a language
        model). Raises ValueError saying which file does not fit, and how."""
        from runtime import folders
        return folders.load(folder, head, mapped).to(device)


def uniform(seeds, step):
    """One number in (0, 1) per row from seeds (b,) int64 and the step: the SplitMix64 finaliser (Steele et
    al. 2014). A counter, not a generator's state: noise depends on neither batch, process nor device."""
    def shift(z, n):                                           # logical shift right: int64 has only the other
        return (z >> n) & ((1 << (64 - n)) - 1)
    z = seeds * -7046029254386353131 + (step + 1) * -7723592293110705685 % 2 ** 63
    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    z = z ^ shift(z, 31)
    if z.device.type == "mps":                                      # has no float64
        return (shift(z, 40).float() + 0.5) / 2 ** 24
    return (shift(z, 11).double() + 0.5) / 2 ** 53


def sample(p, top_k, top_p, u):
    """One token per row from probabilities p (b, V): where their cumulative sum passes u (b,), in (0, 1).
    top_k keeps the k likeliest; top_p then the fewest that hold that share of them (Holtzman et al. 2020)."""
    if top_k or top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        if top_k:
            ranked[:, top_k:] = 0
        beyond = ranked.cumsum(-1) - ranked >= top_p * ranked.sum(-1, keepdim=True)
        beyond[:, 0] = False                                        # the likeliest always stays
        p = torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(beyond, 0))
    cumulative = p.cumsum(dim=-1)
    # Reaching u of the total, which rounding puts off 1, always lands on a token of probability above 0.
    u = u.to(cumulative.dtype).clamp(min=torch.finfo(cumulative.dtype).tiny)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:])[:, 0]
