"""The GPT: log-probabilities, sampling, attention, errors and files, in float64 on random tiny networks."""
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.start import ROOT

from model import GPT, Attention, GPTConfig, Positions, rotate, rotation, sample, uniform

V, STOP = 11, 2
SHAPES = {
    "gpt2": dict(n_head=2),
    "llama": dict(n_head=4, n_kv_head=2, positions="rotary", norm="rmsnorm", mlp="swiglu",
                  bias=False, tied=False),
}


def make(shape, seed=3, head="lm"):
    """A random network in float64 whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=V, block_size=24, n_layer=2, n_embd=16, **SHAPES[shape])
    model = GPT(config, head=head).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name and name.endswith("weight")))
    return model


@pytest.fixture(params=SHAPES)
def model(request):
    return make(request.param)


ALONE = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=7, block_size=16, n_layer=1, n_head=2, n_embd=16))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
tokens = torch.arange(12).remainder(6).expand(4, 12)
for step in range(30):
    loss = -model.logprobs(tokens, torch.ones_like(tokens).bool())[:, 1:].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
answer, _, _ = model.generate(tokens[:1, :2], torch.tensor([2]), 8, temperature=0)
print(loss.item() < 0.1, answer.tolist(), [name for name in sys.modules if name.split(".")[0] in FOREIGN])
"""


def test_the_file_alone_in_an_empty_folder_trains_and_samples(tmp_path):
    """With torch alone, and nothing else of this project."""
    shutil.copy(os.path.join(ROOT, "model.py"), tmp_path)
    ours = {path.stem for path in Path(ROOT).iterdir() if path.is_dir() or path.suffix == ".py"} - {"model"}
    script = ALONE.replace("FOREIGN", repr(ours))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert done.stdout == "True [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]] []\n", done.stdout + done.stderr
    imported = {line.split()[1].split(".")[0] for line in (tmp_path / "model.py").read_text().splitlines()
                if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_config_line_of_a_llama_builds_llama_2_7b():
    line = re.search(r"GPTConfig\(vocab_size=32000.*?\)", sys.modules["model"].__doc__, re.DOTALL)[0]
    with torch.device("meta"):
        model = GPT(eval(line))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert model(torch.zeros(1, 9, dtype=torch.long, device="meta")).shape == (1, 9, 32000)


@pytest.mark.parametrize("mlp, approximate", [("gelu_tanh", "tanh"), ("gelu", "none")])
def test_each_gelu_is_the_one_it_is_called(mlp, approximate):
    block = GPT(GPTConfig(vocab_size=V, block_size=4, n_layer=1, n_head=1, n_embd=8, mlp=mlp)).blocks[0].mlp
    x = 3 * torch.randn(5, 8)
    torch.testing.assert_close(block(x), block.down(torch.nn.GELU(approximate)(block.up(x))))


PROMPTS = torch.tensor([[1, 2, 0, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0],
                        [10, 9, 8, 0, 0], [2, 2, 2, 2, 0], [5, 1, 0, 0, 0]])
LENGTHS = torch.tensor([2, 5, 1, 3, 4, 2])
SEEDS = torch.arange(6) + 100


# ------------------------------------------------------------------------------------------ logprobs

@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_are_those_of_softmax_of_logits_over_temperature(model, temperature):
    torch.manual_seed(1)
    tokens, mask = torch.randint(V, (4, 9)), torch.rand(4, 9) < 0.5
    found, entropy = model.logprobs(tokens, mask, temperature, entropy=True)
    logits = model(tokens).tolist()
    for b in range(4):
        for t in range(9):
            want = want_entropy = 0.0
            if mask[b, t] and t > 0:
                weights = [math.exp(x / temperature) for x in logits[b][t - 1]]
                want = math.log(weights[tokens[b, t]] / sum(weights))
                want_entropy = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
            assert found[b, t].item() == pytest.approx(want, abs=1e-10)
            assert entropy[b, t].item() == pytest.approx(want_entropy, abs=1e-10)
    assert torch.equal(found, model.logprobs(tokens, mask, temperature))


def test_only_who_asks_for_it_pays_for_the_entropys_gradient(model):
    tokens, mask = torch.randint(V, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    logprobs, entropy = model.logprobs(tokens, mask, entropy=True)
    assert logprobs.requires_grad and not entropy.requires_grad
    _, again = model.logprobs(tokens, mask, entropy=True, entropy_grad=True)
    assert torch.equal(entropy, again)
    p = model(tokens)[:, :-1].softmax(-1)
    found, want = (torch.autograd.grad(x.sum(), list(model.parameters())) for x in (again, -(p * p.log())))
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_logprobs_outside_the_mask_and_of_the_first_column_are_exactly_zero(model):
    tokens = torch.randint(V, (3, 6))
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 1]]).bool()
    before = mask.clone()
    out = model.logprobs(tokens, mask)
    acts = mask & (torch.arange(6) > 0)
    assert (out[~acts] == 0).all() and (out[acts] < 0).all()
    assert torch.equal(mask, before)                            # the caller's mask is left as it was


