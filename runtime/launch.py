"""From the command line to a script's `train(cfg)` and back: flags, the other processes, signals, and errors
in one line."""
import contextlib
import os
import signal
import sys
import time
import warnings

import torch

from runtime import processes
from runtime.compute import pick_device
from runtime.files import write_json
from runtime.flags import parse, program
from runtime.terminal import clear

# When this process began: its processor time until now is that of the imports, for which a person waits too.
STARTED = time.time() - time.process_time()
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
at_work = None                          # the Run that is in its training loop, for on_signal


def main(config, train, doc):
    """Run a script from the command line. config: a dataclass of flags; train(cfg): the script's work; doc:
    its description. An error that the user can mend ends the program with one line and status 1, any other
    with its traceback."""
    cfg = parse(config, doc)
    warnings.showwarning = lambda message, *_: warn(" ".join(str(message).split()))
    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        if hasattr(cfg, "timeout"):                             # a script that may run as several processes
            processes.start(pick_device(cfg.device), cfg.timeout)
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")            # the first process prints for all
        train(cfg)
        processes.stop()
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        line = explain(e, cfg)
        if cfg.debug or line is None:
            raise
        if not processes.is_first_to_fail():
            sys.exit(1)
        if isinstance(e, BrokenPipeError):                      # or Python would complain again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if "TORCHELASTIC_ERROR_FILE" in os.environ:             # torchrun ends what it prints with this
            write_json(os.environ["TORCHELASTIC_ERROR_FILE"], {"message": f"{program()}: {line}",
                                                               "timestamp": int(time.time())})
        sys.exit(f"{program()}: {line}")                        # status 1
    except KeyboardInterrupt:
        line = f"{program()}: interrupted"
        if at_work and at_work.checkpoints.last():
            line += "; the same command goes on from the last checkpoint"
        with contextlib.suppress(OSError):
            print("\n" + line, file=sys.stderr)
        sys.exit(130)


def explain(e, cfg):
    """An error as a line that says what to do, or None for a mistake in the program."""
    if processes.is_lost_connection(e):
        return (f"process {processes.rank()} has lost another one, "
                f"or waited {cfg.timeout:.0f} s for it (--timeout): {str(e).splitlines()[0]}")
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
        return ("out of memory: a lower --micro_batch, --sample_batch or --batch may fit, or under fsdp "
                "--no-gather_at_once")
    if isinstance(e, BrokenPipeError):
        return "nobody reads the output any more"
    if isinstance(e, OSError):
        return f"{e.filename or getattr(cfg, 'out', 'a file')}: {e.strerror or e}"
    return str(e) if isinstance(e, ValueError) else None


def on_signal(number, frame):
    """Ctrl-C, a closed terminal, or a scheduler's SIGTERM: a run in its training loop finishes the step and
    saves. The same signal once more, or at any other time, stops the program at once."""
    if at_work is None or at_work.stop_signal == number:
        raise KeyboardInterrupt
    if at_work.stop_signal is None:
        with contextlib.suppress(OSError):
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
    at_work.stop_signal = number


def warn(text):
    """Print a warning as one line on stderr, from the first process alone."""
    if processes.is_first():
        print(f"{clear(sys.stderr)}{program()}: warning: {text}", file=sys.stderr, flush=True)
