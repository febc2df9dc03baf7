"""Where networks run, and how rows go through them: in micro-batches, on any number of processes.

Two ideas. A weighted mean over rows, which is a loss or an evaluation, is a loop over micro-batches:

    stats = Meter()
    for some, share in run.micro_batches(rows, weights):
        loss = ...                              # a mean over some of the rows
        (share * loss).backward()               # not in an evaluation
        stats.add(share, loss=loss)
    stats.means()                               # {"loss": the mean over all rows}

A map over rows (Compute.map) computes something for every row: samples, scores, log-probabilities. How rows
are cut into micro-batches and shared out over processes never changes the result, apart from rounding.

Processes go through networks together (a sharded network gathers its blocks in all of them), so all must run
as many passes, forward and backward: a process that has fewer rows goes along with another's, whose share is
0. So whether a loop's body calls a network, goes backward or breaks off must not depend on the share, the
process or its rows.
"""
import contextlib
import ctypes

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from runtime.precision import StandIns
from runtime.processes import gather, is_distributed, rank, total, world_size
from runtime.sharding import choose, is_frozen, shard, to_device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3             # of glibc's malloc.h


def pick_device(name):
    """"auto" to the best device there is. Raises ValueError for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in there if there[d])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has none")
    return name


def keep_freed_memory():
    """Let the C library keep what is freed for the next array. Given back, it would come again page by page,
    each cleared by the system: on the CPU that takes longer than most arithmetic on it. But arrays of 64 MB,
    as a chunk of logits is one, go back: between others they would leave holes, and memory would grow with
    the vocabulary."""
    with contextlib.suppress(OSError, AttributeError):          # other systems have other libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 26)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# --------------------------------------------------------------------------------------------- rows

def pad(rows):
    """Lists of different lengths as a tensor (B, T), right-padded with 0: int64, float or bool."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def concatenate(parts):
    """Tensors (b, t) with t of each one's own, or (b,), to one with all rows, right-padded with 0."""
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(parts)


def select(batch, rows):
    """Some rows of a batch (a dict of tensors (B, T) or (B,), with "lengths" among them), without the columns
    that only longer rows need."""
    width = int(batch["lengths"][rows].max())
    return {name: x[rows, :width] if x.dim() == 2 else x[rows] for name, x in batch.items()}


def take(rows, numbers):
    """Some rows: of a batch (a dict of tensors) a batch, of anything else that can be indexed a list."""
    return select(rows, numbers) if isinstance(rows, dict) else [rows[i] for i in numbers]


def lengths_of(rows):
    """What rows say of their own lengths: a batch's "lengths", or each one's .lengths."""
    return rows["lengths"] if isinstance(rows, dict) else [row.lengths for row in rows]


def row_seeds(rng, n):
    """A seed for the noise of each of n rows, drawn from a random.Random: a row's sample then depends neither
    on its neighbours nor on the process."""
    return [rng.getrandbits(62) for _ in range(n)]


def deal(lengths, micro_batch, micro_tokens, ranks):
    """Cut rows into micro-batches for each of so many processes: a list per process of lists of row numbers.

    lengths: of each row, a number of tokens, or a list of them for a row of several sequences. A micro-batch
    holds at most micro_batch sequences, and if micro_tokens is not 0, at most so many tokens with their
    padding; a row that is larger comes alone. Rows are taken in order of length, so that little is padding,
    and dealt out in turn, so that all processes have about as much to do. Equal lengths keep their order."""
    sizes = [(1, length) if isinstance(length, int) else (len(length), max(length)) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: sizes[i][1])
    return [cut(order[r::ranks], sizes, micro_batch, micro_tokens) for r in range(ranks)]


def cut(rows, sizes, micro_batch, micro_tokens):
    """Rows in order of length as micro-batches. sizes: of each, its sequences, and the longest's tokens."""
    pieces, sequences, shortest, tokens = [], 0, 0, 0
    for i in rows:
        more, longest = sizes[i]                                # the longest so far
        too_many = sequences + more > micro_batch
        too_long = micro_tokens > 0 and (sequences + more) * longest > micro_tokens
        # What is a quarter longer would make too much padding of the others, where they are enough for a
        # forward pass of their own: measured, a fifth of the time with answers of 1 to 64 tokens.
        too_uneven = tokens >= 1024 and longest > 1.25 * shortest
        if not pieces or too_many or too_long or too_uneven:
            pieces.append([])
            sequences, shortest = 0, longest
        pieces[-1].append(i)
        sequences += more
        tokens = sequences * longest
    return pieces


