"""Which attention kernel is faster on a CPU in bfloat16: PyTorch's fused one, or operation by operation.

    python -m bench.attention           a minute

Forward and backward over about 2,048 tokens: the fastest of ten passes, with the two kernels in turn. Where
the last column is above 1, the fused kernel is the slower one.
"""
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "unfused": SDPBackend.MATH}


def seconds(kernel, q, k, v, gradient):
    with sdpa_kernel(kernel):
        began = time.perf_counter()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        y.backward(gradient)
    return time.perf_counter() - began


def main():
    print(f"{torch.get_num_threads()} threads\n\n"
          "| heads | key heads | head width | length | fused, ms | unfused, ms | fused / unfused |"
          "\n|---|---|---|---|---|---|---|")
    for H, H_kv, D in ((9, 3, 64), (12, 12, 64), (4, 4, 32)):
        for T in (32, 64, 96, 128, 160, 192, 256, 512):
            q, k, v = (torch.randn(2048 // T, T, heads, D).bfloat16().transpose(1, 2).requires_grad_()
                       for heads in (H, H_kv, H_kv))
            gradient = torch.randn_like(q)
            best = {name: 1e9 for name in KERNELS}
            for _ in range(10):
                for name, kernel in KERNELS.items():
                    best[name] = min(best[name], seconds(kernel, q, k, v, gradient))
            fused, unfused = best.values()
            print(f"| {H} | {H_kv} | {D} | {T} | {1e3 * fused:.1f} | {1e3 * unfused:.1f} | "
                  f"{fused / unfused:.2f} |", flush=True)


if __name__ == "__main__":
    main()
