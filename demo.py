"""The whole of RLHF on the embedded world: seven commands, which `make demo` runs.

    python demo.py                  everything it writes is in out/demo/
    python demo.py --seed 1 --out out/demo1

Started again, it goes on where it was stopped, and runs nothing twice. A command begins as soon as the
folders that it reads are ready and a processor core is free. What it prints is shown after what the commands
before it print.
"""
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.flags import flag, parse

ROOT = Path(__file__).resolve().parent
CORES = 2
# {name: (what it does, number of threads, command)}, in the order in which they are shown; {out} is --out.
# The number of threads is fixed because sums round differently with another one.
COMMANDS = {
    "world": ("the world: demonstrations, preferences, prompts", 1, "-m data --out {out}/world"),
    "sft": ("SFT: imitate demonstrations, the bad ones too", 2, "sft.py --out {out}/sft --data {out}/world"),
    "reward_model": ("reward model: learn what people prefer", 1,
                     "reward_model.py --out {out}/reward_model --data {out}/world --init {out}/sft"),
    "dpo": ("DPO: learn from the same preferences, without a reward model", 1,
            "dpo.py --out {out}/dpo --data {out}/world --init {out}/sft --nll_coef 2"),
    "ppo_no_kl": ("PPO without a KL penalty: maximise the learned reward, and nothing else", 1,
                  "ppo.py --out {out}/ppo_no_kl --data {out}/world --init {out}/sft "
                  "--reward {out}/reward_model --kl_coef 0 --no-adaptive_kl --steps 60"),
    "ppo": ("PPO: maximise the learned reward, and stay near the SFT model", 1,
            "ppo.py --out {out}/ppo --data {out}/world --init {out}/sft --reward {out}/reward_model"),
    "report": ("evaluation: all models answer held-out prompts", 2,
               "evaluate.py {out}/sft {out}/dpo {out}/ppo {out}/ppo_no_kl --out {out} --data {out}/world "
               "--demonstrations {out}/world --reward {out}/reward_model"),
}


@dataclass
class Config:
    out: str = flag("out/demo", "folder of everything that is written")
    seed: int = flag(0, "seed of the world, the weights and the sampling", 0, 2 ** 31)
    overwrite: bool = flag(False, "run everything again, and replace what is there")


def words_of(cfg, name):
    """A command as the words of its command line."""
    words = shlex.split(COMMANDS[name][2].format(out=shlex.quote(cfg.out))) + ["--seed", str(cfg.seed)]
    return words + ["--overwrite"] * (cfg.overwrite and name != "report")


def inputs_of(name):
    """The commands whose folders a command reads."""
    words = COMMANDS[name][2].split()
    return [other for other in COMMANDS if other != name and f"{{out}}/{other}" in words]


def begin_what_can(cfg, processes):
    """Start all commands whose inputs are ready and for which there are cores. processes: {name: process} of
    those that have been started. They print into files, out/demo/<name>.log."""
    for name, (_, threads, _) in COMMANDS.items():
        busy = sum(COMMANDS[other][1] for other, process in processes.items() if process.poll() is None)
        ready = all(other in processes and processes[other].poll() == 0 for other in inputs_of(name))
        if name not in processes and ready and busy + threads <= CORES:
            words = words_of(cfg, name)
            script = words[0] if words[0] == "-m" else ROOT / words[0]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
            with open(f"{cfg.out}/{name}.log", "w", encoding="utf-8") as log:
                processes[name] = subprocess.Popen([sys.executable, "-u", script, *words[1:]],
                                                   env=environment, stdout=log, stderr=log)


def show(cfg, name, processes):
    """Print a command, and what it prints until its end. Raises ValueError if it fails."""
    print(f"\n{list(COMMANDS).index(name) + 1} of {len(COMMANDS)}  {COMMANDS[name][0]}")
    command = textwrap.wrap(f"$ python {shlex.join(words_of(cfg, name))}", 94,
                            break_long_words=False, break_on_hyphens=False)
    print(" \\\n    ".join(command), flush=True)
    log, ended = None, False
    while not ended:
        begin_what_can(cfg, processes)
        if name in processes:
            log = log or open(f"{cfg.out}/{name}.log", encoding="utf-8", errors="replace")
            ended = processes[name].poll() is not None
            print(log.read(), end="", flush=True)
        time.sleep(0 if ended else 0.2)
    log.close()
    if processes[name].returncode:
        raise ValueError(f"{name} failed, see above; the same command goes on from here")


def demo(cfg):
    os.makedirs(cfg.out, exist_ok=True)
    processes = {}
    try:
        for name in COMMANDS:
            show(cfg, name, processes)
    finally:
        for process in processes.values():
            process.terminate()                                     # a stage saves what it has
        for process in processes.values():
            process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that demo() stops what it has started
    try:
        demo(parse(Config, __doc__))
    except (OSError, ValueError) as e:
        sys.exit(f"demo.py: {e}")
    except KeyboardInterrupt:
        sys.exit("demo.py: interrupted; the same command goes on from here")
