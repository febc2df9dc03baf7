"""Output folders: one may be empty, hold an unfinished run, which the same command continues, or a finished
one, which is overwritten only if --overwrite is given."""
import dataclasses
import json
import os
import shutil
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from runtime import processes
from runtime.files import ROOT, UNFINISHED, holds_model, reading, write_json
from runtime.inputs import checksum

# Flags that may change when a run goes on, because they do not change the weights, apart from rounding.
FREE = {"out", "debug", "resume", "overwrite", "device", "save_seconds", "parallel", "timeout", "offload",
        "micro_batch", "micro_tokens", "sample_batch", "checkpoint_blocks", "compile", "gather_at_once"}
WRITTEN = ("metrics.jsonl", "*_first.json", "*_last.json", "events.out.tfevents*")      # by a run as it goes


def read_run(folder):
    """A folder's run.json, or {} if it has none. Raises ValueError if it is damaged."""
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        return {}
    with reading(path, "a run's settings (name another --out)") as run:
        return {"stage": run["stage"], "settings": {**run["settings"]}, "inputs": {**run["inputs"]},
                "code": {}, "files": []} | run


def code():
    """{file: checksum} of the modules in use that lie beside model.py or beside the script."""
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    folders = {ROOT, os.path.dirname(getattr(sys.modules["__main__"], "__file__", ROOT))}
    return {os.path.relpath(file, ROOT): checksum(file) for file in sorted(files)
            if os.path.dirname(file) in folders and os.path.isfile(file)}


def differences(cfg, was, now):
    """What changes between the settings and inputs of a run.json and those of now: a list of texts."""
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}         # of flags that did not exist then
    before, after = (defaults | run["settings"] | run["inputs"] for run in (was, now))
    changed = [name for name in sorted(after.keys() - FREE)
               if before.get(name) != json.loads(json.dumps(after[name]))]
    if was["stage"] != now["stage"]:
        return [f"it is of {was['stage']}"]
    return [f"{name} was {before.get(name)!r}, is now {after[name]!r}" for name in changed]


def changed_code(was, now):
    """The files that have changed since a run began: a list of texts."""
    return [f"{file} has changed since" for file, checksum in now["code"].items()
            if was["code"].get(file, checksum) != checksum]


def working_folder(cfg, now):
    """The folder in which a run works: --out, or with --overwrite a folder inside it, so that the finished
    run there stays whole until the new one is finished. now: the run's entry in run.json.

    Raises ValueError if --out holds another finished run, or a model that no run has written. Ends the
    program, with status 0, if it holds this very run."""
    was = read_run(cfg.out)
    if "ended" not in was:
        if holds_model(cfg.out) and not was:
            raise ValueError(f"{cfg.out} holds a model that no run has written: name another --out")
        return cfg.out
    if cfg.overwrite:
        return os.path.join(cfg.out, UNFINISHED)
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(was["ended"]))
    changed = differences(cfg, was, now) + changed_code(was, now)
    if not changed:
        print(f"{cfg.out} holds this run already, finished {date}; --overwrite would run it again")
        processes.stop()
        raise SystemExit(0)
    shown = ", ".join(changed[:3] + ["..."] * (len(changed) > 3))
    raise ValueError(f"{cfg.out} holds a finished run of {was['stage']}, {date} ({shown}): "
                     "name another --out, or add --overwrite")


def check_unfinished(cfg, folder, now):
    """Raise ValueError if the unfinished run in the folder had other settings or other input files. Returns
    a warning for each file of code that has changed since."""
    was = read_run(folder)
    if changed := differences(cfg, was, now):
        raise ValueError(f"{cfg.out} holds an unfinished run with other settings ({changed[0]}): continue it "
                         "with its own command, name another --out, or start anew with --no-resume")
    return [f"{text}; the run goes on with the new code" for text in changed_code(was, now)]


def publish(new, folder, out, about):
    """Put a finished run's files into --out: those of its model, from the folder `new`, and those that it has
    written in its working folder. Files that only the run before has written are removed. run.json (`about`)
    comes last: until then the run counts as unfinished, and the same command finishes it."""
    written = [name for name in os.listdir(folder) if any(fnmatch(name, pattern) for pattern in WRITTEN)]
    if folder != out:
        for name in written:
            shutil.copyfile(os.path.join(folder, name), os.path.join(new, name))
    finished = sorted({*os.listdir(new)} - {"run.json"})
    files = sorted({*finished, *written})
    write_json(os.path.join(new, "run.json"), about | {"files": files})
    for name in finished:                   # from here on nothing needs room on the disk
        os.replace(os.path.join(new, name), os.path.join(out, name))
    for name in set(read_run(out).get("files", [])) - set(files):
        Path(out, name).unlink(missing_ok=True)
    os.replace(os.path.join(new, "run.json"), os.path.join(out, "run.json"))
    os.rmdir(new)