class Meter:
    """Means over all rows, from those of micro-batches."""

    def __init__(self):
        self.sums = {}

    def add(self, share, **means):
        """means: tensors, each the mean over a micro-batch that is this share of all rows."""
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + share * mean.detach()

    def means(self):
        """{name: float}, over the micro-batches of all processes, which come here together."""
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
        self.kind = None                # "ddp" or "fsdp", from the first networks on that are placed
        self.stand_ins = []             # of the trained networks, in bfloat16
        self.frozen = {}                # what networks share that nothing trains: see to_device
        self.fetched = {}               # networks that --offload has brought to the device: where they wait
        self.inside = 0                 # how many computing() are open, one in another

    def place(self, *models):
        """Put networks on the device, spread over the processes, compiled and economical as the flags say.
        Comes before their optimisers are made."""
        cfg = self.cfg
        self.kind = self.kind or choose(cfg.parallel, models, self.device)
        bases = {model.folder for model in models if not is_frozen(model) and model.adapted()}
        for model in models:
            model.look_every = 8 if self.device == "cuda" else 1
            if not is_frozen(model):
                model.checkpoint_blocks = cfg.checkpoint_blocks
            if cfg.compile:
                # A graph for each use: with gradients, a cache or neither, and for a single row or token.
                torch.compiler.config.recompile_limit = 32
                for block in model.blocks:
                    block.compile(dynamic=True)
            if is_distributed() and self.kind == "fsdp":
                shard(model, self.device, self.bfloat16, cfg.offload, cfg.gather_at_once)
                continue
            if cfg.offload and is_frozen(model) and model.folder not in bases:    # a base is there anyway
                to_device(model, "cpu", None, self.bfloat16)
                if self.device == "cuda":                   # from pinned memory a copy need not be waited for
                    for p in model.parameters():
                        p.data = p.data.pin_memory()
                model.token_embedding.register_forward_pre_hook(lambda *_, model=model: self.fetch(model))
            else:
                to_device(model, self.device, self.frozen, self.bfloat16)
            if self.bfloat16 and not is_frozen(model):
                self.stand_ins.append(StandIns(model))

    def fetch(self, model):
        """Bring an offloaded network to the device: its embedding asks for it, where every use begins."""
        if model not in self.fetched:
            self.fetched[model] = [p.data for p in model.parameters()]
            for p in model.parameters():
                p.data = p.data.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def computing(self):
        """In here networks compute, in bfloat16 if so chosen. Those that were fetched go after it: what waits
        on the CPU is what it was. One may be within another."""
        if self.inside == 0:
            for stand_ins in self.stand_ins:
                stand_ins.enter()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if self.inside == 0:
                for stand_ins in self.stand_ins:
                    stand_ins.leave()
                for model, waiting in self.fetched.items():
                    for p, x in zip(model.parameters(), waiting):
                        p.data = x
                self.fetched.clear()

    def passes(self, lengths, micro_batch):
        """This process's micro-batches as (row numbers, whether it is a filler), as many as any process has:
        one that has no row left goes along with another's row, whose result does not count."""
        everyone = deal(lengths, micro_batch, self.cfg.micro_tokens, world_size())
        passes = [(piece, False) for piece in everyone[rank()]]
        while len(passes) < max(len(theirs) for theirs in everyone):
            passes.append((everyone[0][0][:1], True))           # the shortest row of all
        return passes

    def micro_batches(self, rows, weights, lengths=None):
        """Go through rows in micro-batches: yields (some of the rows, their share), as many times in every
        process. The share is what the mean over these rows counts in the weighted mean over all rows of all
        processes; one that has no rows left goes through a filler, whose share is 0.

        rows: anything that can be indexed, or a batch, of which smaller batches come. weights: of each row,
        numbers. lengths: of each row, see deal; none takes what the rows say themselves.

        Between the first row and the last, networks are as in computing(). They are what they were after the
        loop, however it ends: `break` and an exception close a generator that nobody else holds. So write it
        into the `for`, and give it no name."""
        weights = as_list(weights)
        lengths = as_list(lengths_of(rows) if lengths is None else lengths)
        with self.computing():
            for piece, is_filler in self.passes(lengths, self.cfg.micro_batch):
                share = 0.0 if is_filler else sum(weights[i] for i in piece) / sum(weights)
                yield take(rows, piece), share

    @torch.no_grad()
    def map(self, function, rows, lengths=None, micro_batch=None):
        """What a function computes for every row, in the rows' order, on every process.

        function: from b of the rows, a list or a batch, to a dict of tensors (b,) or (b, t). rows, lengths:
        as in micro_batches; micro_batch: sequences at a time, if not the flag's. Returns the same dict for
        all rows; tensors (b, t) are padded with 0 to the same width."""
        lengths = as_list(lengths_of(rows) if lengths is None else lengths)
        order, parts = [], []
        with self.computing():
            for piece, is_filler in self.passes(lengths, micro_batch or self.cfg.micro_batch):
                found = function(take(rows, piece))
                if not is_filler:
                    order += piece
                    parts.append(found)
        everyone = gather((order, [{name: x.cpu() for name, x in part.items()} for part in parts]))
        back = torch.tensor([i for order, _ in everyone for i in order]).argsort()
        parts = [part for _, parts in everyone for part in parts]
        return {name: concatenate([part[name] for part in parts])[back].to(self.device)
                for name in (parts[0] if parts else ())}

    def sample(self, model, prompts, seeds, max_new_tokens, temperature=1.0, stop_token=None):
        """GPT.generate for any number of prompts (lists of ids), each with a seed. Returns the dict of
        tensors tokens, mask and logprobs (B, T), and lengths (B,), of prompt and answer together, and ended
        (B,), whether an answer ends with stop_token."""
        def answer(rows):
            ids, seed = zip(*rows)
            lengths = torch.tensor([len(x) for x in ids], device=self.device)
            tokens, mask, logprobs = model.generate(
                pad(ids).to(self.device), lengths, max_new_tokens, temperature, stop_token=stop_token,
                seeds=torch.tensor(seed, device=self.device))
            lengths = lengths + mask.sum(1)
            last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
            return {"tokens": tokens, "mask": mask, "logprobs": logprobs, "lengths": lengths,
                    "ended": last == (-1 if stop_token is None else stop_token)}
        room = [len(prompt) + max_new_tokens for prompt in prompts]
        return self.map(answer, list(zip(prompts, seeds)), room, self.cfg.sample_batch)


def as_list(x):
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)
