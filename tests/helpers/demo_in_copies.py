"""Run the demo.py of this folder, whose commands become copies of this process (os.fork) and no new
interpreters. For a copy of a process that has imported PyTorch: helpers/forks.py.
"""
import os
import runpy
import subprocess
import sys

from forks import run_in_this_copy


class Copy:
    """What demo.py uses of subprocess.Popen."""

    def __init__(self, args, env, stdout, stderr):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            run_in_this_copy({"args": [str(word) for word in args[2:]], "cwd": os.getcwd(),
                              "stdin": os.devnull, "stdout": stdout.name, "stderr": stderr.name}, env)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, 15)


subprocess.Popen = Copy
sys.path[0] = os.getcwd()                                       # not tests/helpers
runpy.run_path("demo.py", run_name="__main__")
