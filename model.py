"""A GPT in one file: the network, sampling with a KV cache, a scalar head, LoRA.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=1024))
    logits = model(tokens)                                  # (B, T) -> (B, T, V)
    logprobs = model.logprobs(tokens, mask)                 # (B, T), 0 where mask is false
    tokens, mask, logprobs = model.generate(prompts, lengths, 64, stop_token=end)

The defaults are GPT-2 (Radford et al. 2019). Other values make the same code a Llama, a Mistral or a Qwen:

    GPTConfig(32000, 4096, 32, 32, 4096, mlp_hidden=11008, positions="rotary", norm="rmsnorm", mlp="swiglu",
              bias=False, tied=False)                       # Llama 2 7B (Touvron et al. 2023)

All `tokens` (B, T) are padded on the right. Attention is causal, so no token sees the padding that follows
it, and no padding mask is needed. There is no dropout: the data is read only a few times, and in PPO the new
log-probabilities must differ from the old ones by the update alone.

Shapes: B rows, T tokens, V vocabulary, C channels, H heads, D channels per head, S positions in the cache,
b rows that are still being sampled, n positions where a mask is true.
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
    """The shape of a network. Raises ValueError naming the first field whose value is impossible."""
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64; the chat tokens live in the padding
    block_size: int = 1024         # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0             # grouped-query attention: key and value heads; 0 means as many as n_head
    head_dim: int = 0              # channels per head; 0 means n_embd / n_head
    mlp_hidden: int = 0            # width inside the MLP; 0 means 4·n_embd
    positions: Literal["learned", "rotary"] = "learned"         # rotary: Su et al. 2021
    rope_theta: float = 10000.0    # base of the rotary frequencies
    rope_scaling: dict = None      # Llama 3's, for sequences longer than those of its first training
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"         # rmsnorm: Zhang & Sennrich 2019
    norm_eps: float = 1e-5
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"   # GPT-2's approximation; swiglu: Shazeer 2020
    bias: bool = True              # in linear layers and LayerNorm
    qkv_bias: bool = False         # in queries, keys and values alone (Qwen 2), where bias is off
    qk_norm: bool = False          # RMSNorm of each head's queries and keys (Qwen 3)
    tied: bool = True              # the token embedding doubles as the output layer
    folder: str = field(default="", compare=False, repr=False)      # where the weights come from
    source: dict = field(default=None, compare=False, repr=False)   # its config.json, which save() keeps

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
    """cos and sin of the angles position·theta^(-2i/D), i = 0 .. D/2 − 1 (Su et al. 2021): (T, D/2) for
    positions (T,), or (B, 1, 1, D/2) for positions (B, 1), one per row. In float32 or finer: bfloat16 cannot
    tell late positions apart. rope_scaling adapts the frequencies to longer sequences, as Llama 3.1 does:
    waves that repeat more than `high_freq_factor` times within the context of the first training are kept,
    those that repeat less than `low_freq_factor` times are slowed down by `factor`, others interpolated."""
    half, dtype = config.head_dim // 2, torch.promote_types(dtype, torch.float32)
    f = config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    if config.rope_scaling:
        s = config.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        repeats = s["original_max_position_embeddings"] * f / (2 * math.pi)
        kept = ((repeats - low) / (high - low)).clamp(0, 1)
        f = kept * f + (1 - kept) * f / s["factor"]
    angles = positions.to(dtype)[..., None] * f
    if angles.dim() == 3:
        angles = angles[:, None]                                                # the same for every head
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + D/2) of x (B, H, T, D) by their angles (Su et al. 2021, eq. 34)."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """y = W·x + b; with an adapter y = W·x + b + (α/r)·B·A·x, where only A (r, C_in) and B (C_out, r) are
    trained: LoRA (Hu et al. 2021, eq. 3).

    What fine-tuning adds to W is close to a matrix of low rank. As B·A it has r·(C_in + C_out) numbers, and
    only these need gradients and Adam's moments. B starts at 0, so that training starts from W. The sum over
    r terms grows with r; divided by r, the same learning rate serves for every rank."""
    scale = 0.0                                                 # α/r; 0 without an adapter

    def add_adapter(self, rank, alpha):
        self.A = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + F.linear(self.scale * F.linear(x, self.A), self.B) if self.scale else y

    def matrix(self, whole=lambda x: x):
        """W + (α/r)·B·A. whole: a function that gathers a tensor which is sharded over processes."""
        W = whole(self.weight)
        return W + self.scale * whole(self.B) @ whole(self.A) if self.scale else W

    def merge(self):
        """Make W + (α/r)·B·A the weight, and drop the adapter."""
        self.weight = nn.Parameter(self.matrix().detach())
        self.scale, self.A, self.B = 0.0, None, None


class Positions(NamedTuple):
    """The positions of a forward pass's tokens, as all layers use them."""
    index: torch.Tensor             # (T,) for whole sequences; (B, 1) for one new token per row
    rotation: tuple = None          # their cos and sin, if positions are rotary
    visible: torch.Tensor = None    # (B, 1, 1, S) for new tokens: 0 up to their own position, −∞ beyond it


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
        """x (B, T, C) to (B, T, C): whole sequences, which write their keys and values into the cache (2, B,
        H_kv, S, D) if there is one, or one new token per row (T = 1), which attends to its row's cache."""
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.config.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                    # (B, H, T, D)
        if positions.rotation:
            q, k = rotate(q, *positions.rotation), rotate(k, *positions.rotation)
        if positions.visible is not None:
            here = torch.arange(B, device=x.device), slice(None), positions.index[:, 0]
            cache[0][here], cache[1][here] = k[:, :, 0], v[:, :, 0]
            k, v = cache
        elif cache is not None:         # padding's too: no token sees them before its own overwrite them
            cache[0, :, :, :T], cache[1, :, :, :T] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=positions.visible, enable_gqa=self.is_grouped,
                                           is_causal=positions.visible is None)
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
        if recompute:   # in here, so that the hooks of a wrapped block (FSDP, torch.compile) run only once
            return checkpoint(self.forward, x, positions, use_reentrant=False)
        x = x + self.attention(self.norm1(x), positions, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """head="lm" gives logits of the next token; head="scalar" one number per position (a reward or a value).
    checkpoint_blocks = True recomputes each block's activations in the backward pass, to save memory."""

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
        for block in self.blocks:       # GPT-2: the residual stream is a sum of 2L terms; keep its size at 1
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if self.head_kind == "scalar" and module is self.head:
            # The final norm gives C channels of variance 1, so that w·x has variance C·std². With this std
            # scores start with a standard deviation of about 1 (Stiennon et al. 2020): large enough to tell
            # answers apart, small enough that no comparison starts as a near certainty.
            nn.init.normal_(module.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    def add_adapters(self, rank, alpha, targets):
        """Freeze the network except for a scalar head, and give an adapter (see Linear) to each linear layer
        named in targets: "q", "k", "v", "out", "gate", "up", "down"."""
        self.requires_grad_(False)
        for name, module in self.blocks.named_modules():
            if name.split(".")[-1] in targets:
                module.add_adapter(rank, alpha)
        if self.head_kind == "scalar":
            self.head.requires_grad_(True)

    def adapted(self):
        """{name: Linear} of the layers that have an adapter."""
        return {name: module for name, module in self.named_modules() if getattr(module, "scale", 0)}

    def hidden(self, tokens, index=None, cache=None):
        """States (B, T, C) under the head, of tokens (B, T). index: see Positions; cache: see prefill."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        if index is None:
            index = torch.arange(T, device=tokens.device)
        x, turns, visible = self.token_embedding(tokens), None, None
        if self.config.positions == "learned":
            x = x + self.position_embedding(index)
        else:
            turns = rotation(self.config, index, x.dtype)
        if index.dim() == 2:
            ahead = torch.arange(cache[0].shape[3], device=tokens.device) > index               # (B, S)
            visible = x.new_zeros(ahead.shape).masked_fill_(ahead, -torch.inf)[:, None, None]
        recompute = self.checkpoint_blocks and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            x = block(x, Positions(index, turns, visible), cache[i] if cache else None, recompute)
        return self.norm(x)

    def unembed(self, x):
        """Hidden states (..., C) to logits (..., V), in float32 or finer."""
        if self.head_kind != "lm":
            raise ValueError('this GPT has head="scalar": it gives scores, not tokens')
        W = self.token_embedding.weight if self.config.tied else self.head.weight
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.is_cuda:       # as TF32, which holds bfloat16 exactly: sums in float32, not rounded at the end
            x, W = x.to(dtype), W.to(dtype)
        return F.linear(x, W).to(dtype)

    def forward(self, tokens):
        """tokens (B, T) int64, right-padded: logits (B, T, V), or one scalar per position (B, T)."""
        x = self.hidden(tokens)
        if self.head_kind == "lm":
            return self.unembed(x)
        return self.head(x.to(self.head.weight.dtype)).squeeze(-1)

    def score(self, tokens, lengths):
        """The scalar at each row's last token, the only one that has seen the whole row: (B,)."""
        return self(tokens).gather(1, lengths[:, None] - 1)[:, 0]

    def last_state(self, tokens, lengths, cache=None):
        """The hidden state at each row's last token, (B, C). cache: see prefill."""
        x = self.hidden(tokens, cache=cache)
        return x[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def logprobs(self, tokens, mask, temperature=1.0, entropy=False, entropy_grad=False):
        """The log-probability of each token where the mask is true, given the tokens before it.

        tokens (B, T) int64; mask (B, T) bool, whose first column is ignored (nothing precedes it). Returns
        (B, T) in nats: column t is log p(tokens[:, t] | tokens[:, :t]), 0 outside the mask. With entropy=True
        also the entropies of these distributions, (B, T), which have a gradient only if entropy_grad is True:
        it costs memory. Logits are by far the largest tensor, V numbers per token, and nobody needs those of
        prompts and padding. So they are computed only where the mask is true, and at most 16 million numbers
        at a time, which the backward pass computes again."""
        mask = mask.clone()
        mask[:, 0] = False
        # The state at column t − 1 has read tokens[:, :t], and predicts column t: hence the shift by one.
        x = self.hidden(tokens)[:, :-1][mask[:, 1:]]                                        # (n, C)
        rows = max(1, 2 ** 24 // self.config.vocab_size)
        args, parts = (temperature, entropy, entropy_grad), []
        for some, chosen in zip(x.split(rows), tokens[mask].split(rows)):
            if len(x) > rows and torch.is_grad_enabled():
                parts.append(checkpoint(self.read_logprobs, some, chosen, *args, use_reentrant=False))
            else:
                parts.append(self.read_logprobs(some, chosen, *args))
        columns = [torch.cat(pieces) for pieces in zip(*parts)]
        out = [column.new_zeros(tokens.shape).masked_scatter(mask, column) for column in columns]
        return out if entropy else out[0]

    def read_logprobs(self, x, chosen, temperature, entropy, entropy_grad):
        """From states x (n, C): [log-probabilities of their chosen next tokens (n,), and entropies (n,)]."""
        logits = self.unembed(x)                                                            # (n, V)
        logp = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
        result = [logp.gather(-1, chosen[:, None])[:, 0]]
        if entropy:
            logp = logp if entropy_grad else logp.detach()
            result.append(-torch.linalg.vecdot(logp.exp(), logp))
        return result

    @torch.no_grad()
    def generate(self, prompts, lengths, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
                 seeds=None, rows_left=int):
        """Continue each prompt until stop_token (included) or for max_new_tokens.

        prompts (B, T) int64, right-padded; lengths (B,) int64, at least 1. temperature 0 is greedy; top_k 0
        and top_p 1 keep all tokens. seeds (B,) int64 give each row its own noise: its answer depends on its
        prompt and its seed, not on its neighbours, the batch or the process. None draws them from torch's
        generator. Returns tokens (B, T'): prompt, answer, zeros; mask (B, T') bool, true on the answer; and
        logprobs (B, T') of the answer's tokens at this temperature (1 if greedy), before top_k and top_p.
        Raises ValueError for settings out of range, and if the prompts leave no room for max_new_tokens.
        rows_left: sums the running rows over processes, where none may stop before the others."""
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
        running = torch.ones_like(rows, dtype=torch.bool)               # (b,): whether they have not ended
        for step in range(max_new_tokens):
            chosen, logp = choose(logits, temperature, top_k, top_p, uniform(seeds[rows], step))
            tokens[rows, lengths[rows] + step] = chosen * running
            logprobs[rows, lengths[rows] + step] = logp * running
            ends[rows] += running
            if stop_token is not None:
                running = running & (chosen != stop_token)
            if (step + 1) % (8 if tokens.is_cuda else 1) == 0:          # seldom: a GPU has to be waited for
                alive = int(running.sum())
                if rows_left(alive) == 0:
                    break
                # Rows that have ended leave when they are a fifth: copying the cache takes as long as a step.
                if 0 < alive <= 0.8 * len(rows):
                    for i, layer in enumerate(cache):           # one after the other, not all twice in memory
                        cache[i] = layer[:, running]
                    rows, chosen, running = rows[running], chosen[running], running[running]
            if step + 1 < max_new_tokens:
                logits = self.decode_one_token(chosen, lengths[rows] + step, cache, longest + step + 1)
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
        """Read whole prompts: logits (B, V) of the next token, and each block's cache (2, B, H_kv, S, D)."""
        shape = (2, len(tokens), self.config.n_kv_head, S, self.config.head_dim)
        cache = [torch.zeros(shape, dtype=self.norm.weight.dtype, device=tokens.device) for _ in self.blocks]
        return self.unembed(self.last_state(tokens, lengths, cache)), cache

    def decode_one_token(self, token, position, cache, end):
        """Read one more token per row, token (b,) at position (b,): the logits (b, V) of the next. All
        positions are below end, so that the cache is not read beyond."""
        x = self.hidden(token[:, None], position[:, None], [layer[:, :, :, :end] for layer in cache])
        return self.unembed(x[:, 0])

    def save(self, folder, **how):
        """Write the network as a Hugging Face model folder: see runtime/folders.py."""
        from runtime import folders  # here, because the network itself needs nothing else of this project
        folders.save(self, folder, **how)

    @classmethod
    def load(cls, folder, head=None, mapped=False):
        """The network in a Hugging Face model folder: see runtime/folders.py. head: None keeps the folder's;
        the other kind starts a new head on the same trunk (a reward model from a language model)."""
        from runtime import folders
        return folders.load(folder, head, mapped)


def uniform(seeds, step):
    """One number in (0, 1) per row from seeds (b,) int64 and the step: the SplitMix64 finaliser (Steele et
    al. 2014). It has no state: a row's noise does not depend on the batch, the process or the device."""
    def shift(z, n):                                           # logical shift right: int64 has only the other
        return (z >> n) & ((1 << (64 - n)) - 1)
    z = seeds * -7046029254386353131 + (step + 1) * -7723592293110705685 % 2 ** 63
    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    z = z ^ shift(z, 31)
    if z.device.type == "mps":                                      # has no float64
        return (shift(z, 40).float() + 0.5) / 2 ** 24
    return (shift(z, 11).double() + 0.5) / 2 ** 53


def choose(logits, temperature, top_k, top_p, u):
    """Each row's next token, (b,), from logits (b, V) and noise u (b,), and its log-probability, (b,)."""
    p = (logits / (temperature or 1.0)).softmax(dim=-1)
    chosen = sample(p, top_k, top_p, u) if temperature > 0 else logits.argmax(dim=-1)
    return chosen, p.gather(-1, chosen[:, None])[:, 0].log()


def sample(p, top_k, top_p, u):
    """One token per row from probabilities p (b, V): the first at which their cumulative sum reaches u (b,),
    uniform in (0, 1). top_k keeps the k likeliest tokens; top_p then the fewest that hold that share of their
    probability (Holtzman et al. 2020).
    This inverts the cumulative distribution function (CDF): token i's interval has length p[i]. It needs one
    random number per row, which comes from the row's seed; torch.multinomial would draw from one generator
    for the whole batch, and a row's answer would depend on its neighbours."""
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
