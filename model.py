"""A GPT in one file: the network, sampling with a KV cache, a scalar head, loading and saving.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=1024))
    logits = model(tokens)                                  # (B, T) -> (B, T, V)
    logprobs = model.logprobs(tokens, mask)                 # (B, T), 0 where mask is false
    answers = model.generate(prompts, lengths, 64, stop_token=end)

The defaults are GPT-2 (Radford et al. 2019). Switches in the config turn the same code into a Llama-shaped
network: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

One layout everywhere: `tokens` (B, T) is right-padded, so causal attention never sees padding and needs no
mask: what stands to the right of a token cannot reach it.

Letters in shapes: B rows, T tokens, V vocabulary, C channels, H heads, D channels per head, L layers; S
positions of the cache, b rows that are still being sampled, n positions that a mask names.

Left out: dropout (small data is read a few times here, and PPO has to do without it, because the new
log-probabilities must differ from the old ones by the update alone), and biases of attention scores.
"""
import json
import math
import mmap
import os
import struct
from dataclasses import asdict, dataclass, fields

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
    mlp_hidden: int = 0            # width inside the MLP; 0 means 4·n_embd
    positions: str = "learned"     # or "rotary" (Su et al. 2021)
    rope_theta: float = 10000.0    # base of the rotary frequencies
    norm: str = "layernorm"        # or "rmsnorm" (Zhang & Sennrich 2019)
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"         # GPT-2's approximation; or "gelu" itself, or "swiglu" (Shazeer 2020)
    bias: bool = True              # in linear layers and LayerNorm
    tied: bool = True              # the token embedding doubles as the output layer

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "mlp_hidden"):
            value, least = getattr(self, name), 0 if name == "mlp_hidden" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"GPTConfig.{name} must be a whole number of at least {least}, "
                                 f"not {value!r}")
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd
        for name in ("rope_theta", "norm_eps"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"GPTConfig.{name} must be a number above 0, not {getattr(self, name)!r}")
        for name, choices in (("positions", ("learned", "rotary")), ("norm", ("layernorm", "rmsnorm")),
                              ("mlp", ("gelu_tanh", "gelu", "swiglu")),
                              ("bias", (True, False)), ("tied", (True, False))):
            if getattr(self, name) not in choices:
                raise ValueError(f"GPTConfig.{name} must be one of {choices}, not {getattr(self, name)!r}")
        for big, small in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
            if getattr(self, big) % getattr(self, small):
                raise ValueError(f"GPTConfig.{big} {getattr(self, big)} is not a multiple of "
                                 f"{small} {getattr(self, small)}")
        if self.positions == "rotary" and (self.n_embd // self.n_head) % 2:
            raise ValueError("GPTConfig: rotary positions need an even number of channels per head")


# -------------------------------------------------------------------------------------- the network

def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, positions, theta):
    """Rotary positions (Su et al. 2021, eq. 34): turn channel pairs (i, i + D/2) of x (B, H, T, D) by
    p·theta^(-2i/D).

    positions is (T,), or (B, 1) when each row stands somewhere else. Pairs are split by halves, as Llama's
    published weights have them. Angles need float32: bfloat16 cannot tell late positions apart."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = positions.to(dtype)[..., None] * frequencies            # (T, D/2) or (B, 1, D/2)
    if angles.dim() == 3:
        angles = angles[:, None]                                     # (B, 1, 1, D/2): the same for every head
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half].to(dtype), x[..., half:].to(dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.n_embd // config.n_head
        self.kv_width = config.n_kv_head * self.head_dim
        self.qkv = nn.Linear(config.n_embd, config.n_embd + 2 * self.kv_width, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, positions, cache=None):
        """x (B, T, C). positions (T,): whole sequences, whose keys and values are kept in the cache if there
        is one. positions (B, 1): one new token per row, T = 1, which looks back through the cache (2, B,
        H_kv, S, D)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).split([C, self.kv_width, self.kv_width], dim=-1)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))      # (B, H, T, D)
        if self.config.positions == "rotary":
            q, k = (rotate(y, positions, self.config.rope_theta) for y in (q, k))
        if positions.dim() == 2:
            y = self.look_back(q, k, v, positions, cache)
        else:
            if cache is not None:   # padding writes keys too: look_back masks them till tokens overwrite them
                cache[0, :, :, :T], cache[1, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def look_back(self, q, k, v, positions, cache):
        """Attention of one query per row: q (B, H, 1, D) over the row's cached keys up to its own position.
        Written out, because plain products beat the fused kernel for a single query, and rows differ in
        length."""
        rows = torch.arange(len(q), device=q.device)
        cache[0][rows, :, positions[:, 0]] = k[:, :, 0]
        cache[1][rows, :, positions[:, 0]] = v[:, :, 0]
        keys, values = cache
        q = q.view(len(q), keys.shape[1], -1, self.head_dim)                            # (B, H_kv, H/H_kv, D)
        scores = q @ keys.transpose(-1, -2) / math.sqrt(self.head_dim)                  # (B, H_kv, H/H_kv, S)
        future = torch.arange(keys.shape[2], device=q.device) > positions                   # (B, S)
        weights = scores.masked_fill(future[:, None, None], -torch.inf).softmax(dim=-1)
        return (weights @ values).reshape(len(q), -1, 1, self.head_dim)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated, self.approximate = config.mlp == "swiglu", "tanh" if config.mlp == "gelu_tanh" else "none"
        self.up = nn.Linear(config.n_embd, config.mlp_hidden * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.attention = make_norm(config), Attention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, positions, cache=None, recompute=False):
        if recompute:   # in here, so that what wraps a block (FSDP, torch.compile) is not done twice
            return checkpoint(self.forward, x, positions, use_reentrant=False)
        x = x + self.attention(self.norm1(x), positions, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """head="lm" scores the next token; head="scalar" gives one number per position (a reward or a value)."""

    def __init__(self, config, head="lm"):
        super().__init__()
        if head not in ("lm", "scalar"):
            raise ValueError(f'GPT: head must be "lm" or "scalar", not {head!r}')
        self.config, self.head_kind = config, head
        self.checkpoint_blocks = False      # True: recompute a block's activations in the backward pass
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
            # Scores of random hidden states start with a standard deviation of about 1 (Stiennon et al.
            # 2020).
            nn.init.normal_(module.weight, std=1 / math.sqrt(self.config.n_embd + 1))

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
        x = self.token_embedding(tokens)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        recompute = self.checkpoint_blocks and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            x = block(x, positions, None if cache is None else cache[i], recompute)
        return self.norm(x)

    def unembed(self, x):
        """Hidden states (..., C) to logits (..., V). Raises ValueError if this is not a language model."""
        if self.head_kind != "lm":
            raise ValueError('this GPT has head="scalar": it gives scores, not tokens')
        return F.linear(x, self.token_embedding.weight if self.config.tied else self.head.weight)

    def forward(self, tokens):
        """tokens (B, T) int64, right-padded: logits (B, T, V), or one scalar per position (B, T)."""
        x = self.hidden(tokens)
        if self.head_kind == "lm":
            return self.unembed(x)
        with torch.autocast(x.device.type, enabled=False):      # scores differ by less than bfloat16 can tell
            x, weight, bias = (at_least_float32(y) for y in (x, self.head.weight, self.head.bias))
            return F.linear(x, weight, bias).squeeze(-1)

    def score(self, tokens, lengths):
        """The scalar at each row's last token, (B,): it alone has seen the whole row. tokens (B, T)
        right-padded, lengths (B,)."""
        return self(tokens).gather(1, lengths[:, None] - 1)[:, 0]

    def logprobs(self, tokens, mask, temperature=1.0, entropy=False, entropy_grad=False):
        """Log-probability of each token that the mask names, given those before it.

        tokens (B, T) int64; mask (B, T) bool, its first column is ignored (nothing precedes it). Returns (B,
        T) in nats: column t is log p(tokens[:, t] | tokens[:, :t]), 0 outside the mask. With entropy=True
        also the entropy of each of those distributions, (B, T); only entropy_grad=True keeps what its
        gradient would need. Logits exist only where the mask is true: n × V numbers, not B × T × V."""
        mask = mask.clone()
        mask[:, 0] = False
        # The state at column t − 1 has read tokens[:, :t], and predicts column t: hence the shift by one.
        x = self.hidden(tokens)[:, :-1][mask[:, 1:]]                                        # (n, C)
        logp = F.log_softmax(at_least_float32(self.unembed(x)) / temperature, dim=-1)       # (n, V)
        chosen = logp.gather(-1, tokens[mask][:, None])[:, 0]
        zeros = torch.zeros(tokens.shape, dtype=logp.dtype, device=tokens.device)
        out = zeros.masked_scatter(mask, chosen)
        if not entropy:
            return out
        if not entropy_grad:
            logp = logp.detach()
        return out, zeros.masked_scatter(mask, -(logp.exp() * logp).sum(-1))

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
            chosen = sample(logits, temperature, top_k, top_p, uniform(seeds[rows], step))
            logp = F.log_softmax(logits / (temperature or 1.0), dim=-1).gather(-1, chosen[:, None])[:, 0]
            tokens[rows[running], position[running]] = chosen[running]
            logprobs[rows[running], position[running]] = logp[running]
            ends[rows[running]] += 1
            if stop_token is not None:
                running = running & (chosen != stop_token)
            alive = int(running.sum())
            if self.rows_left(alive) == 0 or step + 1 == max_new_tokens:
                break
            # Rows that have ended leave the batch, and cost nothing from then on. Copying the cache for it
            # takes about as long as a step, so they leave when a fifth of the batch has ended, not one by
            # one.
            if 0 < alive <= 0.8 * len(rows):
                rows, chosen, position = rows[running], chosen[running], position[running]
                cache = [layer[:, running] for layer in cache]
                running = running[running]
            reach = longest + step + 1                                  # no row's position is beyond this
            seen = [layer[:, :, :, :reach] for layer in cache]
            x = self.hidden(chosen[:, None], position[:, None], seen)[:, 0]
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
        if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)       # keys and values come out of matrix products
        shape = (2, len(tokens), self.config.n_kv_head, S, self.config.n_embd // self.config.n_head)
        cache = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks]
        x = self.hidden(tokens, cache=cache)
        return x[torch.arange(len(tokens), device=device), lengths - 1], cache

    def rows_left(self, alive):
        """How many rows go on, of `alive` here; processes that can only sample together count all theirs."""
        return alive

    # ---------------------------------------------------------------------------------------- files

    def save(self, folder, whole=lambda x: x):
        """Write config.json and model.safetensors into the folder, made if need be. whole: what makes an
        ordinary tensor of a parameter that is sharded over processes."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
            json.dump({"head": self.head_kind, **asdict(self.config)}, f, indent=1)
        save_tensors(os.path.join(folder, "model.safetensors"), self.state_dict(), whole)

    @classmethod
    def load(cls, folder, head=None, device="cpu", mapped=False):
        """The network that save() wrote. head: as saved if None; another kind starts that head anew on the
        saved trunk (a reward model from a language model). mapped: leave the weights in the file, which must
        then stay as it is, and in its precision, to be read where they are used. Raises ValueError saying
        which file does not fit, and how."""
        path = os.path.join(folder, "config.json")
        try:
            with open(path, encoding="utf-8") as f:
                saved = json.load(f)
            saved_head = saved.pop("head", "missing")
            unknown = set(saved) - {f.name for f in fields(GPTConfig)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            config = GPTConfig(**saved)
            missing = {f.name for f in fields(GPTConfig)} - set(saved)
            if missing:
                raise ValueError(f"field {sorted(missing)[0]!r} is missing")
            if saved_head not in ("lm", "scalar"):
                raise ValueError(f'field "head" must be lm or scalar, not {saved_head!r}')
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as e:
            raise ValueError(f"{path}: not a model's config: {e}") from None
        tensors = load_tensors(os.path.join(folder, "model.safetensors"))
        if config.n_layer > len(tensors):               # before a network of a billion layers is begun
            raise ValueError(f"{path}: n_layer is {config.n_layer}, "
                             f"but model.safetensors holds {len(tensors)} tensors")
        try:
            with torch.device("meta"):                  # shapes alone: nothing is allocated until they fit
                model = cls(config, head or saved_head)
        except RuntimeError:
            raise ValueError(f"{path}: no machine can hold a network of this shape") from None
        new_head = model.head_kind != saved_head
        tensors = {k: v for k, v in tensors.items() if not (new_head and k.startswith("head."))}
        expected = {k: v for k, v in model.state_dict().items() if not (new_head and k.startswith("head."))}
        for name in sorted(expected.keys() | tensors.keys()):
            have, want = (tuple(d[name].shape) if name in d else "missing" for d in (tensors, expected))
            if have != want:
                raise ValueError(f"{folder}/model.safetensors: tensor {name} is {have}, "
                                 f"config.json asks for {want}")
        for name, x in tensors.items():
            if not (mapped and x.is_floating_point()):
                tensors[name] = x.to(expected[name].dtype, copy=True)
        model.load_state_dict(tensors, strict=False, assign=True)
        if new_head and hasattr(model, "head"):
            model.head.to_empty(device="cpu").apply(model._init)
        return model.to(device)


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


def sample(logits, temperature, top_k, top_p, u):
    """One token per row from logits (b, V), by inverting the cumulative distribution at u (b,) in (0, 1).

    top_k keeps the k likeliest; top_p then the fewest whose probability reaches p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k or top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        if top_k:
            ranked[:, top_k:] = -torch.inf
        p = ranked.softmax(dim=-1)
        beyond = p.cumsum(-1) - p >= top_p
        beyond[:, 0] = False                                        # the likeliest always stays
        ranked = ranked.masked_fill(beyond, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ranked)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # Reaching u of the total, which rounding puts slightly off 1, always lands on a token of probability >
    # 0.
    u = u.to(cumulative.dtype).clamp(min=torch.finfo(cumulative.dtype).tiny)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:])[:, 0]


