"""The whole of RLHF on the embedded world: seven commands, which `make demo` runs.

    python demo.py                  everything it writes is in out/demo/
    python demo.py --seed 1 --out out/demo1

Started again, it goes on where it was stopped, and runs nothing twice. Two commands of which neither needs
the other run side by side, on one processor core each; what the second prints is shown after the first.
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
COMMANDS = {                            # {name: (what it does, command)}; {out} is --out
    "world": ("the world: demonstrations, preferences, prompts", "-m data --out {out}/world"),
    "sft": ("SFT: imitate demonstrations, the bad ones too", "sft.py --out {out}/sft --data {out}/world"),
    "reward_model": ("reward model: learn what people prefer",
                     "reward_model.py --out {out}/reward_model --data {out}/world --init {out}/sft"),
    "dpo": ("DPO: learn from the same preferences, without a reward model",
            "dpo.py --out {out}/dpo --data {out}/world --init {out}/sft --nll_coef 2"),
    "ppo": ("PPO: maximise the learned reward, stay near the SFT model",
            "ppo.py --out {out}/ppo --data {out}/world --init {out}/sft --reward {out}/reward_model"),
    "ppo_no_kl": ("PPO without a KL penalty: maximise the learned reward, and nothing else",
                  "ppo.py --out {out}/ppo_no_kl --data {out}/world --init {out}/sft "
                  "--reward {out}/reward_model --kl_coef 0 --no-adaptive_kl"),
    "report": ("evaluation: all models answer held-out prompts",
               "evaluate.py {out}/sft {out}/dpo {out}/ppo {out}/ppo_no_kl --out {out} --data {out}/world "
               "--demonstrations {out}/world --reward {out}/reward_model"),
}
SIDE_BY_SIDE = [["world"], ["sft"], ["reward_model", "dpo"], ["ppo", "ppo_no_kl"], ["report"]]


@dataclass
class Config:
    out: str = flag("out/demo", "folder of everything that is written")
    seed: int = flag(0, "seed of the world, the weights and the sampling", 0, 2 ** 31)
    overwrite: bool = flag(False, "run everything again, and replace what is there")


def words_of(cfg, name):
    """A command as the words of its command line."""
    words = shlex.split(COMMANDS[name][1].format(out=shlex.quote(cfg.out))) + ["--seed", str(cfg.seed)]
    return words + ["--overwrite"] * (cfg.overwrite and name != "report")


def start(words, threads, log):
    """Start a command on so many threads, and return its process. It prints to the terminal, or into the file
    `log`. The number of threads is fixed because sums round differently with another one."""
    script = words[0] if words[0] == "-m" else ROOT / words[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, script, *words[1:]], env=environment, stdout=log, stderr=log)


def follow(path, process):
    """Print what a process has written into a file, and what it writes until its end."""
    with open(path, encoding="utf-8", errors="replace") as f:     # a read may end within a character
        ended = False
        while not ended:
            ended = process.poll() is not None
            print(f.read(), end="", flush=True)
            time.sleep(0 if ended else 0.2)


def run(cfg, names):
    """Run commands side by side. What the first one prints is seen at once, and then what the others print.
    Raises ValueError if one fails, after it has stopped the others, which save what they have."""
    processes, threads = [], 2 // len(names)
    try:
        for name in names:
            log = None if name == names[0] else open(f"{cfg.out}/{name}.log", "w", encoding="utf-8")
            processes.append(start(words_of(cfg, name), threads, log))
        for name, process in zip(names, processes):
            print(f"\n{list(COMMANDS).index(name) + 1} of {len(COMMANDS)}  {COMMANDS[name][0]}")
            command = textwrap.wrap(f"$ python {shlex.join(words_of(cfg, name))}", 94,
                                    break_long_words=False, break_on_hyphens=False)
            print(" \\\n    ".join(command), flush=True)
            if name != names[0]:
                follow(f"{cfg.out}/{name}.log", process)
            if process.wait():
                raise ValueError(f"{name} failed, see above; the same command goes on from here")
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def demo(cfg):
    os.makedirs(cfg.out, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that run() stops what it has started
    for names in SIDE_BY_SIDE:
        run(cfg, names)


if __name__ == "__main__":
    try:
        demo(parse(Config, __doc__))
    except (OSError, ValueError) as e:
        sys.exit(f"demo.py: {e}")
    except KeyboardInterrupt:
        sys.exit("demo.py: interrupted; the same command goes on from here")
