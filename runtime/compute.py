"""Where networks run, and how rows go through them: in micro-batches, on any number of processes.

Losses and evaluations are weighted means over rows. They are computed in a loop over micro-batches:

    stats = Meter()
    for some, share in run.micro_batches(rows, weights):
        loss = ...                              # the mean over some of the rows
        (share * loss).backward()               # left out in an evaluation
        stats.add(share, loss=loss)
    stats.means()                               # {"loss": the mean over all rows}

Results for each row that need no gradient (samples, scores, log-probabilities) are computed with Compute.map.
Apart from rounding, no result depends on how the rows are split.

All processes run a network together, because a sharded network gathers its blocks from all of them. So every
process runs the same number of forward and backward passes. A process that has no rows left gets a filler, a
row of another process with a share of 0. The body of the loop must not decide by the share, the rows or the
process whether to run a network, call backward() or break. (For example, `if share: loss.backward()` works
under ddp and hangs under fsdp.)
"""
import contextlib
import ctypes

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from runtime.precision import bfloat16_copies
from runtime.processes import gather, is_distributed, rank, total, world_size
from runtime.sharding import choose, is_frozen, shard, to_device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3             # from glibc's malloc.h


def pick_device(name):
    """Return the device that --device names; "auto" is the best one. Raises ValueError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    if not available[name]:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has none")
    return name


def is_fast(device):
    """Whether a device has units for bfloat16, as GPUs have from compute capability 8.0 on. Older ones, such
    as T4 and V100, emulate it, more slowly than they multiply in float32."""
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def keep_freed_memory():
    """Let the C library keep freed memory for the next tensor. Otherwise the system must zero new pages for
    each tensor, which is often slower than the computation. Blocks of 64 MB or more are still returned,
    because keeping them fragments the heap."""
    with contextlib.suppress(OSError, AttributeError):          # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 26)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# --------------------------------------------------------------------------------------------- rows

def pad(rows):
    """Turn lists of different lengths into one tensor (B, T) of int64, float or bool, right-padded with 0."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def concatenate(parts):
    """Join tensors (b, t), right-padded with 0 to the largest width t, or tensors (b,), to one tensor."""
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(parts)


def select(batch, rows):
    """Return the rows of a list or a batch with these indices, of a batch without the columns that are
    padding in all of them. A batch is a dict of tensors (B, T) or (B,); "lengths" (B,) holds each row's
    number of tokens."""
    if not isinstance(batch, dict):
        return [batch[i] for i in rows]
    rows = torch.as_tensor(rows, device=batch["lengths"].device)        # to a GPU once, not for each tensor
    width = int(batch["lengths"][rows].max())
    return {name: x[rows, :width] if x.dim() == 2 else x[rows] for name, x in batch.items()}


def as_list(x):
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)


def row_seeds(rng, n):
    """Draw n seeds from a random.Random, one for the sampling noise of each row, so that a row's sample does
    not depend on other rows or on the process."""
    return [rng.getrandbits(62) for _ in range(n)]


def distribute(lengths, micro_batch, micro_tokens, processes):
    """Return for each process a list of micro-batches, which are lists of row indices.

    lengths: for each row its number of tokens, or a list of them if the row holds several sequences. A
    micro-batch holds at most micro_batch sequences and, if micro_tokens is above 0, at most micro_tokens
    tokens with padding. A row that exceeds this gets a micro-batch of its own. Rows are sorted by length, so
    that there is little padding, and go to the processes in turn, so that all have about the same work."""
    sizes = [(1, length) if isinstance(length, int) else (len(length), max(length)) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: sizes[i][1])
    return [split(order[r::processes], sizes, micro_batch, micro_tokens) for r in range(processes)]


def split(rows, sizes, micro_batch, micro_tokens):
    """Split rows, sorted by length, into micro-batches. sizes: (sequences, longest sequence) of each row."""
    micro_batches, sequences, shortest, padded = [], 0, 0, 0    # the last three: of the last micro-batch
    for i in rows:
        added, width = sizes[i]                                 # sorted, so the row sets the new width
        too_many = sequences + added > micro_batch
        too_long = micro_tokens > 0 and (sequences + added) * width > micro_tokens
        # From 1,024 tokens on, another forward pass costs less than padding all rows to a length that exceeds
        # the shortest by a quarter. With answers of 1 to 64 tokens this saved a fifth of a training step.
        too_uneven = padded >= 1024 and width > 1.25 * shortest
        if not micro_batches or too_many or too_long or too_uneven:
            micro_batches.append([])
            sequences, shortest = 0, width
        micro_batches[-1].append(i)
        sequences += added
        padded = sequences * width                              # tokens with padding
    return micro_batches