# ------------------------------------------------------------------------------------- tensor files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def save_tensors(path, tensors, whole=lambda x: x):
    """Write {name: tensor} in the safetensors format: 8 bytes of header length, a JSON header, numbers. The
    file appears whole or not at all, and reading runs no code. whole() is asked for one tensor at a time."""
    header, offset, kind = {}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(struct.pack("<Q", len(head)) + head)
            for tensor in tensors.values():
                f.write(whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError:                                             # a full disk needs the room back
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise


def load_tensors(path):
    """{name: tensor} of a safetensors file. They stay in it, mapped into memory, until they are read; what is
    written to them does not reach the file. Raises ValueError if it is not one, or is cut short."""
    try:
        with open(path, "rb") as f:
            body = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        first = 8 + struct.unpack("<Q", body[:8])[0]                # where the numbers begin
        if first > len(body):
            raise ValueError("the header is cut short")
        header = json.loads(body[8:first])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape, count = DTYPES[entry["dtype"]], entry["shape"], math.prod(entry["shape"])
            if not 0 <= start <= end <= len(body) - first or end - start != count * dtype.itemsize:
                raise ValueError(f"tensor {name} is cut short")
            flat = torch.empty(0, dtype=dtype)
            if count > 0:
                flat = torch.frombuffer(body, dtype=dtype, count=count, offset=first + start)
            tensors[name] = flat.view(shape)
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError,
            OverflowError, MemoryError, struct.error) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable safetensors file: {reason}") from None
