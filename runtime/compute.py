"""Where networks run, and how rows go through them: in micro-batches, on any number of processes.

A weighted mean over rows, which is a loss or an evaluation, is a loop over micro-batches:

    stats = Meter()
    for some, share in run.micro_batches(rows, weights):
        loss = ...                              # the mean over some of the rows
        (share * loss).backward()               # left out in an evaluation
        stats.add(share, loss=loss)
    stats.means()                               # {"loss": the mean over all rows}

What needs no gradient and gives something for each row (samples, scores, log-probabilities) is a map over
rows: see Compute.map. The results do not depend on how the rows are split, apart from rounding.

All processes go through a network together, because a sharded network gathers its blocks from all of them.
So all of them run equally many forward and backward passes: a process without rows left computes another
one's row with a share of 0. Whether the body of such a loop calls a network, calls backward() or breaks must
therefore not depend on the share, on the rows or on the process. (`if share: loss.backward()` works under ddp
and hangs under fsdp.)
"""
import contextlib
import ctypes

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from runtime.precision import Bfloat16Copies
from runtime.processes import gather, is_distributed, rank, total, world_size
from runtime.sharding import choose, is_frozen, shard, to_device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3             # from glibc's malloc.h


def pick_device(name):
    """The device that --device names; "auto" takes the best one. Raises ValueError where it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    if not available[name]:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has none")
    return name


def keep_freed_memory():
    """Let the C library keep freed memory for the next array. Otherwise the system would clear every page
    anew, which takes longer on a CPU than most arithmetic on it. Arrays of 64 MB and more, such as a chunk of
    logits, are returned all the same: they would leave holes, and memory would grow with the vocabulary."""
    with contextlib.suppress(OSError, AttributeError):          # not every system has this C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 26)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# --------------------------------------------------------------------------------------------- rows

def pad(rows):
    """Lists of different lengths as one tensor (B, T), right-padded with 0: int64, float or bool."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def concatenate(parts):
    """Tensors (b, t) of different widths t, right-padded with 0, or tensors (b,), as one tensor."""
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(parts)


def select(batch, rows):
    """The given rows of a batch, cut to the longest of them. A batch is a dict of tensors (B, T) or (B,);
    its "lengths" (B,) are the tokens of each row without padding."""
    width = int(batch["lengths"][rows].max())
    return {name: x[rows, :width] if x.dim() == 2 else x[rows] for name, x in batch.items()}


def take(rows, numbers):
    """The rows with these numbers: a batch if `rows` is a batch, else a list."""
    return select(rows, numbers) if isinstance(rows, dict) else [rows[i] for i in numbers]


def as_list(x):
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)


def lengths_of(rows):
    """The "lengths" of a batch, or the attribute .lengths of each row."""
    return as_list(rows["lengths"]) if isinstance(rows, dict) else [row.lengths for row in rows]


def row_seeds(rng, n):
    """n seeds drawn from a random.Random, one for the sampling noise of each row: a row's sample then depends
    neither on the rows beside it nor on the process."""
    return [rng.getrandbits(62) for _ in range(n)]


def deal(lengths, micro_batch, micro_tokens, processes):
    """Split rows into micro-batches for each process: a list per process of lists of row numbers.

    lengths: the number of tokens of each row, or a list of them for a row that holds several sequences. A
    micro-batch holds at most micro_batch sequences and, if micro_tokens is above 0, at most micro_tokens
    tokens with padding; a row that exceeds this comes alone. Rows are sorted by length, so that little is
    padding, and dealt out in turn, so that all processes have about equally much to do."""
    sizes = [(1, length) if isinstance(length, int) else (len(length), max(length)) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: sizes[i][1])
    return [cut(order[r::processes], sizes, micro_batch, micro_tokens) for r in range(processes)]


def cut(rows, sizes, micro_batch, micro_tokens):
    """Rows sorted by length as micro-batches. sizes: (sequences, tokens of the longest one) of each row."""
    pieces, sequences, shortest, tokens = [], 0, 0, 0
    for i in rows:
        more, longest = sizes[i]                                # sorted: the longest so far
        too_many = sequences + more > micro_batch
        too_long = micro_tokens > 0 and (sequences + more) * longest > micro_tokens
        # From 1,024 tokens on, a forward pass of its own costs less than the padding that a row longer by a
        # quarter brings: measured, a fifth of the time with answers of 1 to 64 tokens.
        too_uneven = tokens >= 1024 and longest > 1.25 * shortest
        if not pieces or too_many or too_long or too_uneven:
            pieces.append([])
            sequences, shortest = 0, longest
        pieces[-1].append(i)
        sequences += more
        tokens = sequences * longest
    return pieces


