"""Flags: what they accept, what they refuse and how they say so."""
import dataclasses
import re

import pytest

import data.__main__ as data_main
import dpo
import evaluate
import ppo
import reward_model
import sft
from runtime import flags
from runtime.flags import Training, flag


@dataclasses.dataclass
class Config(Training):
    words: tuple = flag((), "some words")
    n: int = flag(3, "a number, 100 % of it", 1, 9)
    rate: float = flag(0.5, "another", 0)
    top: float = flag(1.0, "one more", None, 2)
    name: str = flag("", "a text")
    shape: str = flag("round", "a choice", choices=("round", "square"))
    sure: bool = flag(True, "a switch")


def parsed(*argv):
    return flags.parse(Config, "A test.", list(argv))


def test_flags_without_arguments_are_the_defaults():
    assert parsed() == Config()


def test_flags_have_the_type_of_their_field():
    cfg = parsed("a", "b", "--n", "7", "--rate", "2", "--name", "x y", "--shape", "square",
                 "--seed", "5", "--top=-1e3")
    assert cfg == Config(words=("a", "b"), n=7, rate=2.0, name="x y", shape="square", seed=5, top=-1000.0)
    assert type(cfg.n) is int and type(cfg.rate) is float and isinstance(cfg, Config)


def test_a_switch_is_turned_off_by_no():
    assert parsed("--no-sure").sure is False and parsed("--sure").sure is True and parsed().debug is False
    assert parsed("--debug").debug is True and parsed("--debug", "--no-debug").debug is False


@pytest.mark.parametrize("argv,said", [
    (["--n", "0"], "--n: must be in [1, 9], not 0"), (["--n", "10"], "--n: must be in [1, 9], not 10"),
    (["--rate", "-0.1"], "--rate: must be in [0, inf), not -0.1"),
    (["--rate", "nan"], "--rate: must be in [0, inf), not nan"),
    (["--top", "2.5"], "--top: must be in (-inf, 2], not 2.5"),
    (["--n", "1.5"], "--n: invalid int value: '1.5'"), (["--rate", "much"], "--rate: invalid float value"),
    (["--shape", "oval"], "'round', 'square'|round, square"), (["--unknown", "1"], "--unknown"),
    (["--na", "x"], "--na"), (["--n"], "--n: expected one argument"),
    (["--seed", "-1"], "--seed: must be in [0, ")])
def test_a_wrong_flag_ends_with_status_2_and_says_what_is_allowed(capsys, argv, said):
    with pytest.raises(SystemExit) as e:
        parsed(*argv)
    error = capsys.readouterr().err
    assert e.value.code == 2 and any(s in error for s in said.split("|"))
    assert error.count("\n") == 1 and "--help" in error


STAGES = [sft, reward_model, ppo, dpo, evaluate, data_main]


def every_flag(stages):
    """(stage, flag, a value that it must refuse, what the line must say) for each flag of each script."""
    for stage in stages:
        for f in dataclasses.fields(stage.Config):
            low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
            if choices:
                yield stage, f.name, "octarine", choices[0]
            elif f.type in (int, float):
                small = 1 if f.type is int else 1e-9
                bad = {"much": "invalid"}
                bad |= {} if low is None else {low - small: f"{low}"}
                bad |= {} if high is None else {high + small: f"{high}"}
                if f.type is float:
                    bad |= {"nan": "must be", "inf": "must be", "-inf": "must be"}
                else:
                    bad |= {"1.5": "invalid"}
                for value, said in bad.items():
                    yield stage, f.name, str(value), said


@pytest.mark.parametrize("stage, name, value, said", list(every_flag(STAGES)),
                         ids=lambda v: getattr(v, "__name__", None))
def test_every_flag_out_of_range_is_refused_with_the_range(capsys, stage, name, value, said):
    assert_refused(capsys, stage, name, value, said)


def assert_refused(capsys, stage, name, value, said):
    with pytest.raises(SystemExit) as e:
        flags.parse(stage.Config, "", [f"--{name}={value}"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and f"--{name}" in error and said in error.splitlines()[-1]


def test_flags_that_do_not_go_together_are_refused(capsys):
    with pytest.raises(SystemExit) as e:
        flags.parse(sft.Config, "", ["--n_embd", "100", "--n_head", "3"])
    assert e.value.code == 2 and "n_embd 100 is no multiple of n_head 3" in capsys.readouterr().err


@pytest.mark.parametrize("stage, argv, said", [
    (ppo, "--no-adaptive_kl --kl_target 3", "--kl_target does nothing with --no-adaptive_kl"),
    (ppo, "--kl_horizon=500 --no-adaptive_kl", "--kl_horizon does nothing with --no-adaptive_kl"),
    (ppo, "--lora_alpha 16", "--lora_alpha does nothing with --lora_rank 0"),
    (ppo, "--no-merge", "--merge does nothing with --lora_rank 0"),
    (sft, "--init out/sft --n_layer 8", "--n_layer does nothing with --init out/sft"),
    (sft, "--tokenizer=gpt2 --init=out/sft", "--tokenizer does nothing with --init out/sft"),
    (evaluate, "--temperature 0 --top_k 3", "--top_k does nothing with --temperature 0.0")])
def test_a_flag_that_would_do_nothing_is_refused(capsys, stage, argv, said):
    with pytest.raises(SystemExit) as e:
        flags.parse(stage.Config, "", argv.split())
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_a_flag_beside_the_one_that_it_needs_is_taken():
    argv = ["--kl_target", "3", "--lora_rank", "4", "--no-merge", "--lora_alpha=8"]
    cfg = flags.parse(ppo.Config, "", argv)
    assert cfg.kl_target == 3 and cfg.lora_alpha == 8 and not cfg.merge
    assert flags.parse(ppo.Config, "", ["--out", "merge"]).out == "merge"       # a value is no flag


def test_the_ends_of_a_range_are_allowed():
    assert parsed("--n", "1").n == 1 and parsed("--n", "9").n == 9
    assert parsed("--rate", "0").rate == 0 and parsed("--top", "2").top == 2


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "100 % of it (default: 3)" in text
    assert "round|square" in text and "a text (default: none)" in text
    assert all(f"--{f.name}" in text for f in dataclasses.fields(Config) if f.name != "words")


def test_help_shows_a_script_s_own_flags_before_those_that_it_inherits(capsys):
    @dataclasses.dataclass
    class Own(Config):
        out: str = flag("out/own", "its folder")
        last: int = flag(1, "one more")
    with pytest.raises(SystemExit):
        flags.parse(Own, "A test.", ["--help"])
    text = capsys.readouterr().out
    own, shared = re.split(r"\nengine: .*:\n", text.split("flags of this script:")[1])
    assert text.startswith("usage: ") and text.splitlines()[0].endswith("[words ...] [flags]")
    assert all(f"--{name} " in own for name in ("n", "rate", "shape", "last")) and "  words" in own
    assert all(f"--{f.name}" in shared and f"--{f.name}" not in own for f in dataclasses.fields(Training))
    assert "out/own" in shared
