"""Run the tests that compare with plain loops under each set of vector instructions that this processor has.

    python tests/helpers/capabilities.py

PyTorch has kernels for several (ATEN_CPU_CAPABILITY), which round differently: what holds under one may fail
under another. Ends with status 1 if a test fails under any of them.
"""
import os
import subprocess
import sys

import torch

CAPABILITIES = ["default", "avx2", "avx512"]                    # each processor has them up to one of these


def available():
    """The capabilities of this processor. To force one that it lacks would stop at an illegal instruction."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return CAPABILITIES[:CAPABILITIES.index(best) + 1] if best in CAPABILITIES else CAPABILITIES[:1]


def main():
    failed = []
    for capability in available():
        print(f"--- ATEN_CPU_CAPABILITY={capability}", flush=True)
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", "plain_loop", "tests"],
                              env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"})
        failed += [capability] if done.returncode else []
    return f"failed under {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