def test_gradient_of_logprobs_is_that_of_log_softmax(model):
    tokens, mask = torch.randint(V, (3, 7)), torch.rand(3, 7) < 0.6
    mask[:, 0] = False
    model.logprobs(tokens, mask).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logp = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    logp[mask[:, 1:]].sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-9, atol=1e-10, msg=n)


# ------------------------------------------------------------------------------------------ generate

@pytest.mark.parametrize("how", [
    dict(), dict(stop_token=STOP), dict(temperature=0.6, stop_token=STOP), dict(top_k=3),
    dict(top_p=0.6, stop_token=STOP), dict(temperature=1.7, top_k=5, top_p=0.8, stop_token=STOP)])
def test_cached_logprobs_of_generate_equal_those_without_a_cache_before_filtering(model, how):
    tokens, mask, logprobs = model.generate(PROMPTS, LENGTHS, 12, seeds=SEEDS, **how)
    if "stop_token" in how and "top_p" not in how:
        assert len(set(mask.sum(1).tolist())) > 1       # rows finish at different times, or nothing is tested
    want = model.logprobs(tokens, mask, how.get("temperature", 1.0))
    torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-10)
    assert (logprobs[~mask] == 0).all()


def test_rows_that_finish_and_leave_the_batch_do_not_disturb_the_others(model):
    torch.manual_seed(2)
    prompts, lengths = torch.randint(V, (40, 4)), torch.randint(1, 5, (40,))
    tokens, mask, logprobs = model.generate(prompts, lengths, 18, stop_token=STOP, seeds=torch.arange(40))
    assert len(set(mask.sum(1).tolist())) > 4
    torch.testing.assert_close(logprobs, model.logprobs(tokens, mask), rtol=0, atol=1e-10)
    # the same noise, no stop
    free, free_mask, _ = model.generate(prompts, lengths, 18, seeds=torch.arange(40))
    for b in range(40):
        answer, whole = tokens[b][mask[b]].tolist(), free[b][free_mask[b]].tolist()
        cut = whole.index(STOP) + 1 if STOP in whole else len(whole)
        assert answer == whole[:cut]


def test_how_often_sampling_checks_for_ended_rows_changes_no_answer(model, monkeypatch):
    how = dict(stop_token=STOP, seeds=torch.arange(40))
    prompts, lengths = torch.randint(V, (40, 4)), torch.randint(1, 5, (40,))
    checks = []
    expected = model.generate(prompts, lengths, 18, rows_left=lambda n: checks.append(n) or n, **how)
    assert len(checks) == expected[1].sum(1).max()              # on a CPU after every token
    checks.clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)          # as on a GPU
    reaches, decode = [], model.decode_one_token
    monkeypatch.setattr(model, "decode_one_token", lambda *args: reaches.append(args[-1]) or decode(*args))
    found = model.generate(prompts, lengths, 18, rows_left=lambda n: checks.append(n) or n, **how)
    assert len(checks) == 2 and set(reaches) == {int(lengths.max()) + 18}       # fewer than 64: all at once
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_sampling_goes_on_while_any_process_waits(model):
    """Under fsdp all processes go through the network together, until the last row of all has ended."""
    torch.manual_seed(2)
    prompts, lengths, seeds = torch.randint(V, (40, 4)), torch.randint(1, 5, (40,)), torch.arange(40)
    ended = model.generate(prompts, lengths, 18, stop_token=STOP, seeds=seeds)[1].sum(1) < 12
    some, steps = (prompts[ended], lengths[ended], 18), []
    how = dict(stop_token=STOP, seeds=seeds[ended])
    expected = model.generate(*some, **how)
    model.norm.register_forward_hook(lambda *_: steps.append(1))
    for found, want in zip(model.generate(*some, rows_left=lambda n: 1, **how), expected, strict=True):
        assert torch.equal(found, want)
    assert len(steps) == 18


