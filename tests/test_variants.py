"""The variants against plain loops, known answers and one process, as the stages are."""
import os

import pytest
import test_choices
import test_dpo
import test_known_answers
import test_ppo
import torch
from helpers import plainly
from helpers.start import FLAGS, KINDS, assert_close, in_float64, script
from test_flags import assert_refused, every_flag
from test_run import started

import dpo
import ppo
from data import loading
from data.tokenizer import Tokenizer
from feedback import judge
from model import GPT
from variants import cautious, grpo, online_dpo, ppo_ptx

CASES = [                                       # each flag of the variants is set in one of them
    (grpo, dict(advantage="rloo", group=3)),
    (grpo, dict(micro_batch=5, entropy_coef=0.05)),
    (grpo, dict(group=2, divide_by_std=False, divide_by_length=False)),
    (grpo, dict(advantage="rloo", reward="program.py:words", update_kl=0.002, epochs=3)),
    (ppo_ptx, dict(ptx_coef=0.7, ptx_batch=5, micro_batch=2, sample_batch=5, max_norm=0.1, kl_horizon=40,
               epochs=1)),
    (ppo_ptx, dict(ptx_coef=0.2, update_kl=0.0, kl_target=0.5, kl_horizon=30)),
    (cautious, dict(pessimism="deviation", pessimism_coef=0.7, ood_penalty=2.0, micro_batch=5, heads=3,
                    preferences="rankings.jsonl")),
    (cautious, dict(pessimism="worst", heads=2, preferences="pairs.jsonl", seed=5)),
]
CONSTITUTION = dict(by="out/sft", constitution="rules.txt")
ONLINE = dict(by="out/reward_model", data="rankings.jsonl", batch=9, max_new_tokens=9, epochs=2, nll_coef=0.5)
SHARES = {grpo: ppo.OnPolicy, ppo_ptx: ppo.Config, cautious: ppo.Config, online_dpo: dpo.Config}


# ------------------------------------------------------------------------------------------- plain loops

def doubts(cfg, reward_model):
    preferences = loading.load("preferences", cfg.preferences, max_dropped=1.0)
    return plainly.uncertainty(cfg, reward_model, Tokenizer.load("out/sft"), *preferences)


