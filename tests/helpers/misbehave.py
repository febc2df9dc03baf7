"""Run a script of this project, in float64 unless it is told a precision, and let one of its processes fail
at the third step, in the first life of the job:

    misbehave.py rollout|update|gather|save kill|hang|raise RANK script.py flags ...
"""
import os
import runpy
import signal
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import model  # noqa: E402
from runtime import checkpoints, launch, run  # noqa: E402

where, how, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = sys.argv[4:]
# A file: restarts are counted machine by machine.
done = sys.argv[sys.argv.index("--out") + 1] + ".misbehaved"
if "--precision" not in sys.argv:
    torch.set_default_dtype(torch.float64)


def fail():
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(10 ** 6)
    raise ValueError("this process has had enough")


def fail_before(function):
    def wrapped(*args, **kwargs):
        at_third_step = launch.at_work is not None and launch.at_work.step == 2
        if at_third_step and int(os.environ["RANK"]) == rank and not os.path.exists(done):
            open(done, "w").close()
            fail()
        return function(*args, **kwargs)
    return wrapped


if where == "rollout":
    model.GPT.generate = fail_before(model.GPT.generate)
elif where == "update":
    run.Run.optimizer_step = fail_before(run.Run.optimizer_step)
elif where == "gather":                             # with a part of the checkpoint's file written
    checkpoints.collect = fail_before(checkpoints.collect)
else:                                               # with all of it written, and not in its place yet
    os.replace = fail_before(os.replace)
runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
