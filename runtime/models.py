"""Networks from checkpoint folders."""
import os

from model import GPT
from runtime import processes

STAGES = ("sft", "reward_model", "dpo", "ppo")


def require(folder):
    """Raise ValueError if a checkpoint folder is not there, saying which stage to run first."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        stage = os.path.basename(os.path.normpath(folder))
        first = f"run `python {stage}.py` first, or " if stage in STAGES else ""
        raise ValueError(f"no model in {folder}: {first}name another folder")


def load(folder, head=None):
    """GPT.load. Where there are several processes, each one leaves the weights in the file until they are
    placed: it never holds more than it will keep, and a block for a moment."""
    require(folder)
    return GPT.load(folder, head, mapped=processes.world_size() > 1)


def load_reward_model(folder):
    """A network that gives scores. Raises ValueError for any other."""
    model = load(folder)
    if model.head_kind != "scalar":
        raise ValueError(f"{folder} is no reward model: it has no score")
    return model
