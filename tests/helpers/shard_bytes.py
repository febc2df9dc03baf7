"""In several processes: one training step of a network sharded by FSDP; each process prints the bytes that it
holds and the whole's."""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from model import GPT, GPTConfig  # noqa: E402
from runtime import processes, sharding  # noqa: E402
from runtime.optimizer import make_optimizer  # noqa: E402

processes.start("cpu", 60)
model = GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=3, n_head=4, n_embd=64))
sharding.shard(model, "cpu")
optimizer = make_optimizer(model, 1e-3)
tokens = torch.randint(512, (2, 64))
model.logprobs(tokens, torch.ones_like(tokens, dtype=torch.bool)).mean().backward()
optimizer.step()
held, whole = [], []
for kind in (lambda p: [p], lambda p: [p.grad],
             lambda p: [x for x in optimizer.state[p].values() if x.dim()]):
    tensors = [x for p in model.parameters() for x in kind(p)]
    held.append(sum(sharding.local_tensor(x).nbytes for x in tensors))
    whole.append(sum(x.numel() * x.element_size() for x in tensors))
print(f"process {processes.rank()} holds {held} of {whole}", flush=True)
processes.stop()
