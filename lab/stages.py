"""Run stages as commands, one after another: used by the experiments here and by feedback/rounds.py."""
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent               # of this repository


def run_stage(command, done, quiet=False, **flags):
    """Run a command in the current folder and return the seconds that it took, from the file `done` if it
    has been run before.

    command: a script of this repository with its flags ("ppo.py --steps 60"), or a module ("-m data"); flags:
    more of them, whose values may hold spaces; done: a file that is written after the command has ended with
    status 0; quiet: hide what it prints, except for warnings and errors. Raises ValueError if the command
    fails, or if `done` was written after another one: a result must not be taken for that of other flags."""
    words = shlex.split(command)
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    if os.path.exists(done):
        before = json.loads(Path(done).read_text("utf-8"))
        if before["command"] != words:
            raise ValueError(f"{os.path.abspath(done)}: written by `{shlex.join(before['command'])}`, not by "
                             f"`{shlex.join(words)}`: remove its folder, or use another one")
        return before["seconds"]
    print(f"\n--- {shlex.join(words)}", flush=True)
    began = time.time()
    path = words[0] if words[0] == "-m" else ROOT / words[0]
    if subprocess.run([sys.executable, path, *words[1:]], stdout=subprocess.DEVNULL if quiet else None,
                      env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
        raise ValueError(f"`{shlex.join(words)}` failed in {os.getcwd()}: see above")
    seconds = round(time.time() - began, 1)
    write_json(done, {"command": words, "seconds": seconds})
    return seconds


def run_stages(folder, stages, seed):
    """Go to a folder and run {name: command} there, each of which writes out/<name>/: {name: seconds}."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    return {name: run_stage(command, f"out/{name}/done.json", quiet=True, out=f"out/{name}", seed=seed)
            for name, command in stages.items()}
