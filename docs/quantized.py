"""A model folder with the matrices of its layers rounded to 8 and to 4 bits: what that does to its answers.

    python -m docs.quantized out/ppo        writes out/ppo_int8 and out/ppo_nf4
    python evaluate.py out/sft out/ppo out/ppo_int8 out/ppo_nf4 --samples 8

Both are ordinary folders, whose numbers are rounded and stored as before, so that they are no smaller:
everything that reads a folder can then measure the rounding. Embeddings, norms and biases stay as they are.
"""
import sys

from data.tokenizer import Tokenizer
from model import GPT, Linear
from runtime.nf4 import NF4


def int8(W):
    """Each row as whole numbers from -127 to 127 times its largest absolute value / 127: half a step is the
    largest error. A scale per row, since one large weight would coarsen all that share its scale."""
    scale = W.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (W / scale).round() * scale


def nf4(W):
    """As `--nf4` keeps frozen matrices: see runtime/nf4.py."""
    return NF4(W)().to(W.dtype)


def main(folder):
    tokenizer = Tokenizer.load(folder)
    for name, rounded in (("int8", int8), ("nf4", nf4)):
        model = GPT.load(folder).requires_grad_(False)
        for module in model.blocks.modules():
            if isinstance(module, Linear):
                module.weight.copy_(rounded(module.weight))
        out = f"{folder.rstrip('/')}_{name}"
        model.save(out, tokens=tokenizer.ids())
        tokenizer.save(out)
        print(f"wrote {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except (OSError, ValueError) as e:
        sys.exit(str(e))