def test_on_a_gpu_logits_of_bfloat16_states_are_not_rounded(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 8, 1, 2, 16)).bfloat16()
    x, W = torch.randn(5, 16).bfloat16(), model.token_embedding.weight
    rounded = model.unembed(x, model.unembedding())
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    logits = model.unembed(x, model.unembedding())
    assert logits.dtype == torch.float32 and torch.equal(logits, x.float() @ W.float().T)
    assert not torch.equal(rounded, logits)


def test_on_a_gpu_the_gradient_of_the_head_is_rounded_once(monkeypatch):
    """And not once for each part of the logits: here are 4 parts of 64 positions."""
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(2 ** 18, 257, 1, 1, 4, tied=False)), torch.randn(1, 257, 4)
    tokens, mask = torch.randint(9, (1, 257)), torch.ones(1, 257, dtype=torch.bool)
    monkeypatch.setattr(model, "hidden", lambda tokens: x.to(model.head.weight.dtype))

    def gradient():
        model.zero_grad()
        model.logprobs(tokens, mask).sum().backward()
        return model.head.weight.grad.double()
    exact = gradient()
    model.bfloat16()
    often = gradient()
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    error, other = ((g - exact).norm() / exact.norm() for g in (gradient(), often))
    assert error < 0.003 < other


def test_greedy_equals_argmax_step_by_step_without_a_cache(model):
    tokens, mask, logprobs = model.generate(PROMPTS, LENGTHS, 8, temperature=0)
    for b in range(len(PROMPTS)):
        row = PROMPTS[b, :LENGTHS[b]].tolist()
        for _ in range(8):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        assert tokens[b, :len(row)].tolist() == row
    torch.testing.assert_close(logprobs, model.logprobs(tokens, mask), rtol=0, atol=1e-10)  # at temperature 1


def test_a_row_with_a_seed_does_not_depend_on_neighbours_order_or_batch_size(model):
    tokens, mask, logprobs = model.generate(PROMPTS, LENGTHS, 10, stop_token=STOP, seeds=SEEDS)
    answers = [t[m].tolist() for t, m in zip(tokens, mask)]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled, m, _ = model.generate(PROMPTS[order], LENGTHS[order], 10, stop_token=STOP, seeds=SEEDS[order])
    assert [t[k].tolist() for t, k in zip(shuffled, m)] == [answers[i] for i in order]
    for b in range(len(PROMPTS)):
        row = slice(b, b + 1)
        alone, m, found = model.generate(PROMPTS[row], LENGTHS[row], 10, stop_token=STOP, seeds=SEEDS[row])
        assert alone[0][m[0]].tolist() == answers[b]
        torch.testing.assert_close(found[0][m[0]], logprobs[b][mask[b]], rtol=0, atol=1e-10)


def test_what_stands_right_of_a_prompt_does_not_reach_its_answer(model):
    dirty = torch.where(torch.arange(5) < LENGTHS[:, None], PROMPTS, 7)
    clean, _, _ = model.generate(PROMPTS, LENGTHS, 2, seeds=SEEDS)
    found, _, _ = model.generate(dirty, LENGTHS, 2, seeds=SEEDS)
    assert torch.equal(clean, found)