@pytest.mark.parametrize("stage, settings", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_variant_learns_and_logs_what_a_plain_loop_does(trained, stage, settings, monkeypatch):
    test_ppo.assert_learns_as_plain_loop(trained, stage, settings, monkeypatch,
                                         doubts if stage is cautious else None)


@pytest.mark.parametrize("data", ["rankings.jsonl", "pairs.jsonl"])         # the pairs have soft labels
def test_online_dpo_learns_and_logs_what_a_plain_loop_does(trained, data):
    settings = test_dpo.SHARED | ONLINE | dict(data=data)
    test_dpo.assert_learns_as_plain_loop(trained, online_dpo, settings, GPT.load("out/reward_model"))


@pytest.mark.parametrize("stage", SHARES, ids=lambda stage: stage.__name__)
def test_every_flag_of_a_variant_is_held_against_the_plain_loop_with_all_its_kinds(stage):
    cases = [settings for of, settings in [*CASES, (online_dpo, ONLINE | CONSTITUTION)] if of is stage]
    test_choices.assert_every_flag_is_held(stage, cases, SHARES[stage])


def test_where_all_fresh_answers_tie_the_old_ones_teach_and_a_warning_says_so(trained, monkeypatch, capsys):
    def labeller(*_):
        return lambda prompts, answers, rng: [[1] * len(some) for some in answers]
    monkeypatch.setattr(online_dpo, "labeller", labeller)
    settings = test_dpo.SHARED | dict(data="rankings.jsonl", batch=20, epochs=2)
    _, model, *_ = trained(online_dpo, **settings, max_new_tokens=5)
    assert capsys.readouterr().err.count("all fresh answers tie") == 1
    _, without, *_ = trained(dpo, **settings)
    plainly.assert_same_weights(model, without)


def test_a_chat_model_ranks_the_fresh_answers_by_the_constitution(trained, tmp_path, monkeypatch):
    (tmp_path / "rules.txt").write_text("The shorter answer is better.")
    found = []

    def compare(self, pairs):
        found.append(self.principles)
        return torch.zeros(2, len(pairs))
    monkeypatch.setattr(judge.Judge, "compare", compare)
    settings = test_dpo.SHARED | ONLINE | CONSTITUTION | dict(constitution=str(tmp_path / "rules.txt"))
    trained(online_dpo, **settings)
    assert set(found) == {"The shorter answer is better."}


# ------------------------------------------------------------------------------------------- known answers

@pytest.mark.parametrize("choices", [
    dict(advantage="rloo", group=4), dict(group=8),
    dict(group=4, divide_by_std=False, divide_by_length=False)], ids=str)
def test_without_a_critic_too_the_best_policy_that_the_kl_penalty_allows_is_reached(
        tmp_path, monkeypatch, choices):
    test_known_answers.assert_reaches_the_optimum(grpo, choices, tmp_path, monkeypatch)


def test_rloos_gradient_at_ratio_1_is_the_exact_gradient(tmp_path):
    def advantages_of(rewards, mask, values):
        return grpo.rloo(rewards.sum(1), 4)[:, None] * mask
    test_known_answers.assert_policy_gradient_is_exact(tmp_path, advantages_of, group=4)


# ------------------------------------------------------------------------------------------- flags, processes

@pytest.mark.parametrize("stage, name, value, said", list(every_flag(SHARES)),
                         ids=lambda v: getattr(v, "__name__", None))
def test_every_flag_of_a_variant_out_of_range_is_refused_with_the_range(capsys, stage, name, value, said):
    assert_refused(capsys, stage, name, value, said)


def test_a_coefficient_of_another_kind_of_pessimism_is_refused():
    with pytest.raises(ValueError, match="pessimism_coef does nothing without --pessimism deviation"):
        cautious.Config(pessimism="worst", pessimism_coef=2.0)


@pytest.mark.parametrize("stage, flags", [
    ("variants.grpo", "--steps 3 --batch 16 --max_new_tokens 12 --micro_batch 8 --advantage rloo"),
    ("variants.online_dpo", "--warmup 2 --max_new_tokens 12")])
def test_a_killed_run_without_a_critic_or_with_fresh_labels_resumes_too(chain, stage, flags):
    command = f"--device cpu {flags} --save_seconds 0 --out"
    whole, killed = (chain[0] / f"out/{name}_{stage}_more" for name in ("whole", "killed"))
    assert script(stage, f"{command} {whole}", chain[0]).returncode == 0
    process = started(stage, f"{command} {killed}", chain[0], killed)
    process.kill()
    process.wait()
    done = script(stage, f"{command} {killed}", chain[0])
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [
    "variants/grpo.py --steps 3 --batch 15 --group 3 --max_new_tokens 12 --micro_batch 4",
    "variants/ppo_ptx.py --steps 3 --batch 15 --max_new_tokens 12 --micro_batch 4 --ptx_batch 9",
    "variants/online_dpo.py --batch 20 --max_new_tokens 12 --micro_batch 5 --warmup 2"])
def test_answers_that_are_compared_may_be_spread_over_processes(alone, kind, command):
    """Rows that two do not divide: answers to one prompt are compared as they are alone."""
    stage = os.path.basename(command.split(".py")[0])
    command, out = f"{command} --device cpu", alone / f"out/compared_{stage}"
    if not out.exists():
        in_float64([f"{command} --out {out}"], alone)
    in_float64([f"{command} --parallel {kind} --out {out}_{kind}"], alone, 2)
    assert_close(alone / f"{out}_{kind}", out)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_is_fitted_and_used_alike_by_several_processes(alone, kind):
    command = (f"variants/cautious.py {FLAGS['ppo']} --reward out/alone/reward_model --heads 3 "
               "--pessimism deviation --ood_penalty 2 --out out/cautious")
    if not (alone / "out/cautious").exists():
        in_float64([command], alone)
    in_float64([f"{command}_{kind} --parallel {kind}"], alone, 2)
    assert_close(alone / f"out/cautious_{kind}", alone / "out/cautious")
