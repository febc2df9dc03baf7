"""Folders rounded to 8 and 4 bits: the layers' matrices are rounded, nothing else changes."""
import subprocess
import sys

import torch
from helpers.start import ROOT

from data.tokenizer import learn
from docs.quantized import int8, main, nf4
from model import GPT, GPTConfig, Linear
from runtime.nf4 import nf4_levels


def test_int8_is_the_nearest_of_255_steps_of_each_row():
    torch.manual_seed(0)
    W = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    W[2] = 0
    found = int8(W)
    assert torch.equal(found[2], W[2])
    for row, mine in zip(W, found):
        step = max(abs(x) for x in row.tolist()) / 127
        for x, y in zip(row.tolist(), mine.tolist()):
            assert step == 0 or abs(y / step - round(x / step)) < 1e-3, (x, y)


def test_nf4_takes_sixteen_values_per_block_at_the_nearest_level():
    torch.manual_seed(0)
    W = torch.randn(4, 64, dtype=torch.float64)
    found = nf4(W)
    assert found.dtype == W.dtype
    for row, mine in zip(W, found):                             # 64 numbers are a block
        assert len(set(mine.tolist())) <= 16
        gap = nf4_levels().diff().max().item() / 2 * row.abs().max()
        assert (row - mine).abs().max() < 1.05 * gap            # a little more: the scale has 8 bits


def test_folders_differ_in_the_layers_matrices_alone(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32, tied=False))
    tokenizer = learn(["one and two"], vocab_size=300)
    model.save(tmp_path / "a", tokens=tokenizer.ids())
    tokenizer.save(tmp_path / "a")
    main(f"{tmp_path}/a/")
    before = model.state_dict()
    matrices = {f"blocks.{name}.weight" for name, module in model.blocks.named_modules()
                if isinstance(module, Linear)}
    assert len(matrices) == 2 * 6
    for name, rounded in (("int8", int8), ("nf4", nf4)):
        after = GPT.load(tmp_path / f"a_{name}").state_dict()
        assert {key for key, x in before.items() if not torch.equal(x, after[key])} == matrices
        assert all(torch.equal(after[key], rounded(before[key])) for key in matrices)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / f"a_{name}" / file).read_bytes()


def test_a_missing_folder_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "docs.quantized", str(tmp_path / "none")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none" in done.stderr