class Meter:
    """Collects means over micro-batches and gives the means over all rows."""

    def __init__(self):
        self.sums = {}

    def add(self, share, **means):
        """means: scalar tensors, each the mean over a micro-batch that is this share of all rows. The names
        must be the same on all processes, so they must not depend on the rows."""
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + share * mean.detach()

    def means(self):
        """{name: float}, over the micro-batches of all processes, which call this together."""
        return dict(zip(self.sums, total(torch.stack(list(self.sums.values()))).tolist()))


# ----------------------------------------------------------------------- networks and rows together

class Compute:
    """A device, a precision, the networks placed there, and the rows that go through them. cfg:
    flags.Settings."""

    def __init__(self, cfg):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.bfloat16 = cfg.precision == "bfloat16" or (cfg.precision == "auto" and self.device == "cuda")
        if self.device == "cpu":
            keep_freed_memory()
        if self.device == "cuda" and self.bfloat16:
            torch.set_float32_matmul_precision("high")              # TF32: see GPT.unembed
        self.kind = None                # "ddp" or "fsdp", chosen when the first networks are placed
        self.copies = []                # bfloat16 copies of the trained networks
        self.frozen = {}                # frozen weights that several networks share: see to_device
        self.fetched = {}               # {network that --offload has moved to the device: its CPU weights}
        self.depth = 0                  # how many computing() contexts are open

    def place(self, *models):
        """Put networks on the device, spread over the processes, compiled and with recomputed activations as
        the flags say. Call it before their optimisers are made."""
        cfg = self.cfg
        self.kind = self.kind or choose(cfg.parallel, models, self.device)
        bases = {model.config.folder for model in models if not is_frozen(model) and model.adapted()}
        for model in models:
            if not is_frozen(model):
                model.checkpoint_blocks = cfg.checkpoint_blocks
            if cfg.compile:
                # One graph for each use: with gradients, with a cache or neither, for one row or several.
                torch.compiler.config.recompile_limit = 32
                for block in model.blocks:
                    block.compile(dynamic=True)
            if is_distributed() and self.kind == "fsdp":
                shard(model, self.device, self.bfloat16, cfg.offload, cfg.gather_at_once)
                continue
            if cfg.offload and is_frozen(model) and model.config.folder not in bases:
                self.offload(model)                         # but not a base, which is on the device anyway
            else:
                to_device(model, self.device, self.frozen, self.bfloat16)
            if self.bfloat16 and not is_frozen(model):
                self.copies.append(Bfloat16Copies(model))

    def offload(self, model):
        """Keep a frozen network on the CPU; its embedding, which every use calls first, fetches it."""
        to_device(model, "cpu", None, self.bfloat16)
        if self.device == "cuda":                           # copies from pinned memory are asynchronous
            for p in model.parameters():
                p.data = p.data.pin_memory()
        model.token_embedding.register_forward_pre_hook(lambda *_: self.fetch(model))

    def fetch(self, model):
        """Move an offloaded network to the device."""
        if model not in self.fetched:
            self.fetched[model] = [p.data for p in model.parameters()]
            for p in model.parameters():
                p.data = p.data.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def computing(self):
        """A context in which networks compute, in bfloat16 if so chosen. Contexts may be nested. When the
        outermost one ends, trained networks have their float32 weights back and fetched networks their
        weights on the CPU."""
        if self.depth == 0:
            for copies in self.copies:
                copies.enter()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for copies in self.copies:
                    copies.leave()
                for model, on_cpu in self.fetched.items():
                    for p, x in zip(model.parameters(), on_cpu):
                        p.data = x
                self.fetched.clear()

    def passes(self, lengths, micro_batch):
        """This process's micro-batches as (row numbers, whether it is a filler), equally many on each
        process. A filler is the shortest row of all; its result is not used."""
        pieces = deal(lengths, micro_batch, self.cfg.micro_tokens, world_size())
        mine = [(piece, False) for piece in pieces[rank()]]
        missing = max(map(len, pieces)) - len(mine)
        return mine + [(pieces[0][0][:1], True)] * missing

    def micro_batches(self, rows, weights, lengths=None):
        """This process's part of one weighted mean over rows: yields (some of the rows, their share).

        rows: a list, or a batch (a dict of tensors), in which case smaller batches come. weights: one number
        per row. lengths: see `deal`; by default those that the rows have themselves. The share is the weight
        of these rows divided by the weight of all rows of all processes. So the shares add up to 1, and
        (share · loss).backward() adds up to the gradient of the weighted mean.

        Inside the loop networks compute as in computing(), and after it, however it ends, they have their
        own weights back: `break` and exceptions close a generator that only the `for` holds. So never give
        the generator a name."""
        weights = as_list(weights)
        lengths = lengths_of(rows) if lengths is None else as_list(lengths)
        with self.computing():
            for piece, is_filler in self.passes(lengths, self.cfg.micro_batch):
                share = 0.0 if is_filler else sum(weights[i] for i in piece) / sum(weights)
                yield take(rows, piece), share

    @torch.no_grad()
    def map(self, function, rows, lengths=None, micro_batch=None):
        """The results of a function for all rows, in the rows' order, on every process.

        function: from some of the rows, a list or a batch of b, to a dict of tensors (b,) or (b, t). rows,
        lengths: as in micro_batches; micro_batch: sequences per forward pass, by default the flag's. Returns
        a dict of tensors (B,) or (B, T), right-padded with 0."""
        lengths = lengths_of(rows) if lengths is None else as_list(lengths)
        order, parts = [], []
        with self.computing():
            for piece, is_filler in self.passes(lengths, micro_batch or self.cfg.micro_batch):
                result = function(take(rows, piece))
                if not is_filler:
                    order += piece
                    parts.append({name: x.cpu() for name, x in result.items()})
        gathered = gather((order, parts))
        back = torch.tensor([i for order, _ in gathered for i in order]).argsort()
        parts = [part for _, parts in gathered for part in parts]
        return {name: concatenate([part[name] for part in parts])[back].to(self.device)
                for name in (parts[0] if parts else ())}

    # ---------------------------------------------------------------------------- maps that many need

    def sample(self, model, prompts, seeds, max_new_tokens, stop_token=None, **how):
        """A batch of answers, by GPT.generate, to any number of prompts (lists of ids), each with a seed.
        how: temperature, top_k, top_p.

        Returns a dict of tokens, mask and logprobs (B, T), of lengths (B,), the tokens of prompt and answer
        together, and of ended (B,) bool: whether the answer ends with stop_token."""
        def answer(rows):
            ids, seed = zip(*rows)
            lengths = torch.tensor([len(x) for x in ids], device=self.device)
            seed = torch.tensor(seed, device=self.device)
            tokens, mask, logprobs = model.generate(pad(ids).to(self.device), lengths, max_new_tokens,
                                                    stop_token=stop_token, seeds=seed, **how)
            lengths = lengths + mask.sum(1)
            last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
            return {"tokens": tokens, "mask": mask, "logprobs": logprobs, "lengths": lengths,
                    "ended": last == (-1 if stop_token is None else stop_token)}
        room = [len(prompt) + max_new_tokens for prompt in prompts]
        return self.map(answer, list(zip(prompts, seeds)), room, self.cfg.sample_batch)

    def batch(self, sequences, starts=None):
        """Lists of ids as a batch: tokens (B, T), mask (B, T), true from column starts[b] (by default 0) to
        the row's end, and lengths (B,)."""
        tokens, lengths = pad(sequences), torch.tensor([len(ids) for ids in sequences])
        column, starts = torch.arange(tokens.shape[1]), torch.tensor(starts or [0] * len(sequences))
        mask = (column >= starts[:, None]) & (column < lengths[:, None])
        return {name: x.to(self.device) for name, x in
                (("tokens", tokens), ("mask", mask), ("lengths", lengths))}

    def logprobs(self, model, batch, temperature=1.0):
        """GPT.logprobs of a batch without gradients: (B, T), 0 outside the mask."""
        return self.map(lambda b: {"logprobs": model.logprobs(b["tokens"], b["mask"], temperature)},
                        batch)["logprobs"]

    def score(self, model, batch):
        """GPT.score of a batch without gradients: (B,), the scalar at each row's last token."""
        return self.map(lambda b: {"scores": model.score(b["tokens"], b["lengths"])}, batch)["scores"]
