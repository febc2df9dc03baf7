"""DPO's losses, and the stage around them."""
import math

import pytest
import torch
from helpers import plainly
from helpers.arrays import near, nll, seeds, tiny

import dpo
from data import loading
from data.batches import Comparison
from data.tokenizer import Tokenizer
from dpo import dpo_loss
from model import GPT
from runtime.compute import Compute


def loops(kind, smoothing, beta, pc, pr, rc, rr):
    ratio, total = (pc - rc) - (pr - rr), 0.0
    for weight, h in ((1 - smoothing, ratio), (smoothing, -ratio)):
        cost = {"sigmoid": nll(beta * h), "ipo": (h - 0.5 / beta) ** 2, "hinge": max(0.0, 1 - beta * h)}
        total += weight * cost[kind]
    return total


@seeds
@pytest.mark.parametrize("kind", plainly.DPO_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
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
        cfg = dpo.Config(nll_coef=coef, beta=0.5, length_normalize=length_normalize, device="cpu")
        losses[coef], _ = dpo.pair_loss(model, Compute(cfg), [comparison])
    logp = model(torch.tensor([sequences[2]]))[0].log_softmax(-1)
    nll = -sum(logp[t - 1, sequences[2][t]] for t in (2, 3, 4)).item() / 3
    near(losses[2.0] - losses[0.0], 2 * nll * 2 / 3)            # two of the three pairs have the best answer


def test_smoothing_may_differ_from_pair_to_pair():
    inputs = torch.randn(4, 3).double()
    found = dpo_loss(*inputs, 0.3, "ipo", torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64))[0]
    for b, smoothing in enumerate((0.0, 0.2, 0.5)):
        near(found[b], loops("ipo", smoothing, 0.3, *inputs[:, b].tolist()))


def test_an_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="loss must be sigmoid, ipo or hinge, not 'exo'"):
        dpo_loss(*torch.randn(4, 3), 0.3, "exo")


SHARED = dict(batch=17, warmup=2)
CASES = [                                       # each flag of the stage is set in one of them, or in SHARED
    dict(),
    dict(label_smoothing=0.2, beta=0.3, nll_coef=0.0, epochs=2, decay="cosine", lr=1e-2, max_norm=0.2),
    dict(length_normalize=True, beta=2.0, decay="constant", warmup=0, max_norm=0.0, micro_batch=9,
         micro_tokens=200),
    *({"loss": kind, "beta": 0.4, "nll_coef": 0.3, "seed": 3, "label_smoothing": 0.1}
      for kind in plainly.DPO_LOSSES),
    dict(data="rankings.jsonl", batch=7, micro_batch=5, length_normalize=True),
    dict(data="pairs.jsonl", batch=9, micro_batch=4, label_smoothing=0.1),               # soft labels
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_stage_learns_logs_and_reports_what_a_plain_loop_does(trained, settings):
    assert_learns_as_plain_loop(trained, dpo, SHARED | settings)


def assert_learns_as_plain_loop(trained, stage, settings, scorer=None):
    cfg, model, lines, about = trained(stage, **settings)
    plain, reference, tokenizer = GPT.load("out/sft"), GPT.load("out/sft"), Tokenizer.load("out/sft")
    preferences, held_out = loading.load("preferences", cfg.data, max_dropped=1.0)
    held_out = plainly.comparisons_that_fit(plain, tokenizer, held_out)
    expected = plainly.dpo(cfg, plain, reference, tokenizer, preferences, scorer)
    for line in (lines[0], expected[0]):
        del line["accuracy"]                                # the policy is the reference: rounding decides
    plainly.assert_same_lines(lines, expected)
    plainly.assert_same_weights(model, plain)
    found = plainly.dpo_numbers(cfg, plain, reference, tokenizer, held_out)
    assert about["held_out"] == pytest.approx(found | {"loss": found["loss"].item()}, abs=1e-6)
