"""Files and folders: JSON, models' folders by name, and one run per folder. No network is needed here, so
importing this does not import PyTorch."""
import contextlib
import json
import os
import re
import warnings
from glob import glob

try:
    import fcntl
except ImportError:                     # Windows has none: two runs in one folder go unnoticed there
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))       # of this repository
ADAPTER_CONFIG = "adapter_config.json"      # a folder that holds one holds LoRA adapters in PEFT's format
UNFINISHED = "unfinished"               # the folder of a run that will replace the one in the folder above
held_locks = {}                             # {path: open file} of the locks that this process holds


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def refuse_existing(path, overwrite):
    """Raise ValueError if there is such a file, unless it may be overwritten."""
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{path} is there already: --overwrite replaces it")


@contextlib.contextmanager
def reading(path, kind):
    """A context manager that yields the value of a JSON file. Raises ValueError saying that the file is not
    of this kind ("a model's config") if it cannot be read, or if the block finds that it lacks a key or
    holds a wrong value."""
    try:
        with open(path, encoding="utf-8") as f:
            yield json.load(f)
    except KeyError as e:
        raise ValueError(f"{path}: not {kind}: {e} is missing") from None
    except (ValueError, AttributeError, TypeError, RecursionError, OverflowError, OSError) as e:
        raise ValueError(f"{path}: not {kind}: {e}") from None


def holds_model(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in ("config.json", ADAPTER_CONFIG))


def find(name):
    """The folder that holds the model called name: name itself if it is a folder with a model, otherwise
    the one into which huggingface_hub, where it is installed, downloads a model of the hub ("gpt2", or
    "owner/name"). Raises ValueError if there is none."""
    if holds_model(name):
        if os.path.exists(os.path.join(name, UNFINISHED)):
            warnings.warn(f"{name} also holds an unfinished run, in {name}/{UNFINISHED}: its model is "
                          "the one from before that run")
        return name
    script = os.path.basename(os.path.normpath(name)) + ".py"
    if script != "model.py" and os.path.exists(os.path.join(ROOT, script)):
        others = [f for f in sorted(glob(f"out/*/{script[:-3]}")) if holds_model(f)]
        raise ValueError(f"no model in {name}: run `python {script}` first, or name another folder"
                         + (f" ({others[0]})" if others else ""))
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"no model in {name}: name another folder")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except ImportError:
        raise ValueError(f"no model in {name}: name another folder (where huggingface_hub is installed, it "
                         "can be a name of the hub)") from None
    except Exception as e:                              # a download can fail with any of many exceptions
        raise ValueError(f"no model in {name}, and the hub does not give it ({type(e).__name__}): put its "
                         "config.json, model.safetensors and tokenizer.json into a folder") from None


def base_of(folder):
    """The name of the model to which a folder's adapters belong; None if the folder holds no adapters."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    if not os.path.exists(path):
        return None
    with reading(path, "adapters") as config:
        if not config["base_model_name_or_path"]:
            raise ValueError("base_model_name_or_path is empty: write the name of their model there")
        return config["base_model_name_or_path"]


def lock(folder, name=""):
    """Claim a folder for this process until it ends, however it ends; with a name, only the folder's lock of
    that name. Raises ValueError if another process has it."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, f"{name}.lock")
    if fcntl is None or path in held_locks:
        return
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder}: another run is at work here (process {file.read()}): "
                         "wait for it, or name another --out") from None
    except OSError:                     # a file system without locks
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    held_locks[path] = file
