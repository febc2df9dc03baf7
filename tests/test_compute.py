"""Devices, and rows in micro-batches: a weighted mean over rows and a map over rows,
however the work is split."""
import contextlib
import random

import pytest
import torch
from helpers.arrays import tiny

from model import GPT, GPTConfig
from runtime import compute
from runtime.compute import Meter, distribute, pad
from runtime.flags import Settings


def test_a_device_that_is_not_there_is_refused():
    assert compute.pick_device("cpu") == "cpu" and compute.pick_device("auto") in ("cuda", "mps", "cpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ValueError, match=f"--device {name}"):
                compute.pick_device(name)


@pytest.mark.parametrize("capability, is_bfloat16", [((7, 0), False), ((7, 5), False), ((8, 0), True),
                                                     ((9, 0), True)])
def test_a_gpu_without_units_for_bfloat16_computes_in_float32(monkeypatch, capability, is_bfloat16):
    monkeypatch.setattr(compute, "pick_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    before = torch.get_float32_matmul_precision()
    try:
        assert compute.Compute(Settings()).bfloat16 == is_bfloat16
        assert compute.Compute(Settings(precision="bfloat16")).bfloat16         # who asks for it gets it
        assert not compute.Compute(Settings(precision="float32")).bfloat16
    finally:
        torch.set_float32_matmul_precision(before)


def test_pad_fills_on_the_right():
    out = pad([[1, 2, 3], [4]])
    assert out.dtype == torch.int64 and out.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_pad_keeps_masks_bool():
    out = pad([[True], [False, True]])
    assert out.dtype == torch.bool and out.tolist() == [[True, False], [False, True]]


# ------------------------------------------------------------------------------------------- micro-batches

def random_lengths(rng, n):
    """Rows of one sequence, or rows of two to four."""
    if rng.random() < 0.5:
        return [rng.randrange(1, 30) for _ in range(n)]
    return [[rng.randrange(1, 30) for _ in range(rng.randrange(2, 5))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(40))
def test_micro_batches_hold_every_row_once_and_never_more_than_their_bounds(seed):
    rng = random.Random(seed)
    lengths = random_lengths(rng, rng.randrange(1, 40))
    size, tokens, ranks = rng.randrange(1, 12), rng.choice([0, 40, 90]), rng.randrange(1, 5)
    everyone = distribute(lengths, size, tokens, ranks)
    assert len(everyone) == ranks
    assert sorted(i for pieces in everyone for piece in pieces for i in piece) == list(range(len(lengths)))
    for pieces in everyone:
        for piece in pieces:
            rows = [lengths[i] if isinstance(lengths[i], list) else [lengths[i]] for i in piece]
            sequences = [n for row in rows for n in row]
            assert piece
            if len(piece) > 1:                                  # a row that is larger comes alone
                assert len(sequences) <= size
                assert tokens == 0 or len(sequences) * max(sequences) <= tokens
    counts = [sum(len(piece) for piece in pieces) for pieces in everyone]
    assert max(counts) - min(counts) <= 1


def test_micro_batches_are_as_large_as_their_bounds_allow():
    assert distribute([5, 5, 5, 5, 5], 2, 0, 1) == [[[0, 1], [2, 3], [4]]]
    assert distribute([5, 5, 5, 5, 5], 9, 10, 1) == [[[0, 1], [2, 3], [4]]]
    assert distribute([[5, 4], [5], [1, 2]], 3, 0, 1) == [[[2], [0, 1]]]
    assert distribute([[5, 4], [5], [1, 2]], 9, 12, 1) == [[[2], [0], [1]]]


def test_neighbours_in_length_go_together_and_equal_lengths_keep_their_order():
    assert distribute([9, 1, 8, 1, 9, 2], 2, 0, 1) == [[[1, 3], [5, 2], [0, 4]]]
    assert distribute([9, 1, 8, 1, 9, 2], 2, 0, 2) == [[[1, 5], [0]], [[3, 2], [4]]]


# --------------------------------------------------------------------------------------- on several processes

class Pretend:
    """Runs a function as each of n processes in turn, without torchrun: once until it sends something to the
    others, and once more to the end, when it gets what they have sent."""

    def __init__(self, monkeypatch, n):
        self.n, self.monkeypatch = n, monkeypatch

    def each(self, function):
        """What the function returns on each process."""
        sent, results = [], []

        def send(x):
            sent.append(x)
            raise InterruptedError
        for r in range(self.n):
            with contextlib.suppress(InterruptedError):
                self.run_as(r, send, send, function)
        for r in range(self.n):
            results.append(self.run_as(r, lambda x: sum(sent), lambda x: sent, function))
        return results

    def run_as(self, r, total, gather, function):
        pretended = {"rank": lambda: r, "world_size": lambda: self.n, "total": total, "gather": gather}
        for name, value in pretended.items():
            self.monkeypatch.setattr(compute, name, value)
        return function()


def small(**settings):
    return compute.Compute(Settings(device="cpu", **settings))


@pytest.mark.parametrize("processes, rows", [(1, 7), (2, 7), (3, 7), (4, 3), (5, 1)])
@pytest.mark.parametrize("micro_batch", [1, 2, 50])
def test_a_weighted_mean_and_its_gradient_do_not_depend_on_how_rows_are_split(
        monkeypatch, processes, rows, micro_batch):
    """Processes without rows go along with a row of others, which counts nothing."""
    torch.manual_seed(0)
    x, weights = torch.randn(rows, 3).double(), torch.randint(1, 5, (rows,))
    w = torch.randn(3).double().requires_grad_()
    numbers, passes, gradients = ((x @ w) ** 2), [], []
    want = (numbers * weights).sum() / weights.sum()
    [want_gradient] = torch.autograd.grad(want, w)

    def work():
        w.grad, stats = None, Meter()
        for some, share in small(micro_batch=micro_batch).micro_batches(list(x), weights, [4] * rows):
            passes.append(len(some))
            some = torch.stack(some)
            n = weights[[i for i in range(rows) for row in some if torch.equal(row, x[i])]]
            loss = (((some @ w) ** 2) * n).sum() / n.sum()
            (share * loss).backward()
            stats.add(share, loss=loss, first=(some[:, 0] * n).sum() / n.sum())
        gradients.append(w.grad)
        return stats.means()
    found = Pretend(monkeypatch, processes).each(work)
    for means in found:
        assert means["loss"] == pytest.approx(want.item(), abs=1e-12)
        assert means["first"] == pytest.approx(((x[:, 0] * weights).sum() / weights.sum()).item(), abs=1e-12)
    torch.testing.assert_close(sum(gradients[-processes:]), want_gradient, rtol=1e-12, atol=1e-12)
    assert len(passes) % processes == 0, "all processes run as many forward passes"
    assert max(passes) <= micro_batch


@pytest.mark.parametrize("processes, rows", [(1, 7), (2, 7), (3, 7), (4, 3), (5, 1)])
@pytest.mark.parametrize("micro_batch", [1, 2, 50])
def test_a_map_keeps_the_rows_order_and_gives_all_of_them_to_every_process(
        monkeypatch, processes, rows, micro_batch):
    lengths = [random.Random(i).randrange(1, 9) for i in range(rows)]
    passes = []

    def double(some):
        passes.append(len(some))
        return {"twice": pad([[2 * i + 1] * lengths[i] for i in some]),
                "odd": torch.tensor([i % 2 == 1 for i in some])}
    for found in Pretend(monkeypatch, processes).each(
            lambda: small(micro_batch=micro_batch).map(double, range(rows), lengths)):
        assert torch.equal(found["twice"], pad([[2 * i + 1] * lengths[i] for i in range(rows)]))
        assert found["odd"].tolist() == [i % 2 == 1 for i in range(rows)]
    assert len(passes) % processes == 0 and max(passes) <= micro_batch


def test_a_batch_comes_in_smaller_batches_without_the_columns_that_only_others_need():
    batch = {"tokens": pad([[1, 2, 3], [4], [5, 6]]), "lengths": torch.tensor([3, 1, 2])}
    found = [(b["tokens"].tolist(), share)
             for b, share in small(micro_batch=2).micro_batches(batch, [2, 1, 1])]
    assert found == [([[4, 0], [5, 6]], 0.5), ([[1, 2, 3]], 0.5)]
    twice = small(micro_batch=2).map(lambda b: {"twice": 2 * b["tokens"]}, batch)["twice"]
    assert torch.equal(twice, 2 * batch["tokens"])


def test_without_gradients_the_same_loop_measures():
    w, stats = torch.ones(1, requires_grad=True), Meter()
    with torch.no_grad():
        for some, share in small().micro_batches([1.0, 3.0], [1, 1], [1, 1]):
            stats.add(share, loss=(w * sum(some)).sum() / len(some))
    assert stats.means() == {"loss": 2.0} and w.grad is None


# ------------------------------------------------------------------------------------------- networks

def test_a_network_that_is_offloaded_is_on_the_device_only_while_it_is_needed():
    """Another precision stands in for another device: what went there can be told from what stayed."""
    device, frozen, idle, trained = small(offload=True), tiny("lm"), tiny("lm"), tiny("lm")
    device.cfg.checkpoint_blocks = False
    device.place(frozen.requires_grad_(False), idle.requires_grad_(False), trained)
    before = [(p.data_ptr(), p.clone()) for p in frozen.parameters()]
    device.device, tokens, found = torch.float64, torch.ones(1, 4, dtype=torch.long), []

    def use():
        frozen.hidden(tokens)
        found.append([next(model.parameters()).dtype for model in (frozen, idle, trained)])
    with device.computing():
        use()
        use()
        assert found == [[torch.float64, torch.float32, torch.float32]] * 2
    assert not device.fetched
    for p, (place, value) in zip(frozen.parameters(), before):      # nothing was copied back
        assert p.data_ptr() == place and torch.equal(p, value)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_compiled_network_stays_compiled_whatever_goes_through_it(kv_heads):
    """Whole graphs alone: a break, or a use too many, would be an error."""
    torch._dynamo.reset()
    device = small(compile=True)
    model = GPT(GPTConfig(64, 64, 2, 4, 32, n_kv_head=kv_heads, positions="rotary", norm="rmsnorm"))
    device.cfg.checkpoint_blocks = False
    device.place(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows, width in ((4, 10), (3, 12), (1, 7), (5, 30), (1, 30), (1, 2)):
            tokens = torch.randint(64, (rows, width))
            model.logprobs(tokens, tokens >= 0).sum().backward()
            with torch.no_grad():
                model(tokens), model(tokens[:, :1])
            model.generate(tokens, torch.full((rows,), width), 20, stop_token=3)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_base_that_adapters_keep_on_the_device_is_not_offloaded():
    device, actor, reference, other = small(offload=True), tiny("lm"), tiny("lm"), tiny("lm")
    device.cfg.checkpoint_blocks = False
    actor.add_adapters(2, 4.0, ("q",))
    for model, folder in ((actor, "base"), (reference, "base"), (other, "other")):
        model.config.folder = folder
    device.place(actor, reference.requires_grad_(False), other.requires_grad_(False))
    tokens = torch.ones(1, 4, dtype=torch.long)
    for model in (actor, reference, other):
        model.logprobs(tokens, tokens.bool())
    assert list(device.fetched) == [other]


def test_samples_come_in_the_prompts_order_whatever_is_sampled_at_once():
    model, prompts, seeds = tiny("lm").float(), [[1, 2, 3], [4], [5, 6], [7, 8, 9]], [10, 11, 12, 13]
    whole = small().sample(model, prompts, seeds, 4, temperature=0.8, stop_token=2)
    for at_once in (1, 3):
        found = small(sample_batch=at_once).sample(model, prompts, seeds, 4, temperature=0.8, stop_token=2)
        for name in ("tokens", "mask", "logprobs"):
            assert torch.allclose(found[name], whole[name], atol=1e-5)
    for i, prompt in enumerate(prompts):
        tokens, mask, logprobs = model.generate(torch.tensor([prompt]), torch.tensor([len(prompt)]), 4, 0.8,
                                                stop_token=2, seeds=torch.tensor(seeds[i:i + 1]))
        n = int(whole["lengths"][i])
        assert n == len(prompt) + int(mask.sum()) and whole["tokens"][i, :n].tolist() == tokens[0].tolist()
        assert whole["ended"][i] == (tokens[0, -1] == 2) and not whole["tokens"][i, n:].any()
        torch.testing.assert_close(whole["logprobs"][i, :n], logprobs[0])


def test_answers_are_sampled_at_once_whatever_the_bound_on_tokens(monkeypatch):
    """With 1,000 tokens per pass, five rows at a time, a 135 M model took three times as long per answer."""
    model, read = tiny("lm").float(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda tokens, *args, **kw: read.append(len(tokens))
                        or generate(tokens, *args, **kw))
    small(micro_tokens=16, sample_batch=5).sample(model, [[1, 2]] * 8, range(8), 6)
    assert read == [5, 3]


def test_the_precision_is_that_of_matrix_products():
    dtypes = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        device, model = small(precision=precision), tiny("lm").float()
        device.cfg.checkpoint_blocks = False
        device.place(model)
        tokens = torch.ones(1, 2, dtype=torch.long)
        found = device.map(lambda some: {"x": model.hidden(tokens)[:, 0], "logits": model(tokens)[:, 0]},
                           [0], [2])
        assert found["x"].dtype == dtype and found["logits"].dtype == torch.float32


@pytest.mark.parametrize("shape", [dict(), dict(positions="rotary", n_kv_head=1)],
                         ids=["gpt2", "rotary, grouped"])
def test_sampling_in_bfloat16_keeps_its_cache_in_bfloat16(shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16, **shape))
    device = small(precision="bfloat16")
    device.place(model.requires_grad_(False))
    found = device.sample(model, [[1, 2], [3]], [5, 6], 8, stop_token=7)
    again = device.map(
        lambda rows: {"logprobs": model.logprobs(found["tokens"], found["mask"])}, [0, 1], [10, 10])
    torch.testing.assert_close(found["logprobs"], again["logprobs"].float(), atol=0.05, rtol=0)
    with device.computing():
        _, cache = model.prefill(torch.tensor([[1, 2]]), torch.tensor([2]), 9)
    assert cache[0].dtype == torch.bfloat16 and cache[0].abs().sum() > 0
