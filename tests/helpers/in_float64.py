"""Run scripts of this project one after another, with all numbers in float64, in this process, or in several
that are started together:

    in_float64.py "sft.py --out out/a" "ppo.py --out out/b" ...
"""
import os
import runpy
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from runtime import processes  # noqa: E402

torch.set_default_dtype(torch.float64)
processes.start("cpu", 60)
stop, processes.stop = processes.stop, lambda: None     # they stay together from script to script
for command in sys.argv[1:]:
    sys.argv = command.split()
    runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
stop()
