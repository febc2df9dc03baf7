"""A GPT in one file: the network, sampling with a KV cache, a scalar head, LoRA.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=1024))
    logits = model(tokens)                                  # (B, T) -> (B, T, V)
    logprobs = model.logprobs(tokens, mask)                 # (B, T), 0 where mask is false
    tokens, mask, logprobs = model.generate(prompts, lengths, 64, stop_token=end)

The defaults are GPT-2 (Radford et al. 2019). Others give a Llama (Touvron et al. 2023), a Mistral or a Qwen:

    GPTConfig(vocab_size=32000, block_size=4096, n_layer=32, n_head=32, n_embd=4096, mlp_hidden=11008,
              positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)         # Llama 2 7B

All `tokens` (B, T) are padded on the right. Attention is causal, so no token attends to the padding after it,
and no padding mask is needed. There is no dropout: the training data is used only a few times, and in PPO the
new log-probabilities must differ from the old ones only because of the update, not because of dropout noise.

Shapes: B rows, T tokens (T' with answers), V vocabulary, C channels, H heads (H_kv of keys and values), D
channels per head, S cached positions, r an adapter's rank, b rows still being sampled, n tokens in a mask.
"""
import math
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a network. A value that is impossible raises ValueError, which names its field."""
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64; chat tokens use some extra ids
    block_size: int = 1024         # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0             # key/value heads (fewer than n_head: grouped-query attention); 0 is n_head
    head_dim: int = 0              # channels per head; 0 means n_embd / n_head
    mlp_hidden: int = 0            # width inside the MLP; 0 means 4·n_embd
    positions: Literal["learned", "rotary"] = "learned"         # rotary: Su et al. 2021
    rope_theta: float = 10000.0    # base of the rotary frequencies
    rope_scaling: dict = None      # Llama 3's frequency scaling for contexts longer than in pretraining
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"         # rmsnorm: Zhang & Sennrich 2019
    norm_eps: float = 1e-5
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"   # GPT-2's approximation; swiglu: Shazeer 2020
    bias: bool = True              # in linear layers and LayerNorm
    qkv_bias: bool = False         # in the query, key and value layers even if bias is False (Qwen 2)
    qk_norm: bool = False          # RMSNorm of each head's queries and keys (Qwen 3)
    tied: bool = True              # the output layer uses the weights of the token embedding
    folder: str = field(default="", compare=False, repr=False)      # where the weights come from
    source: dict = field(default=None, compare=False, repr=False)   # the config.json there; save() keeps it

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for f in fields(self):
            x = getattr(self, f.name)
            choices = (True, False) if f.type is bool else get_args(f.type)
            if f.type in (int, float):
                fits = type(x) in (f.type, int) and (0 < x < math.inf or x == f.default)
                expected = f"a positive {f.type.__name__}"
            else:
                fits, expected = not choices or x in choices, f"one of {choices}"
            if not fits:
                raise ValueError(f"GPTConfig.{f.name} must be {expected}, not {x!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig.n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"GPTConfig.n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError("GPTConfig: rotary positions need an even number of channels per head")


def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rotation(config, positions, dtype):
    """cos and sin of the angles position·theta^(-2i/D), i = 0 .. D/2 − 1 (Su et al. 2021): each (..., D/2)
    for positions (...), in float32 or finer, because bfloat16 cannot tell late positions apart. rope_scaling
    adapts the frequencies to longer contexts, as Llama 3.1 does: frequencies with more than high_freq_factor
    periods in the original context are unchanged, those with fewer than low_freq_factor are divided by
    factor, and those between are interpolated."""
    half, dtype = config.head_dim // 2, torch.promote_types(dtype, torch.float32)
    f = config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    if config.rope_scaling:
        s = config.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        periods = s["original_max_position_embeddings"] * f / (2 * math.pi)
        unchanged = ((periods - low) / (high - low)).clamp(0, 1)
        f = unchanged * f + (1 - unchanged) * f / s["factor"]
    angles = positions.to(dtype)[..., None] * f
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, D) by their angles (Su et al. 2021, eq. 34)."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)             # (1, T, D/2) or (B, 1, T, D/2), for all heads
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """y = W·x + b, or with a LoRA adapter y = W·x + b + (α/r)·B·A·x, where only A (r, C_in) and B (C_out, r)
    are trained (Hu et al. 2021, eq. 3). alpha (α) sets the scale of what the adapter adds.

    LoRA assumes that fine-tuning changes W by a matrix of low rank. B·A has only r·(C_in + C_out) numbers to
    train. B starts at 0, so that training starts from W. If A were 0 too, neither would get a gradient. B·A
    is a sum of r terms, and is divided by r so that one learning rate suits every rank."""
    scale = 0.0                                                 # α/r; 0 without an adapter

    def add_adapter(self, rank, alpha):
        self.A = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + F.linear(self.scale * F.linear(x, self.A), self.B) if self.scale else y

    def matrix(self, whole=lambda x: x):
        """W + (α/r)·B·A. If tensors are sharded over processes, whole(tensor) must return the full tensor."""
        W = whole(self.weight)
        return W + self.scale * whole(self.B) @ whole(self.A) if self.scale else W

    def merge(self):
        """Make W + (α/r)·B·A the weight, and remove the adapter."""
        self.weight = nn.Parameter(self.matrix().detach())
        self.scale, self.A, self.B = 0.0, None, None


class Positions(NamedTuple):
    """The positions of the tokens in one forward pass, computed once for all layers."""
    index: torch.Tensor                 # (T,) for whole sequences; (B, 1) for one new token per row
    rotation: tuple = None              # (cos, sin), if positions are rotary
    additive_mask: torch.Tensor = None  # (B, 1, 1, S) for new tokens: 0 up to their own position, −∞ after it


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.is_grouped = config, config.n_kv_head < config.n_head
        C, D, qkv_bias = config.n_embd, config.head_dim, config.bias or config.qkv_bias
        self.q = Linear(C, config.n_head * D, bias=qkv_bias)
        self.k = Linear(C, config.n_kv_head * D, bias=qkv_bias)
        self.v = Linear(C, config.n_kv_head * D, bias=qkv_bias)
        self.out = Linear(config.n_head * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)

    def forward(self, x, positions, cache=None):
        """x (B, T, C) to (B, T, C). Whole sequences attend to themselves, and store their keys and values in
        the cache (2, B, H_kv, S, D) if there is one. With an additive mask, x is one new token per row. It
        stores its key and value in its row of the cache, and attends to this row."""
        (B, T, _), mask = x.shape, positions.additive_mask
        q, k, v = (y.view(B, T, -1, self.config.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                    # (B, H, T, D)
        if positions.rotation:
            q, k = rotate(q, *positions.rotation), rotate(k, *positions.rotation)
        if mask is not None:
            slots = torch.arange(B, device=x.device), slice(None), positions.index[:, 0]
            cache[0][slots], cache[1][slots] = k[:, :, 0], v[:, :, 0]
            k, v = cache
            # The queries that share a key head are rows of one product, which reads the cache once for all.
            q = q.reshape(B, self.config.n_kv_head, -1, self.config.head_dim)
        elif cache is not None:
            # This also stores keys and values of padding. It is harmless: a new token overwrites the slot at
            # its position before any query may attend to it.
            cache[0, :, :, :T], cache[1, :, :, :T] = k, v
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                           enable_gqa=self.is_grouped and mask is None)
        y = y.reshape(B, self.config.n_head, T, self.config.head_dim)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, positions, cache=None, recompute=False):
        if recompute:   # in here: around the call, FSDP's hooks would run once more in the backward pass
            return checkpoint(self.forward, x, positions, use_reentrant=False)
        x = x + self.attention(self.norm1(x), positions, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """head="lm" gives logits of the next token; head="scalar" gives one number per position (a reward or a
    value). checkpoint_blocks = True saves memory: the backward pass recomputes each block's activations."""

    def __init__(self, config, head="lm"):
        super().__init__()
        if head not in ("lm", "scalar"):
            raise ValueError(f'GPT: head must be "lm" or "scalar", not {head!r}')
        self.config, self.head_kind, self.checkpoint_blocks = config, head, False
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
        for block in self.blocks:   # GPT-2: 2·n_layer additions, so their variance does not grow with depth
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if self.head_kind == "scalar" and module is self.head:
            # As in Stiennon et al. 2020 (the + 1 matters little). The norm gives C channels of variance 1, so
            # scores start with variance 1: they differ, but no comparison is nearly certain at first.
            nn.init.normal_(module.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    def add_adapters(self, rank, alpha, targets):
        """Freeze the network except for a scalar head, and add an adapter (see Linear) to each linear layer
        that targets names: "q", "k", "v", "out", "gate", "up", "down"."""
        self.requires_grad_(False)
        for name, module in self.blocks.named_modules():
            if name.split(".")[-1] in targets:
                module.add_adapter(rank, alpha)
        if self.head_kind == "scalar":
            self.head.requires_grad_(True)

    def adapted(self):
        """Return {name: Linear} of the layers that have an adapter."""
        return {name: module for name, module in self.named_modules() if getattr(module, "scale", 0)}

    def hidden(self, tokens, index=None, cache=None):
        """Hidden states before the head (B, T, C), of tokens (B, T). index: see Positions, cache: prefill."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        if index is None:
            index = torch.arange(T, device=tokens.device)
        x, cos_sin, mask = self.token_embedding(tokens), None, None
        if self.config.positions == "learned":
            x = x + self.position_embedding(index)
        else:
            cos_sin = rotation(self.config, index, x.dtype)
        if index.dim() == 2:                                                # one new token per row
            later = torch.arange(cache[0].shape[3], device=tokens.device) > index               # (B, S)
            mask = x.new_zeros(later.shape).masked_fill_(later, -torch.inf)[:, None, None]
        recompute = self.checkpoint_blocks and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            x = block(x, Positions(index, cos_sin, mask), cache[i] if cache else None, recompute)
        return self.norm(x)

    def unembedding(self):
        """The matrix W (V, C) of `unembed`, on CUDA in float32 or finer. There a run in bfloat16 multiplies
        float32 in TF32, which holds bfloat16 numbers exactly, and results stay float32."""
        if self.head_kind != "lm":
            raise ValueError('this GPT has head="scalar": it gives scores, not tokens')
        W = self.token_embedding.weight if self.config.tied else self.head.weight
        return W.to(torch.promote_types(W.dtype, torch.float32)) if W.is_cuda else W

    def unembed(self, x, W):
        """Compute logits (..., V), in float32 or finer, from hidden states x (..., C)."""
        logits = F.linear(x.to(torch.promote_types(x.dtype, W.dtype)), W)
        return logits.to(torch.promote_types(x.dtype, torch.float32))

    def forward(self, tokens):
        """Logits (B, T, V), or with a scalar head scores (B, T), for tokens (B, T) int64, right-padded."""
        x = self.hidden(tokens)
        if self.head_kind == "lm":
            return self.unembed(x, self.unembedding())
        return self.head(x.to(self.head.weight.dtype)).squeeze(-1)

    def score(self, tokens, lengths):
        """The scalar at each row's last token, the only one that attends to the whole row: (B,)."""
        return self(tokens).gather(1, lengths[:, None] - 1)[:, 0]       # a scalar head at all tokens is cheap

    def last_state(self, tokens, lengths):
        """The hidden state at each row's last token, (B, C)."""
        return self.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def logprobs(self, tokens, mask, temperature=1.0, entropy=False, entropy_grad=False):
        """The log-probability of each token where the mask is true, given the tokens before it.

        tokens (B, T) int64; mask (B, T) bool, whose first column is ignored, because no token precedes it.
        Returns (B, T) in nats: column t is log p(tokens[:, t] | tokens[:, :t]), 0 outside the mask. With
        entropy=True also returns the entropies of these distributions, (B, T). They have a gradient only with
        entropy_grad=True, because it costs memory. Logits are by far the largest tensor, V numbers per token.
        So they are computed only where the mask is true, in parts of at most 16 million numbers. If there are
        several parts, the backward pass recomputes the logits of each part."""
        mask = mask.clone()
        mask[:, 0] = False
        # The hidden state at column t − 1 depends on tokens[:, :t] and predicts column t: hence the shift.
        x = self.hidden(tokens)[:, :-1][mask[:, 1:]]                                        # (n, C)
        size = max(1, 2 ** 24 // self.config.vocab_size)                    # positions per part
        # One W for all parts: on CUDA its gradient adds up in float32 before it is rounded to bfloat16.
        args, parts = (self.unembedding(), temperature, entropy, entropy_grad), []
        for states, chosen in zip(x.split(size), tokens[mask].split(size)):
            if len(x) > size and torch.is_grad_enabled():
                parts.append(checkpoint(self.read_logprobs, states, chosen, *args, use_reentrant=False))
            else:
                parts.append(self.read_logprobs(states, chosen, *args))
        results = [torch.cat(pieces) for pieces in zip(*parts)]             # (n,) each
        out = [result.new_zeros(tokens.shape).masked_scatter(mask, result) for result in results]
        return out if entropy else out[0]

    def read_logprobs(self, x, chosen, W, temperature, entropy, entropy_grad):
        """[log-probabilities (n,) of the chosen tokens, entropies (n,) if asked], from states x (n, C)."""
        logits = self.unembed(x, W)                                                         # (n, V)
        logp = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
        result = [logp.gather(-1, chosen[:, None])[:, 0]]
        if entropy:
            logp = logp if entropy_grad else logp.detach()
            result.append(-torch.linalg.vecdot(logp.exp(), logp))
        return result

    @torch.no_grad()
    def generate(self, prompts, lengths, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
                 seeds=None, rows_left=int):                # with one process the sum is the number itself
        """Sample an answer to each prompt, until stop_token (included) or for max_new_tokens.

        prompts (B, T) int64, right-padded; lengths (B,) int64, at least 1. temperature 0 is greedy decoding.
        top_k 0 and top_p 1 keep all tokens. seeds (B,) int64, by default random, give each row its own noise,
        so that its answer depends on its prompt and its seed alone. rows_left: a function from this process's
        number of unfinished rows to the sum over all processes, because with sharded networks no process may
        stop before the others. Returns tokens (B, T'): prompt, answer, zeros; mask (B, T') bool, true on the
        answer; and logprobs (B, T') of the answer at this temperature (1 if greedy), before top_k and top_p.
        Raises ValueError if a setting is out of range or the prompts leave no room for max_new_tokens."""
        longest = int(lengths.max())
        S = longest + max_new_tokens
        self.check_sampling(prompts, lengths, S, temperature, top_k, top_p)
        if seeds is None:
            seeds = torch.randint(2 ** 62, (len(prompts),)).to(prompts.device)
        column = torch.arange(S, device=prompts.device)
        tokens = F.pad(prompts[:, :longest], (0, max_new_tokens)).masked_fill_(column >= lengths[:, None], 0)
        logits, cache = self.prefill(tokens[:, :longest], lengths, S)
        logprobs, ends = logits.new_zeros(tokens.shape), lengths.clone()
        rows = torch.arange(len(tokens), device=tokens.device)          # (b,): the rows still in the batch
        running = torch.ones_like(rows, dtype=torch.bool)               # (b,): true until the row ends
        for step in range(max_new_tokens):
            chosen, logp = choose(logits, temperature, top_k, top_p, uniform(seeds[rows], step))
            tokens[rows, lengths[rows] + step] = torch.where(running, chosen, 0)    # over the padding
            logprobs[rows, lengths[rows] + step] = torch.where(running, logp, 0)
            ends[rows] += running
            if stop_token is not None:
                running = running & (chosen != stop_token)
            if (step + 1) % (8 if tokens.is_cuda else 1) == 0:  # not every step: int() waits for the GPU
                unfinished = int(running.sum())
                if rows_left(unfinished) == 0:
                    break
                # Drop ended rows when they are a fifth of b or more: copying the cache costs about a step.
                if 0 < unfinished <= 0.8 * len(rows):
                    for i, layer in enumerate(cache):           # one by one: only one is twice in memory
                        cache[i] = layer[:, running]
                    rows, chosen, running = rows[running], chosen[running], running[running]
            if step + 1 < max_new_tokens:
                reach = longest + step + 1
                if tokens.is_cuda:              # a GPU may have to plan attention anew for each length
                    reach = min(S, 64 * math.ceil(reach / 64))
                logits = self.decode_one_token(chosen, lengths[rows] + step, cache, reach)
        T = int(ends.max())
        mask = (column >= lengths[:, None]) & (column < ends[:, None])
        return tokens[:, :T], mask[:, :T], logprobs[:, :T]

    def check_sampling(self, prompts, lengths, S, temperature, top_k, top_p):
        if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError("generate: temperature and top_k must be at least 0, top_p in (0, 1]")
        if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
            raise ValueError(f"generate: lengths must lie between 1 and {prompts.shape[1]}")
        if S > self.config.block_size:
            raise ValueError(f"generate: a prompt and its answer exceed block_size {self.config.block_size}")

    def prefill(self, tokens, lengths, S):
        """Run whole prompts: logits (B, V) of the next token, and each block's cache (2, B, H_kv, S, D): keys
        and values, so that a new token costs one column of work, not a pass over all tokens before it."""
        shape = (2, len(tokens), self.config.n_kv_head, S, self.config.head_dim)
        cache = [torch.zeros(shape, dtype=self.norm.weight.dtype, device=tokens.device) for _ in self.blocks]
        x = self.hidden(tokens, cache=cache)     # not last_state, after which FSDP frees the head's weights
        last = x[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return self.unembed(last, self.unembedding()), cache

    def decode_one_token(self, token, position, cache, end):
        """Run one more token per row, token (b,) at position (b,) < end: logits (b, V) of the next token."""
        x = self.hidden(token[:, None], position[:, None], [layer[:, :, :, :end] for layer in cache])
        return self.unembed(x[:, 0], self.unembedding())

    def save(self, folder, **how):
        """Write the network as a Hugging Face model folder: see runtime/folders.py."""
        from runtime import folders  # imported here, because the rest of this file works without the project
        folders.save(self, folder, **how)

    @classmethod
    def load(cls, folder, head=None, mapped=False):
        """Load the network of a Hugging Face model folder: see runtime/folders.py. head=None keeps its head;
        "scalar" puts a new one on a language model's trunk. A reward model has no "lm" head to load."""
        from runtime import folders
        return folders.load(folder, head, mapped)


def uniform(seeds, step):
    """One number in (0, 1) per row from seeds (b,) int64 and the step: the SplitMix64 finaliser (Steele et
    al. 2014). It has no state, so a row's noise does not depend on the batch, the process or the device."""
    def shift(z, n):                                    # a logical shift: int64's >> copies the sign bit
        return (z >> n) & ((1 << (64 - n)) - 1)
    GOLDEN, MIX1, MIX2 = (x - 2 ** 64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    z = seeds * GOLDEN + (step + 1) * MIX2 % 2 ** 63    # signed int64 holds constants − 2 ** 64
    z = (z ^ shift(z, 30)) * MIX1
    z = (z ^ shift(z, 27)) * MIX2
    z = z ^ shift(z, 31)
    if z.device.type == "mps":                          # which has no float64
        return (shift(z, 40).float() + 0.5) / 2 ** 24
    return (shift(z, 11).double() + 0.5) / 2 ** 53      # + 0.5, so that it is never exactly 0


def choose(logits, temperature, top_k, top_p, u):
    """The next token of each row (b,) and its log-probability (b,), from logits (b, V) and noise u (b,)."""
    p = (logits / (temperature or 1.0)).softmax(dim=-1)
    chosen = sample(p, top_k, top_p, u) if temperature > 0 else logits.argmax(dim=-1)
    return chosen, p.gather(-1, chosen[:, None])[:, 0].log()


def sample(p, top_k, top_p, u):
    """Sample one token per row, (b,), from probabilities p (b, V) and u (b,), uniform in (0, 1): cut (0, 1)
    into intervals of length p[i]; the interval that holds u is the sample (the inverse CDF). top_k keeps the
    k likeliest tokens; of these, top_p keeps the fewest with that share of p (Holtzman et al. 2020). u comes
    from the row's seed: torch.multinomial has one generator for all rows, which would then be dependent."""
    if top_k or top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        if top_k:
            ranked[:, top_k:] = 0
        beyond = ranked.cumsum(-1) - ranked >= top_p * ranked.sum(-1, keepdim=True)
        beyond[:, 0] = False                                        # always keep the likeliest token
        p = torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(beyond, 0))
    cumulative = p.cumsum(dim=-1)
    # Compare with u · total, because rounding makes the total differ from 1. Then a token of probability 0 is
    # never chosen. Clamp, because a coarser dtype may round u to 0, which would choose token 0 in any case.
    u = u.to(cumulative.dtype).clamp(min=torch.finfo(cumulative.dtype).tiny)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:])[:, 0]