def test_seeds_decide_the_answer_and_none_follows_torchs_generator(model):
    same = torch.ones(64, 1, dtype=torch.long), torch.ones(64, dtype=torch.long)
    tokens, _, _ = model.generate(*same, 6, seeds=torch.full((64,), 5))
    assert (tokens == tokens[0]).all()
    tokens, _, _ = model.generate(*same, 6, seeds=torch.arange(64))
    assert len(tokens.unique(dim=0)) > 5
    torch.manual_seed(0)
    a, b = model.generate(*same, 6)[0], model.generate(*same, 6)[0]
    torch.manual_seed(0)
    assert torch.equal(a, model.generate(*same, 6)[0]) and not torch.equal(a, b)


def test_a_finished_row_ends_with_the_stop_token_exactly_once(model):
    torch.manual_seed(3)
    prompts, lengths = torch.full((60, 3), STOP), torch.randint(1, 4, (60,))    # stop tokens in the prompt
    tokens, mask, _ = model.generate(prompts, lengths, 12, stop_token=STOP, seeds=torch.arange(60))
    finished = 0
    for t, m in zip(tokens, mask):
        answer = t[m].tolist()
        assert STOP not in answer[:-1]
        assert answer[-1] == STOP or len(answer) == 12
        finished += answer[-1] == STOP
    assert 5 < finished < 60                                    # both kinds are there


def test_generate_is_laid_out_as_prompt_then_answer_then_zeros(model):
    before = PROMPTS.clone()
    tokens, mask, logprobs = model.generate(PROMPTS, LENGTHS, 10, stop_token=STOP, seeds=SEEDS)
    assert torch.equal(PROMPTS, before)
    assert tokens.shape == mask.shape == logprobs.shape
    assert tokens.dtype == torch.long and mask.dtype == torch.bool
    assert mask.any(0)[-1]                                      # no column that no row needs
    for b, n in enumerate(LENGTHS.tolist()):
        size = int(mask[b].sum())
        assert 1 <= size <= 10
        assert mask[b].tolist() == [False] * n + [True] * size + [False] * (mask.shape[1] - n - size)
        assert tokens[b, :n].tolist() == PROMPTS[b, :n].tolist() and (tokens[b, n + size:] == 0).all()


