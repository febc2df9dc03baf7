"""One training run: its output folder, randomness, optimiser steps, metrics, progress and checkpoints."""
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter

import torch

from runtime import adapters, launch, nf4, outputs, processes
from runtime.checkpoints import Checkpoints, is_finite
from runtime.compute import Compute, row_seeds
from runtime.files import lock, write_json
from runtime.flags import changed_flags, program
from runtime.inputs import fingerprints
from runtime.launch import STARTED, warn
from runtime.sharding import add_up, collect, full_tensor, is_frozen
from runtime.terminal import Table, print_answer, print_wrapped

try:                                    # an extra: pip install tensorboard
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


class Run(Compute):
    """A training run on top of Compute.

    The same command continues a killed run from its last checkpoint, and gives the same weights as an
    uninterrupted run. For that, all random numbers of a step come from the seed and the step's number (`rng`,
    and torch's global generator), and all state that outlives a step is in the parts given to `resume`."""

    def __init__(self, cfg, total):
        """cfg: flags.Training; total: the number of steps."""
        super().__init__(cfg)
        self.total, self.parts, self.stop_signal = total, {}, None
        self.table = Table(total)
        self.warned, self.notes = set(), {}             # warnings whose condition holds; see note()
        self.failed_in_a_row = Counter()                # per optimiser: its last steps that were not finite
        self.about = {"stage": program(), "settings": dataclasses.asdict(cfg), "inputs": fingerprints(cfg),
                      "code": outputs.code(), "started": STARTED, "torch": torch.__version__,
                      "threads": torch.get_num_threads()}
        self.folder = outputs.working_folder(cfg, self.about)
        os.makedirs(self.folder, exist_ok=True)
        if processes.is_first():
            lock(cfg.out)
        self.checkpoints = Checkpoints(self.folder)
        unfinished = cfg.resume and self.checkpoints.last()
        if unfinished:
            for text in outputs.check_unfinished(cfg, self.folder, self.about):
                warn(text)
        processes.barrier()                             # no process writes before all have read
        if not unfinished and processes.is_first():
            self.checkpoints.remove()                   # before other settings stand beside it
            write_json(os.path.join(self.folder, "run.json"), self.about)
        self.begin(0)
        print_wrapped(f"{self.about['stage']} on {self.device}:", changed_flags(cfg) or ["the defaults"])
        if getattr(cfg, "warmup", 0) > total:
            warn(f"--warmup {cfg.warmup} is longer than the run of {total} steps: "
                 "the learning rate never reaches --lr")

    # --------------------------------------------------------------------- before and between steps

    def place(self, *models, reference=None):
        """Compute.place, after adding adapters and packing frozen weights in 4 bits as the flags say.
        reference: π_ref, a frozen copy of the first model. Raises ValueError if they differ."""
        cfg = self.cfg
        if cfg.nf4 and cfg.lora_rank == 0:
            raise ValueError("--nf4 freezes the weights: add trained adapters with --lora_rank")
        if cfg.nf4 and cfg.parallel == "fsdp":
            raise ValueError("--nf4 does not work under fsdp, whose shards would part packed weights from "
                             "their scales: use ddp, where each process holds all packed weights")
        self.kind = "ddp" if cfg.nf4 else self.kind
        models = models if reference is None else (models[0], reference, *models[1:])
        for model in models:
            if not is_frozen(model):
                adapters.adapt(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
                if cfg.lora_rank > 0 and not cfg.merge:
                    adapters.check_alone(model)
        if reference is not None and not models[0].config.folder:
            adapters.merge(reference)       # as the policy's were, or only one would round the sum
        for model in models if cfg.nf4 else ():
            nf4.pack(model)
        super().place(*models)
        if reference is not None:
            self.check_reference(models[0], reference)

    def check_reference(self, policy, reference):
        """Raise ValueError unless the policy and its reference give the tokens of a short sequence the same
        log-probabilities: before the first step they are the same network."""
        ids = [i % policy.config.vocab_size for i in range(min(32, policy.config.block_size))]
        batch = self.batch([ids], [1])
        gap = (self.logprobs(policy, batch) - self.logprobs(reference, batch)).abs().max().item()
        if not gap < 1e-3:                                              # NaN is not smaller either
            raise ValueError("the reference is not the policy: before the first step a token's "
                             f"log-probability differs by {gap:.2g} nats")

    def begin(self, step):
        """Seed the random numbers of the step after `step` from the seed and this number alone."""
        self.step = step
        self.rng = random.Random(f"{self.cfg.seed}/{step}")
        torch.manual_seed(self.rng.getrandbits(63))

    def seeds(self, n):
        """n seeds, one for the sampling noise of each row, from the run's seed and the step."""
        return row_seeds(self.rng, n)

    def resume(self, **parts):
        """Name all state that training changes (networks, optimisers, objects whose attributes are numbers),
        and load the last checkpoint if there is one. Call it right before the training loop."""
        self.parts, last = parts, self.checkpoints.last()
        if last and all(theirs == last for theirs in processes.gather(last)):
            self.begin(self.checkpoints.load(parts))
        if any(theirs != (last, self.step) for theirs in processes.gather((last, self.step))):
            raise ValueError(f"the processes do not see the same checkpoint in {self.cfg.out}: "
                             "machines must share that folder")
        if self.step:
            print(f"going on after step {self.step} of {self.total}", flush=True)
        self.open_metrics()
        self.step_began = time.time()
        self.next_save, launch.at_work = time.time() + self.cfg.save_seconds, self

    def open_metrics(self):
        """Open metrics.jsonl, without the steps after the checkpoint, which will be run again."""
        path, lines, self.board = os.path.join(self.folder, "metrics.jsonl"), [], None
        if not processes.is_first():
            self.metrics = open(os.devnull, "a", encoding="utf-8")
            return
        if self.step:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)
        self.metrics = open(path, "a", encoding="utf-8")
        if SummaryWriter:
            self.board = SummaryWriter(self.folder, purge_step=self.step + 1)

    # --------------------------------------------------------------------------------------- a step

    def optimizer_step(self, optimizer, lr, loss, rows):
        """One optimiser step: sum the gradients over processes, clip their norm at --max_norm (0: no limit),
        step, and clear them. Returns the norm before clipping.

        loss: the step's loss, a float; rows: a text that names its rows. Where the loss or the norm is not
        finite, a warning names both and no step is taken; the third time in a row raises ValueError."""
        if self.depth:
            raise RuntimeError("optimizer_step inside a loop over micro-batches, or after one whose "
                               "generator is still held: end the loop first, and give the generator no name")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.kind == "ddp":
            add_up(parameters)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.cfg.max_norm or math.inf)).item()
        if math.isfinite(norm) and math.isfinite(loss):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            self.failed_in_a_row[id(optimizer)] = 0
        else:
            self.failed_in_a_row[id(optimizer)] += 1
            what = f"step {self.step + 1}: loss {loss:.3g}, gradient norm {norm:.3g} on {rows}"
            if self.failed_in_a_row[id(optimizer)] == 3:
                kept = "the last checkpoint is kept" if self.checkpoints.last() else "there is no checkpoint"
                raise ValueError(f"{what}: the third in a row that is not finite; {kept}. "
                                 "A lower --lr or --max_norm may help")
            warn(f"{what}: not finite, no update made")
        optimizer.zero_grad()
        return norm

    def warn_if(self, condition, text):
        """Print a warning when a condition becomes true, and not again at each step while it stays true."""
        if condition and text not in self.warned:
            warn(f"step {self.step + 1}: {text}")
        (self.warned.add if condition else self.warned.discard)(text)

    def note(self, **numbers):
        """Add numbers to the metrics of this step."""
        self.notes |= numbers

    def log(self, metrics):
        """Finish a step: write its metrics, {name: number}, to the files, and print them at some twenty steps
        of the run. Saves a checkpoint if one is due, and stops after Ctrl-C."""
        metrics |= self.notes | {"seconds": time.time() - self.step_began}
        metrics = {name: float(value) for name, value in metrics.items()}
        step, self.notes = self.step + 1, {}
        rounded = {name: round(value, 6) if math.isfinite(value) else None          # JSON has no NaN
                   for name, value in metrics.items()}
        self.metrics.write(json.dumps({"step": step} | rounded) + "\n")
        self.metrics.flush()
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        self.begin(step)
        self.save_if_due()
        show = step % max(1, self.total // 20) == 0 or step in (1, self.total)
        self.table.add(step, {name: x for name, x in metrics.items() if name != "seconds"}, show)
        self.step_began = time.time()

    def show_answers(self, model, tokenizer, prompts, n=3):
        """Print the model's answers to n of the prompts (message lists), to the same ones and with the same
        sampling noise at every call."""
        room = min(64, model.config.block_size // 2)
        prompts = [p for p in prompts if p and len(tokenizer.prompt(p)) + room <= model.config.block_size]
        some = prompts[::max(1, len(prompts) // n)][:n]
        if some:
            seeds = row_seeds(random.Random(self.cfg.seed), len(some))
            batch = self.sample(model, [tokenizer.prompt(p) for p in some], seeds, room, tokenizer.end)
            for prompt, ids, mask in zip(some, batch["tokens"], batch["mask"]):
                print_answer(prompt[-1]["content"], tokenizer.decode(ids[mask].tolist()))

    # ------------------------------------------------------------------------- files and checkpoints

    def write_examples(self, name, examples):
        """Write examples (dicts) of this step to NAME_first.json, at the first step, or NAME_last.json."""
        if processes.is_first():
            path = os.path.join(self.folder, f"{name}_{'last' if self.step else 'first'}.json")
            write_json(path, [{"step": self.step + 1} | example for example in examples])

    def save_if_due(self):
        """Save a checkpoint every save_seconds, less often where saving would take more than a twentieth of
        the time, and after a signal, but not where the last step has failed. All processes must decide alike,
        because they save together."""
        due = processes.is_first() and time.time() >= self.next_save
        wishes = torch.tensor([self.stop_signal is not None, due], dtype=torch.int32)
        stop, due = processes.total(wishes).tolist()
        if not (stop or due):
            return
        began = time.time()
        if not any(self.failed_in_a_row.values()):
            if processes.is_first():
                os.fsync(self.metrics.fileno())
            self.checkpoints.save(self.parts, self.step)
        ended = time.time()
        wait = max(self.cfg.save_seconds, 20 * (ended - began)) if self.cfg.save_seconds else 0
        self.next_save = ended + wait
        if stop:
            raise KeyboardInterrupt

    def finish(self, model, tokenizer, **facts):
        """Save the model and its tokenizer, and in run.json the facts and the seconds that the run took. All
        files are first written under another name, so that a crash leaves old ones in place."""
        launch.at_work = None
        if not is_finite(model.parameters()):
            raise ValueError(f"the weights are no longer finite after step {self.step}: not saved. "
                             "A lower --lr may help")
        aside = os.path.join(self.folder, "new")
        if processes.is_first():
            shutil.rmtree(aside, ignore_errors=True)        # what a killed run has left there
        if self.cfg.merge or not model.adapted():
            model.save(aside, whole=collect, write=processes.is_first(), tokens=tokenizer.ids())
        else:
            adapters.save(model, aside, whole=collect, write=processes.is_first())
        if processes.is_first():
            tokenizer.save(aside)
            self.metrics.close()
            if self.board:
                self.board.close()
            ended = time.time()
            about = {**self.about, "ended": ended, "seconds": round(ended - STARTED, 1),
                     "peak_memory": peak_memory(self.device), **facts}
            outputs.publish(aside, self.folder, self.cfg.out, about)
            self.checkpoints.remove()       # last: a run that is killed before this goes on from it
            if self.folder != self.cfg.out:
                shutil.rmtree(self.folder)
        processes.barrier()                                     # no process ends before the files are there
        print(f"wrote {self.cfg.out}/ after {time.time() - STARTED:.0f} s, peak memory "
              f"{peak_memory(self.device) / 1e9:.2f} GB", flush=True)


def peak_memory(device):
    """The most bytes of GPU memory that this process has held, or without a GPU of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as f:
        # Linux, whose getrusage also counts the parent's
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
