"""Whoever adds a flag or a kind of loss to a stage is told here, by its name,
which formula the tests miss."""
import dataclasses

import pytest
import test_dpo
import test_known_answers
import test_ppo
import test_reward_model
import test_sft
from helpers import plainly

import dpo
import ppo
import reward_model
import sft
from runtime.flags import Training

CASES = {stage: [test.SHARED, *test.CASES] for stage, test in (
    (sft, test_sft), (reward_model, test_reward_model), (dpo, test_dpo), (ppo, test_ppo))}
# Flags that name files or the shape of a new network: the chain and the readers' tests have them.
FILES = {"data", "held_out", "init", "reward", "ptx_data", "preferences", "tokenizer",
         "n_layer", "n_head", "n_embd", "block_size"}
KINDS = {"advantage": [plainly.GROUPS], "pessimism": [plainly.PESSIMISM], "decay": [plainly.DECAYS],
         "loss": [plainly.DPO_LOSSES, test_known_answers.DPO_MARGINS]}


def own_flags(stage, shared=Training):
    """The flags that a stage has and the Config `shared` has not. --max_norm belongs to all, and is varied by
    each stage."""
    names = {f.name for f in dataclasses.fields(shared)} - ({"max_norm"} if shared is Training else set())
    return [f for f in dataclasses.fields(stage.Config) if f.name not in names | FILES]


@pytest.mark.parametrize("stage", CASES, ids=lambda stage: stage.__name__)
def test_every_flag_of_a_stage_is_held_against_the_plain_loop_with_all_its_kinds(stage):
    assert_every_flag_is_held(stage, CASES[stage])


def assert_every_flag_is_held(stage, cases, shared=Training):
    for f in own_flags(stage, shared):
        flag = f"{stage.__name__}.py --{f.name}"
        assert any(f.name in case for case in cases), (
            f"{flag}: set it in CASES of the stage's tests, and say in tests/helpers/plainly.py what it does")
        if f.metadata["choices"]:
            assert f.name in KINDS, f"{flag} offers kinds: name their expected formulas in KINDS here"
            for kind in f.metadata["choices"]:
                for formulas in KINDS[f.name]:
                    assert kind in formulas, f"{flag} {kind} has no expected formula in the tests"