class Meter:
    """Collects means over micro-batches and computes the means over all rows from them."""

    def __init__(self):
        self.sums = {}

    def add(self, share, **means):
        """means: scalar tensors, each the mean over one micro-batch; share: its part of the weight of all
        rows. All processes must use the same names, so these must not depend on the rows."""
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + share * mean.detach()

    def means(self):
        """Return {name: mean over all rows of all processes}. All processes must call it together."""
        return dict(zip(self.sums, total(torch.stack(list(self.sums.values()))).tolist()))


# ----------------------------------------------------------------------- networks and rows together

class Compute:
    """Places networks on a device and runs rows through them in a precision. cfg: flags.Settings."""

    def __init__(self, cfg):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.bfloat16 = cfg.precision == "bfloat16" or (cfg.precision == "auto" and is_fast(self.device))
        if self.device == "cpu":
            keep_freed_memory()
        if self.device == "cuda" and self.bfloat16:
            torch.set_float32_matmul_precision("high")              # TF32: see GPT.unembedding
            # cuDNN's attention plans anew for each length, and the cache's length changes as answers grow.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.kind = None                # "ddp" or "fsdp", chosen when the first networks are placed
        self.copies = []                # of trained networks' parameters: see bfloat16_copies
        self.frozen = {}                # {name: frozen parameters}, which networks can share: see to_device
        self.fetched = {}               # {offloaded network that is on the device: its weights on the CPU}
        self.depth = 0                  # number of open computing() contexts

    def place(self, *models):
        """Move networks to the device, shard and compile them, and let them recompute activations, as the
        flags say. Call it before their optimisers are made."""
        cfg = self.cfg
        self.kind = self.kind or choose(cfg.parallel, models, self.device)
        bases = {model.config.folder for model in models if not is_frozen(model) and model.adapted()}
        for model in models:
            if not is_frozen(model):
                model.checkpoint_blocks = cfg.checkpoint_blocks
            if cfg.compile:
                # One graph per use: with gradients, with a cache or with neither, each for one or more rows.
                torch.compiler.config.recompile_limit = 32
                for block in model.blocks:
                    block.compile(dynamic=True)
            if is_distributed() and self.kind == "fsdp":
                shard(model, self.device, self.bfloat16, cfg.offload, cfg.gather_at_once)
                continue
            # A frozen base of adapters is not offloaded, because the adapted network keeps it on the device.
            if cfg.offload and is_frozen(model) and model.config.folder not in bases:
                self.offload(model)
            else:
                to_device(model, self.device, self.frozen, self.bfloat16)
            if self.bfloat16 and not is_frozen(model):
                self.copies += bfloat16_copies(model)

    def offload(self, model):
        """Keep a frozen network on the CPU until its embedding, the first layer of any forward pass, runs."""
        to_device(model, "cpu", None, self.bfloat16)
        if self.device == "cuda":                           # copies from pinned memory are asynchronous
            for p in model.parameters():
                p.data = p.data.pin_memory()

        def fetch(*_):
            if model not in self.fetched:
                self.fetched[model] = [p.data for p in model.parameters()]
                for p in model.parameters():
                    p.data = p.data.to(self.device, non_blocking=True)
        model.token_embedding.register_forward_pre_hook(fetch)

    @contextlib.contextmanager
    def computing(self):
        """Open a context in which networks run in the chosen precision. Contexts can be nested. When the
        outermost one ends, trained networks get back float32 weights, and fetched ones go to the CPU."""
        if self.depth == 0:
            with torch.no_grad():
                if self.copies:                                 # all at once: a GPU starts few kernels
                    torch._foreach_copy_([copy for *_, copy in self.copies], [p for *_, p, _ in self.copies])
                for module, name, _, copy in self.copies:
                    module._parameters[name] = copy
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for module, name, p, _ in self.copies:
                    module._parameters[name] = p
                for model, on_cpu in self.fetched.items():
                    for p, x in zip(model.parameters(), on_cpu):
                        p.data = x
                self.fetched.clear()

    def passes(self, rows, lengths, micro_batch, micro_tokens):
        """Return this process's micro-batches as (row indices, is_filler); a filler is the shortest row."""
        if lengths is None:
            lengths = rows["lengths"] if isinstance(rows, dict) else [row.lengths for row in rows]
        everyone = distribute(as_list(lengths), micro_batch, micro_tokens, world_size())
        mine = [(indices, False) for indices in everyone[rank()]]
        missing = max(map(len, everyone)) - len(mine)
        return mine + [(everyone[0][0][:1], True)] * missing

    def micro_batches(self, rows, weights, lengths=None):
        """Yield this process's part of a weighted mean over rows as (some of the rows, their share).

        rows: a list or a batch (a dict of tensors); so are the parts of it. weights: one number per row.
        lengths: see `distribute`; by default the "lengths" of a batch, or the attribute .lengths of each row.
        The share is the weight of these rows divided by the weight of all rows of all processes. Shares add
        up to 1, and gradients are summed over processes, not averaged. So (share · loss).backward() for all
        micro-batches gives the gradient of the weighted mean.

        Inside the loop networks run as in computing(). After `break` or an exception, this context closes
        only if nothing but the `for` refers to the generator: never assign it to a variable."""
        weights = as_list(weights)
        with self.computing():
            for indices, is_filler in self.passes(rows, lengths, self.cfg.micro_batch,
                                                 self.cfg.micro_tokens):
                share = 0.0 if is_filler else sum(weights[i] for i in indices) / sum(weights)
                yield select(rows, indices), share

    @torch.no_grad()
    def map(self, function, rows, lengths=None, micro_batch=None, micro_tokens=None):
        """Apply a function to all rows. Returns its results in the order of the rows, on every process.

        function: takes b of the rows, as a list or a batch, and returns a dict of tensors (b,) or (b, t).
        rows, lengths: as in micro_batches. micro_batch, micro_tokens: most sequences and most tokens per
        forward pass, by default the flags'.
        Returns a dict of tensors (B,) or (B, T), right-padded with 0."""
        micro_batch = self.cfg.micro_batch if micro_batch is None else micro_batch
        micro_tokens = self.cfg.micro_tokens if micro_tokens is None else micro_tokens
        order, parts = [], []
        with self.computing():
            for indices, is_filler in self.passes(rows, lengths, micro_batch, micro_tokens):
                result = function(select(rows, indices))
                if not is_filler:
                    order += indices
                    parts.append({name: x.cpu() for name, x in result.items()})
        gathered = gather((order, parts))
        order = [i for indices, _ in gathered for i in indices]
        parts = [part for _, parts in gathered for part in parts]
        inverse, names = torch.tensor(order).argsort(), parts[0] if parts else ()
        return {name: concatenate([part[name] for part in parts])[inverse].to(self.device) for name in names}

    def sample(self, model, prompts, seeds, max_new_tokens, stop_token=None, **how):
        """Sample an answer to each prompt (a list of ids), with one seed per prompt, using GPT.generate. how:
        temperature, top_k, top_p.

        Returns a batch: tokens, mask and logprobs (B, T); lengths (B,), the number of tokens of prompt and
        answer together; and ended (B,) bool, true where the answer ends with stop_token."""
        def answer(rows):
            ids, seed = zip(*rows)
            lengths = torch.tensor([len(x) for x in ids], device=self.device)
            seed = torch.tensor(seed, device=self.device)
            tokens, mask, logprobs = model.generate(pad(ids).to(self.device), lengths, max_new_tokens,
                                                    stop_token=stop_token, seeds=seed, **how)
            lengths = lengths + mask.sum(1)
            last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
            return {"tokens": tokens, "mask": mask, "logprobs": logprobs, "lengths": lengths,
                    "ended": last == (-1 if stop_token is None else stop_token)}        # no id is −1
        room = [len(prompt) + max_new_tokens for prompt in prompts]
        # micro_tokens keeps activations small. Sampling keeps none, and its passes of one token per row take
        # nearly as long for few rows as for many.
        return self.map(answer, list(zip(prompts, seeds)), room, self.cfg.sample_batch, micro_tokens=0)

    def note(self, **numbers):
        """Where a Run keeps numbers for the metrics of its step. An evaluation has no steps."""

    def batch(self, sequences, starts=None):
        """Turn B lists of ids into a batch: tokens (B, T), lengths (B,) and mask (B, T), which is true in row
        b from column starts[b] (by default 0) to the row's end."""
        tokens, lengths = pad(sequences), torch.tensor([len(ids) for ids in sequences])
        column, starts = torch.arange(tokens.shape[1]), torch.tensor(starts or [0] * len(sequences))
        mask = (column >= starts[:, None]) & (column < lengths[:, None])
        return {name: x.to(self.device) for name, x in
                (("tokens", tokens), ("mask", mask), ("lengths", lengths))}

    def logprobs(self, model, batch, temperature=1.0):
        """Compute GPT.logprobs of a batch without gradients: (B, T), 0 outside the mask."""
        return self.map(lambda b: {"logprobs": model.logprobs(b["tokens"], b["mask"], temperature)},
                        batch)["logprobs"]

    def score(self, model, batch):
        """Compute GPT.score of a batch without gradients: (B,), the scalar at each row's last token."""
        return self.map(lambda b: {"scores": model.score(b["tokens"], b["lengths"])}, batch)["scores"]
