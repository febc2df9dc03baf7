"""The folder runtime/ as a whole: what it does not know, and what it does not load."""
import glob
import os
import re
import subprocess
import sys

import pytest
from helpers.start import ROOT

NAMES = ("sft|ppo|dpo|grpo|rloo|ptx|reward_model|evaluate|variants|feedback|lab|world|annotators?|rollouts?|"
         "judges?|kl|critic|actor|gae|clip_fraction")


def test_no_file_names_a_stage_the_world_or_an_algorithm():
    files = glob.glob(os.path.join(ROOT, "runtime/*.py"))
    found = [f"{os.path.basename(path)}:{number}: {line.strip()}" for path in files
             for number, line in enumerate(open(path, encoding="utf-8"), 1)
             if re.search(rf"\b({NAMES})\b", line, re.IGNORECASE)]
    assert len(files) > 10 and found == []


@pytest.mark.parametrize("module", ["runtime.files", "runtime.flags", "data.records", "data.tokenizer",
                                    "data.loading"])
def test_reading_records_and_text_loads_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
