"""Run a program whose commands (subprocess.Popen) become copies of this process (os.fork), and no new
interpreters. For a copy of a process that has imported PyTorch: helpers/forks.py.

    commands_in_copies.py demo.py
    commands_in_copies.py torch.distributed.run --standalone ppo.py ...
"""
import os
import runpy
import subprocess
import sys
import time

from forks import run_in_this_copy


class Copy:
    """What the programs use of subprocess.Popen, for a command that begins with `python -u`."""

    def __init__(self, args, env, stdout=None, stderr=None, start_new_session=False):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            run_in_this_copy({"args": [str(word) for word in args[2:]], "cwd": os.getcwd(),
                              "stdin": os.devnull, "stdout": stdout.name if stdout else "/dev/stdout",
                              "stderr": stderr.name if stderr else "/dev/stderr"}, env)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=float("inf")):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, 15)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()                                       # not tests/helpers
    del sys.argv[0]
    subprocess.Popen = Copy
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
