"""DPO's losses, and the stage around them."""
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import plainly
from helpers.arrays import near, nll, seeds, tiny

import dpo
from data import loading
from data.answers import warnings
from data.batches import Comparison, encode_comparisons
from data.tokenizer import Tokenizer
from dpo import dpo_loss
from model import GPT
from runtime.run import Run
from variants import online_dpo


def loops(kind, smoothing, beta, pc, pr, rc, rr):
    ratio = (pc - rc) - (pr - rr)
    if kind == "sigmoid":
        return (1 - smoothing) * nll(beta * ratio) + smoothing * nll(-beta * ratio)
    return (ratio - 0.5 / beta) ** 2 if kind == "ipo" else max(0.0, 1 - beta * ratio)


@seeds
@pytest.mark.parametrize("kind,smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0), ("hinge", 0.0)])
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_dpo_loss_and_implicit_rewards_are_those_of_the_papers(seed, kind, smoothing, beta):
    torch.manual_seed(seed)
    inputs = torch.randn(4, 6).double() * 4 - 20
    losses, chosen, rejected = dpo_loss(*inputs, beta, kind, smoothing)
    assert losses.shape == chosen.shape == rejected.shape == (6,)
    for b in range(6):
        pc, pr, rc, rr = inputs[:, b].tolist()
        near(losses[b], loops(kind, smoothing, beta, pc, pr, rc, rr))
        near(chosen[b], beta * (pc - rc))
        near(rejected[b], beta * (pr - rr))


def test_dpo_gradient_is_beta_times_the_probability_of_being_wrong_and_rewards_carry_no_graph():
    torch.manual_seed(0)
    pc, pr, rc, rr = (x.requires_grad_(i < 2) for i, x in enumerate(torch.randn(4, 6).double()))
    losses, chosen, rejected = dpo_loss(pc, pr, rc, rr, 0.3)
    losses.sum().backward()
    wrong = torch.sigmoid(-0.3 * ((pc - rc) - (pr - rr))).detach()        # Rafailov et al. 2023, section 4
    near(pc.grad, -0.3 * wrong)
    near(pr.grad, 0.3 * wrong)
    assert not chosen.requires_grad and not rejected.requires_grad


def test_dpo_loss_knows_nothing_where_policy_and_reference_agree():
    p = torch.randn(2, 3).double()
    near(dpo_loss(*p, *p, 0.1)[0], [math.log(2)] * 3)
    near(dpo_loss(*p, *p, 0.1, "ipo")[0], [25.0] * 3)
    near(dpo_loss(*p, *p, 0.1, "hinge")[0], [1.0] * 3)


def test_dpo_loss_sends_no_gradient_to_the_reference():
    leaves = [x.requires_grad_() for x in torch.randn(4, 3).double()]
    dpo_loss(*leaves, 0.1)[0].sum().backward()
    assert leaves[2].grad is None and leaves[3].grad is None


@pytest.mark.parametrize("length_normalize", [False, True])
def test_dpo_also_imitates_the_best_answer_of_each_prompt(length_normalize):
    sequences = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]
    comparison = Comparison(sequences, start=2, ranks=[2, 3, 1], margin=0.0, ref_logprobs=[-3.0, -2.0, -5.0])
    model, losses = tiny("lm"), {}
    for coef in (0.0, 2.0):
        cfg = dpo.Config(nll_coef=coef, beta=0.5, length_normalize=length_normalize)
        losses[coef], _ = dpo.pair_loss(model, SimpleNamespace(cfg=cfg, device="cpu"), [comparison])
    logp = model(torch.tensor([sequences[2]]))[0].log_softmax(-1)
    nll = -sum(logp[t - 1, sequences[2][t]] for t in (2, 3, 4)).item() / 3
    near(losses[2.0] - losses[0.0], 2 * nll * 2 / 3)            # two of the three pairs have the best answer


SHARED = dict(records=0, batch=17, warmup=2, looks=0)
CASES = [                                       # each flag of the stage is set in one of them, or in SHARED
    dict(),
    dict(label_smoothing=0.2, beta=0.3, nll_coef=0.0, epochs=2, decay="cosine", lr=1e-2, max_norm=0.2,
         records=20),
    dict(length_normalize=True, beta=2.0, decay="constant", warmup=0, max_norm=0.0, micro_batch=9,
         micro_tokens=200),
    *({"loss": kind, "beta": 0.4, "nll_coef": 0.3, "seed": 3} for kind in dpo.LOSSES),
    *({"loss": kind, "beta": 0.4, "records": 20} for kind in dpo.LOSSES),
    dict(data="rankings.jsonl", batch=7, micro_batch=5, length_normalize=True),
    dict(data="pairs.jsonl", batch=9, micro_batch=4, label_smoothing=0.1),               # soft labels
    dict(looks=3, max_new_tokens=7, micro_batch=6),
    dict(by="out/reward_model", max_new_tokens=9, epochs=2, nll_coef=0.5, records=40, looks=2),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_stage_learns_logs_and_reports_what_a_plain_loop_does(trained, settings):
    stage = online_dpo if "by" in settings else dpo
    cfg, model, lines, about = trained(stage, **SHARED | settings)
    cfg.online = stage is online_dpo
    plain, reference, tokenizer = GPT.load("out/sft"), GPT.load("out/sft"), Tokenizer.load("out/sft")
    preferences, held_out = loading.load("preferences", cfg.data, max_dropped=1.0)
    held_out = plainly.comparisons_that_fit(plain, tokenizer, held_out)
    scorer = GPT.load("out/reward_model")
    expected = plainly.dpo(cfg, plain, reference, tokenizer, preferences, held_out, scorer)
    for line in (lines[0], expected[0]):
        del line["accuracy"]                                # the policy is the reference: rounding decides
    plainly.assert_same_lines(lines, expected)
    plainly.assert_same_weights(model, plain)
    found = plainly.dpo_numbers(cfg, plain, reference, tokenizer, held_out)
    assert about["held_out"] == pytest.approx(found | {"loss": found["loss"].item()}, abs=1e-6)


def test_a_policy_that_falls_apart_is_warned_about_with_the_flag_to_change():
    fine = {"entropy": 0.5, "kl": 2.0, "length": 12.0, "ended": 1.0}
    assert warnings(fine) == []
    signs = (({"entropy": 0.001}, "--lr"), ({"kl": 12.0}, "--beta"), ({"ended": 0.88}, "do not end"))
    for change, flag in signs:
        [said] = warnings(fine | change)
        assert flag in said


def test_where_all_fresh_answers_tie_the_old_ones_teach(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/sft")
    preferences, _ = loading.load("preferences", loading.WORLD, max_dropped=1.0)
    old = encode_comparisons(tokenizer, preferences[:3], 56, "preferences")
    run = Run(online_dpo.Config(device="cpu", max_new_tokens=5), 1)
    assert old is online_dpo.fresh(
        run, model, tokenizer, lambda prompts, answers, rng: [[1] * len(a) for a in answers], old)


def test_only_the_sigmoid_comes_with_imitation_unless_it_is_asked_for():
    assert dpo.Config().nll_coef == 2 and dpo.Config(nll_coef=0.0).nll_coef == 0
    assert dpo.Config().beta == 0.5 and dpo.Config(nll_coef=0.0).beta == 1 and dpo.Config(beta=2.0).beta == 2
    for kind in dpo.LOSSES:
        if kind != "sigmoid":
            assert dpo.Config(loss=kind).nll_coef == 0 and dpo.Config(loss=kind, nll_coef=1.5).nll_coef == 1.5
