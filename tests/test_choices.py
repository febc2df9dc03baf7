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
from variants import cautious, grpo, online_dpo, ppo_ptx

CASES = {stage: [test.SHARED, *test.CASES] for stage, test in (
    (sft, test_sft), (reward_model, test_reward_model), (dpo, test_dpo), (online_dpo, test_dpo))}
for stage, settings in test_ppo.CASES:
    CASES.setdefault(stage, [test_ppo.SHARED]).append(settings)
# Variants, and the stages whose other flags they share.
VARIANTS = {online_dpo: dpo.Config, grpo: ppo.OnPolicy, ppo_ptx: ppo.Config, cautious: ppo.Config}
# Flags that name files or the shape of a new network: the chain and the readers' tests have them.
FILES = {"data", "held_out", "init", "reward", "ptx_data", "preferences", "tokenizer",
         "n_layer", "n_head", "n_embd", "block_size"}
KINDS = {"advantage": [plainly.GROUPS], "pessimism": [plainly.PESSIMISM], "decay": [plainly.DECAYS],
         "loss": [plainly.DPO_LOSSES, test_known_answers.DPO_MARGINS]}


def own_flags(stage):
    shared = {f.name for f in dataclasses.fields(VARIANTS.get(stage, Training))}
    shared -= {"max_norm"} if stage not in VARIANTS else set()
    return [f for f in dataclasses.fields(stage.Config) if f.name not in shared | FILES]


@pytest.mark.parametrize("stage, name", [(stage, f.name) for stage in CASES for f in own_flags(stage)],
                         ids=lambda v: getattr(v, "__name__", v))
def test_every_flag_of_a_stage_is_held_against_the_plain_loop(stage, name):
    varied = {key for case in CASES[stage] for key in case}
    assert name in varied, (
        f"{stage.__name__}.py has a flag --{name}: set it in CASES of tests/test_{stage.__name__}.py, "
        "and say in tests/helpers/plainly.py what it does")


@pytest.mark.parametrize("stage, name, kind", [
    (stage, f.name, kind)
    for stage in CASES for f in own_flags(stage) for kind in f.metadata["choices"] or ()],
    ids=lambda v: getattr(v, "__name__", v))
def test_every_kind_that_a_flag_offers_has_an_expected_formula(stage, name, kind):
    flag = f"{stage.__name__}.py --{name}"
    assert name in KINDS, f"{flag} offers kinds: name their expected formulas in KINDS here"
    for formulas in KINDS[name]:
        assert kind in formulas, f"{flag} {kind} has no expected formula in the tests"