def test_generate_fills_the_block_to_its_last_position(model):
    tokens, mask, logprobs = model.generate(PROMPTS, LENGTHS, 24 - 5, seeds=SEEDS)
    assert tokens.shape[1] == 24 and (mask.sum(1) == 19).all()
    torch.testing.assert_close(logprobs, model.logprobs(tokens, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_match_softmax(model, temperature):
    n = 20000
    prompts = torch.tensor([[4, 5]]).expand(n, 2)
    tokens, _, _ = model.generate(prompts, torch.full((n,), 2), 1, temperature, seeds=torch.arange(n))
    p = (model(prompts[:1])[0, -1] / temperature).softmax(-1)
    found = torch.bincount(tokens[:, 2], minlength=V) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()         # five standard deviations


def test_second_token_is_independent_of_the_first_ones_noise(model):
    n = 20000
    prompts, lengths = torch.full((n, 1), 4), torch.ones(n, dtype=torch.long)
    tokens, _, _ = model.generate(prompts, lengths, 2, seeds=torch.arange(n))
    first = tokens[:, 1].mode().values
    second = tokens[tokens[:, 1] == first, 2]
    p = model(torch.tensor([[4, first]]))[0, -1].softmax(-1)
    found = torch.bincount(second, minlength=V) / len(second)
    assert ((found - p).abs() < 5 * (p * (1 - p) / len(second)).sqrt() + 1 / len(second)).all()


@pytest.mark.parametrize("top_k,top_p", [
    (1, 1.0), (3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (50, 1.0), (0, 1e-9)])
def test_top_k_and_top_p_sample_every_token_of_their_set_and_no_other(top_k, top_p):
    torch.manual_seed(4)
    logits = torch.randn(V).double() * 1.5
    p = sorted(((x, i) for i, x in enumerate(logits.softmax(-1).tolist())), reverse=True)
    kept = p[:top_k] if top_k else p
    total, allowed, before = sum(x for x, _ in kept), {}, 0.0
    for x, i in kept:
        if before < top_p:
            allowed[i] = x
        before += x / total
    n = 20000
    found = sample(logits.softmax(-1).expand(n, V), top_k, top_p, uniform(torch.arange(n), 0))
    assert set(found.tolist()) == set(allowed)
    for i, x in allowed.items():                        # renormalised over the set, five standard deviations
        q = x / sum(allowed.values())
        tolerance = 5 * math.sqrt(q * (1 - q) / n) + 1e-9
        assert (found == i).double().mean().item() == pytest.approx(q, abs=tolerance)


def test_the_ends_of_the_uniform_never_pick_a_token_of_probability_zero():
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[-torch.inf, 0.3, -torch.inf, 1.0, -torch.inf]], dtype=dtype)
        ends = torch.tensor([2.0 ** -54, 0.5, 1 - 2.0 ** -53], dtype=torch.float64)
        assert sample(logits.softmax(-1).expand(3, 5), 0, 1.0, ends).tolist() == [1, 3, 3]


def test_uniform_is_uniform_inside_zero_and_one_and_differs_by_step_and_seed():
    n = 100000
    for u in (uniform(torch.arange(n), 0), uniform(torch.arange(n) * 1000 + 10 ** 12, 7),
              torch.cat([uniform(torch.tensor([42, -1]), step) for step in range(n // 20)])):
        assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1
        assert len(u.unique()) == len(u)
        counts = torch.histc(u, 20, 0, 1) / len(u)
        assert ((counts - 0.05).abs() < 5 * math.sqrt(0.05 * 0.95 / len(u))).all()
        assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 / math.sqrt(len(u))
    first, second = uniform(torch.arange(n), 0), uniform(torch.arange(n), 1)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(n)
    assert (first != second).all()


# ------------------------------------------------------------------------------------------ the network

@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_token_or_padding_leaves_earlier_outputs_unchanged(shape, head):
    model = make(shape, head=head)
    tokens = torch.randint(V, (3, 10))
    out = model(tokens)
    assert out.shape == ((3, 10, V) if head == "lm" else (3, 10))
    for t in (1, 4, 9):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        torch.testing.assert_close(model(changed)[:, :t], out[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(model(changed)[:, t:], out[:, t:])
        torch.testing.assert_close(model(tokens[:, :t]), out[:, :t], rtol=0, atol=1e-12)


def test_score_is_the_scalar_at_the_last_token_whatever_the_padding():
    model, lengths = make("gpt2", head="scalar"), torch.tensor([1, 4, 9, 6, 2])
    tokens = torch.randint(V, (5, 9))
    found = model.score(tokens, lengths)
    assert found.shape == (5,)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b], model(tokens[b:b + 1, :n])[0, -1], rtol=0, atol=1e-12)

@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_grouped_query_attention_equals_a_slow_one_head_at_a_time(kv, positions):
    torch.manual_seed(5)
    C, H, D, T = 16, 4, 4, 6
    config = GPTConfig(vocab_size=V, n_embd=C, n_head=H, n_kv_head=kv, positions=positions)
    attention = Attention(config).double()
    x = torch.randn(2, T, C).double()
    turns = rotation(config, torch.arange(T), x.dtype) if positions == "rotary" else None
    found = attention(x, Positions(torch.arange(T), turns))
    for b in range(2):
        heads = []
        for h in range(H):
            g = h // (H // kv)                                  # neighbouring heads share a key and a value
            q, k, v = (x[b] @ part.weight[i * D:i * D + D].T + part.bias[i * D:i * D + D]
                       for part, i in ((attention.q, h), (attention.k, g), (attention.v, g)))
            if positions == "rotary":
                q, k = q.clone(), k.clone()
                for y in (q, k):
                    for t in range(T):
                        for i in range(D // 2):
                            angle = t * 10000 ** (-2 * i / D)
                            a, c = y[t, i].clone(), y[t, i + D // 2].clone()
                            y[t, i] = a * math.cos(angle) - c * math.sin(angle)
                            y[t, i + D // 2] = a * math.sin(angle) + c * math.cos(angle)
            out = torch.zeros(T, D).double()
            for t in range(T):
                weights = torch.stack([torch.exp(q[t] @ k[s] / math.sqrt(D)) for s in range(t + 1)])
                out[t] = sum(weights[s] / weights.sum() * v[s] for s in range(t + 1))
            heads.append(out)
        want = torch.cat(heads, dim=1) @ attention.out.weight.T + attention.out.bias
        torch.testing.assert_close(found[b], want, rtol=0, atol=1e-12)


def turned(x, position):
    """x (1, 1, 1, 8) at a position."""
    config = GPTConfig(n_embd=8, n_head=1, positions="rotary")
    return rotate(x, *rotation(config, torch.tensor([position]), x.dtype))


def test_rotary_scores_depend_only_on_relative_distance():
    torch.manual_seed(6)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def score(p, r):
        return (turned(q, p) * turned(k, r)).sum().item()
    for p, r in ((3, 1), (10, 4), (2, 7)):
        assert score(p, r) == pytest.approx(score(p + 500, r + 500), abs=1e-9)
        assert score(p, r) != pytest.approx(score(p + 1, r), abs=1e-3)
    assert torch.equal(turned(q, 0), q)
    torch.testing.assert_close(turned(q, 77).norm(), q.norm())


def test_rotary_angles_of_late_positions_survive_bfloat16():
    x = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    assert not torch.equal(turned(x, 1000), turned(x, 1001))


def test_logits_exist_for_some_positions_at_a_time():
    """Their log-probabilities, entropies and gradients are those of all at once."""
    torch.manual_seed(7)
    model = GPT(GPTConfig(vocab_size=2 ** 18, block_size=32, n_layer=1, n_head=2, n_embd=8)).double()
    tokens = torch.randint(2 ** 18, (3, 32))                                # 64 positions at a time
    mask, weights = torch.rand(3, 32) > 0.2, torch.randn(2, 3, 31).double()
    mask[:, 0], kept = False, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = model.logprobs(tokens, mask, 0.7, entropy=True, entropy_grad=True)
    assert max(kept) <= model.token_embedding.weight.numel()
    logp = (model(tokens)[:, :-1] / 0.7).log_softmax(-1)
    chosen = logp.gather(-1, tokens[:, 1:, None])[:, :, 0] * mask[:, 1:]
    expected = chosen, -(logp.exp() * logp).sum(-1) * mask[:, 1:]
    found = [x[:, 1:] for x in found]
    grads = []
    for logp, entropies in (found, expected):
        loss = (weights[0] * logp + weights[1] * entropies).sum()
        grads += torch.autograd.grad(loss, model.blocks[0].mlp.up.weight)
    torch.testing.assert_close(found, list(expected))
    torch.testing.assert_close(*grads)


def test_a_network_in_bfloat16_scores_in_the_precision_of_its_head():
    torch.manual_seed(7)
    config = GPTConfig(vocab_size=32, block_size=16, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config, head="scalar").bfloat16()
    model.head.float()
    scores = model(torch.randint(32, (4, 16)))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_norms_and_mlps_are_those_of_their_papers():
    torch.manual_seed(7)
    x = torch.randn(3, 16).double()
    centred, variance = x - x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    llama, gpt2 = make("llama"), make("gpt2")
    for layer, want in (
            (llama.norm, x / ((x ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * llama.norm.weight),
            (gpt2.norm, centred / (variance + 1e-5).sqrt() * gpt2.norm.weight + gpt2.norm.bias)):
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)
    mlp = llama.blocks[0].mlp
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down.weight.T)
    mlp = gpt2.blocks[0].mlp
    h = x @ mlp.up.weight.T + mlp.up.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    torch.testing.assert_close(mlp(x), h @ mlp.down.weight.T + mlp.down.bias)


def test_tied_and_untied_and_bias_decide_which_parameters_exist():
    gpt2, llama = set(make("gpt2").state_dict()), set(make("llama").state_dict())
    assert "head.weight" not in gpt2 and "head.weight" in llama
    assert "position_embedding.weight" in gpt2 and "position_embedding.weight" not in llama
    assert any(n.endswith(".bias") for n in gpt2) and not any(n.endswith(".bias") for n in llama)


# ------------------------------------------------------------------------------------------ errors

def test_a_sequence_longer_than_the_block_is_refused(model):
    model(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(ValueError, match="25 tokens.*block_size 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size 24"):
        model.generate(PROMPTS, LENGTHS, 20)


@pytest.mark.parametrize("bad", [0, -1, 6])
def test_lengths_that_no_prompt_can_have_are_refused(model, bad):
    lengths = LENGTHS.clone()
    lengths[2] = bad
    with pytest.raises(ValueError, match="lengths must lie between 1 and 5"):
        model.generate(PROMPTS, lengths, 2)


@pytest.mark.parametrize("field,value", [
    ("vocab_size", 0), ("block_size", -1), ("n_layer", 1.5), ("n_layer", "2"), ("n_head", 0), ("n_embd", 0),
    ("n_kv_head", -2), ("mlp_hidden", -4), ("positions", "alibi"), ("norm", "batchnorm"), ("mlp", "relu"),
    ("bias", "no"), ("tied", None), ("n_head", 5), ("n_kv_head", 3), ("n_kv_head", 8), ("n_embd", 18),
    pytest.param("n_embd", None),
    pytest.param("norm_eps", "small"),
    pytest.param("rope_theta", 0.0)])
def test_a_bad_config_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{**dict(vocab_size=V, block_size=8, n_layer=1, n_head=4, n_embd=16), field: value})


def test_rotary_positions_with_odd_heads_and_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="even number of channels"):
        GPTConfig(n_head=4, n_embd=12, positions="rotary")
    with pytest.raises(ValueError, match="head"):
        GPT(GPTConfig(V, 8, 1, 1, 4), head="value")


def test_top_p_zero_is_greedy_or_refused(model):
    try:
        tokens, _, _ = model.generate(PROMPTS, LENGTHS, 1, top_p=0.0, seeds=SEEDS)
    except ValueError:
        return
    assert torch.equal(tokens, model.generate(PROMPTS, LENGTHS, 1, temperature=0)[0])


def test_llama_3s_scaling_keeps_fast_waves_slows_slow_ones_and_mixes_those_between():
    """Against a loop over the three cases, as the paper's own code tells them apart."""
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    config = GPTConfig(n_embd=64, n_head=2, positions="rotary", rope_theta=500.0, rope_scaling=scaling)
    cos, sin = rotation(config, torch.tensor([1]), torch.float64)
    found, cases = torch.atan2(sin, cos)[0].tolist(), set()         # radians at position 1
    for i, f in enumerate(found):
        plain = 500.0 ** (-2 * i / 32)
        length = 2 * math.pi / plain
        if length < 64 / 4:
            want, case = plain, "fast"
        elif length > 64 / 1:
            want, case = plain / 8, "slow"
        else:
            smooth = (64 / length - 1) / (4 - 1)
            want, case = (1 - smooth) * plain / 8 + smooth * plain, "between"
        cases.add(case)
        assert f == pytest.approx(want, rel=1e-12)
    assert cases == {"fast", "slow", "between"}


def test_queries_and_keys_are_normed_per_head_where_the_config_says_so():
    torch.manual_seed(9)
    config = GPTConfig(vocab_size=V, n_embd=12, n_head=2, head_dim=4, qk_norm=True, norm="rmsnorm",
                       bias=False, qkv_bias=True)
    attention, x = Attention(config).double(), torch.randn(1, 5, 12).double()
    torch.nn.init.normal_(attention.q_norm.weight)
    found = attention(x, Positions(torch.arange(5)))
    assert attention.q.weight.shape == (8, 12) and attention.out.bias is None
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = (x[0] @ y.weight[part].T + y.bias[part] for y in (attention.q, attention.k, attention.v))
        q = q / (q.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * attention.q_norm.weight
        k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        scores = (q @ k.T / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(found[0], torch.cat(heads, -1) @ attention.out.weight.T, rtol=0, atol=1e-12)
