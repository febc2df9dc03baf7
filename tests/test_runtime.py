"""What surrounds the algorithms: flags, schedules, the optimiser step, files, and the numbers of the report."""
import dataclasses
import json
import math
import os
import sys
from unittest import mock

import pytest
import torch

import data.__main__ as data_main
import dpo
import evaluate
import ppo
import reward_model
import runtime
import sft
import flags
from flags import Training, flag


@dataclasses.dataclass
class Config(Training):
    words: tuple = flag((), "some words")
    n: int = flag(3, "a number, 100 % of it", 1, 9)
    rate: float = flag(0.5, "another", 0)
    top: float = flag(1.0, "one more", None, 2)
    name: str = flag("", "a text")
    shape: str = flag("round", "a choice", choices=("round", "square"))
    sure: bool = flag(True, "a switch")


def a_run(folder, total=10, **settings):
    return runtime.Run(Config(out=str(folder), device="cpu", **settings), total)


def parsed(*argv):
    return flags.parse(Config, "A test.", list(argv))


# ------------------------------------------------------------------------------------------ flags

def test_flags_without_arguments_are_the_defaults():
    assert parsed() == Config()


def test_flags_have_the_type_of_their_field():
    cfg = parsed("a", "b", "--n", "7", "--rate", "2", "--name", "x y", "--shape", "square", "--seed", "5", "--top=-1e3")
    assert cfg == Config(words=("a", "b"), n=7, rate=2.0, name="x y", shape="square", seed=5, top=-1000.0)
    assert type(cfg.n) is int and type(cfg.rate) is float and isinstance(cfg, Config)


def test_a_switch_is_turned_off_by_no():
    assert parsed("--no-sure").sure is False and parsed("--sure").sure is True and parsed().debug is False
    assert parsed("--debug").debug is True and parsed("--debug", "--no-debug").debug is False


@pytest.mark.parametrize("argv,said", [
    (["--n", "0"], "--n: must be from 1 to 9, not 0"), (["--n", "10"], "--n: must be from 1 to 9, not 10"),
    (["--rate", "-0.1"], "--rate: must be at least 0 and finite, not -0.1"), (["--rate", "nan"], "--rate: must be at least 0 and finite, not nan"),
    (["--top", "2.5"], "--top: must be at most 2 and finite, not 2.5"), (["--n", "1.5"], "--n: invalid int value: '1.5'"),
    (["--rate", "much"], "--rate: invalid float value"), (["--shape", "oval"], "'round', 'square'|round, square"),
    (["--unknown", "1"], "--unknown"), (["--na", "x"], "--na"), (["--n"], "--n: expected one argument"), (["--seed", "-1"], "--seed: must be from 0")])
def test_a_wrong_flag_ends_with_status_2_and_says_what_is_allowed(capsys, argv, said):
    with pytest.raises(SystemExit) as e:
        parsed(*argv)
    error = capsys.readouterr().err
    assert e.value.code == 2 and any(s in error for s in said.split("|"))


def every_flag():
    """(stage, flag, a value that it must refuse, what the line must say) for each flag of each script."""
    for stage in (sft, reward_model, ppo, dpo, evaluate, data_main):
        for f in dataclasses.fields(stage.Config):
            low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
            if choices:
                yield stage, f.name, "octarine", choices[0]
            elif f.type in (int, float):
                small = 1 if f.type is int else 1e-9
                bad = {"much": "invalid"} | ({} if low is None else {low - small: f"{low}"}) | ({} if high is None else {high + small: f"{high}"})
                if f.type is float:
                    bad |= {"nan": "must be", "inf": "must be", "-inf": "must be"}
                else:
                    bad |= {"1.5": "invalid"}
                for value, said in bad.items():
                    yield stage, f.name, str(value), said


@pytest.mark.parametrize("stage, name, value, said", list(every_flag()), ids=lambda v: getattr(v, "__name__", None))
def test_every_flag_out_of_range_is_refused_with_the_range(capsys, stage, name, value, said):
    with pytest.raises(SystemExit) as e:
        flags.parse(stage.Config, "", [f"--{name}={value}"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and f"--{name}" in error and said in error.splitlines()[-1]


def test_flags_that_do_not_go_together_are_refused(capsys):
    with pytest.raises(SystemExit) as e:
        flags.parse(sft.Config, "", ["--n_embd", "100", "--n_head", "3"])
    assert e.value.code == 2 and "n_embd 100 is not a multiple of n_head 3" in capsys.readouterr().err


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory: a lower --micro_batch"), (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (OSError(28, "No space left on device"), "out/run: No space left on device"),
    (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory")])
def test_what_a_machine_can_run_out_of_is_one_line(monkeypatch, error, said):
    def train(cfg):
        raise error
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        runtime.main(Config, train, "")
    assert e.value.code.startswith(f"stage.py: {said}")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def train(cfg):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    with pytest.raises(RuntimeError, match="shapes"):
        runtime.main(Config, train, "")


def test_the_ends_of_a_range_are_allowed():
    assert (parsed("--n", "1").n, parsed("--n", "9").n, parsed("--rate", "0").rate, parsed("--top", "2").top) == (1, 9, 0, 2)


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "100 % of it (default: 3)" in text and "round|square" in text and "a text (default: none)" in text
    assert all(f"--{f.name}" in text for f in dataclasses.fields(Config) if f.name != "words")


def test_an_error_that_a_user_can_put_right_is_one_line_and_status_1(monkeypatch):
    def train(cfg):
        raise ValueError("no such thing")
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py"])
    with pytest.raises(SystemExit) as e:
        runtime.main(Config, train, "A test.")
    assert e.value.code == "stage.py: no such thing"            # sys.exit of a text: status 1, the text to stderr
    monkeypatch.setattr(sys, "argv", ["stage.py", "--debug"])
    with pytest.raises(ValueError, match="no such thing"):
        runtime.main(Config, train, "A test.")


def test_require_says_what_to_run_first(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*run `python sft\.py` first") as e:
        runtime.require(str(tmp_path / "nowhere"), "sft")
    assert "\n" not in str(e.value)
    (tmp_path / "config.json").write_text("{}")
    runtime.require(str(tmp_path), "sft")


# ------------------------------------------------------------------------------------------ optimiser

@pytest.mark.parametrize("shape,want", [("constant", lambda d: 1.0), ("linear", lambda d: 1 - d),
                                        ("cosine", lambda d: (1 + math.cos(math.pi * d)) / 2)])
def test_schedule_warms_up_in_a_line_and_then_keeps_its_shape(shape, want):
    found = [runtime.schedule(s, 25, 5, shape) for s in range(25)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == pytest.approx([want(i / 20) for i in range(20)])
    assert all(0 < f <= 1 for f in found)                       # no step is wasted at 0, the last included


def test_schedule_without_warm_up_or_with_nothing_else():
    assert runtime.schedule(0, 10, 0, "linear") == 1 and runtime.schedule(9, 10, 0, "linear") == pytest.approx(0.1)
    assert [runtime.schedule(s, 3, 5, "cosine") for s in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert runtime.schedule(1, 1, 1, "linear") == 1


@pytest.mark.parametrize("max_norm,factor", [(1.0, 0.2), (2.5, 0.5), (5.5, 1.0), (100.0, 1.0)])
def test_descend_clips_the_norm_of_all_parameters_and_returns_it_unclipped(tmp_path, max_norm, factor):
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=77.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    assert a_run(tmp_path).descend(optimizer, 0.1, max_norm, 1.0, "it") == pytest.approx(5.0)
    torch.testing.assert_close(a.detach(), torch.tensor([-0.3 * factor]), rtol=1e-5, atol=0)
    torch.testing.assert_close(b.detach(), torch.tensor([0.0, -0.4 * factor]), rtol=1e-5, atol=0)
    assert not any(p.grad is not None and p.grad.any() for p in (a, b))


def test_only_matrices_decay_and_every_parameter_learns(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = runtime.make_optimizer(model, 0.1, weight_decay=0.5)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    a_run(tmp_path).descend(optimizer, 0.1, 1.0, 1.0, "it")
    for p, old in zip(model.parameters(), before):              # AdamW: p ← p − lr·decay·p
        torch.testing.assert_close(p.detach(), old * (0.95 if p.dim() > 1 else 1.0))


# ------------------------------------------------------------------------------------------ files

def test_write_json_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    runtime.write_json(str(path), {"β": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    with pytest.raises(TypeError):
        runtime.write_json(str(path), {"fine": 1, "not": object()})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    runtime.write_json(str(path), 3)
    assert path.read_text() == "3" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_run_writes_its_settings_and_one_line_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "SummaryWriter", None)
    run = a_run(tmp_path / "run", 40, seed=4)
    run.resume()
    for i in range(40):
        run.log({"loss": torch.tensor(i / 3), "n": i})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[20] == {"step": 21, "loss": round(20 / 3, 6), "n": 20.0}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 4
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert shown[0] == "1/40" and shown[-1] == "40/40" and len(shown) == 21


def test_a_run_writes_to_tensorboard_what_it_writes_to_its_file(tmp_path, monkeypatch):
    board = mock.Mock()
    monkeypatch.setattr(runtime, "SummaryWriter", mock.Mock(return_value=board))
    run = a_run(tmp_path / "run", 2)
    run.resume()
    run.log({"loss": 0.5, "kl": 3.0})
    assert board.add_scalar.call_args_list == [mock.call("loss", 0.5, 1), mock.call("kl", 3.0, 1)]


def test_a_device_that_is_not_there_is_refused():
    assert runtime.pick_device("cpu") == "cpu" and runtime.pick_device("auto") in ("cuda", "mps", "cpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ValueError, match=f"--device {name}"):
                runtime.pick_device(name)


# ------------------------------------------------------------------------------------------ the report's numbers

def test_win_rate_counts_ties_as_half():
    assert evaluate.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0], 1)[0] == 0.5
    assert evaluate.win_rate([1.0, 2.0, 3.0, 1.0], [0.0, 2.0, 4.0, 0.0], 2)[0] == 0.625
    assert evaluate.win_rate([1.0] * 6, [1.0] * 6, 3) == (0.5, 0.5, 0.5)
    assert evaluate.win_rate([2.0] * 6, [1.0] * 6, 3) == (1.0, 1.0, 1.0)


def test_win_rates_interval_contains_the_rate_and_has_the_width_of_its_standard_error():
    torch.manual_seed(0)
    mine, theirs = torch.randn(400).tolist(), (torch.randn(400) - 0.3).tolist()
    rate, low, high = evaluate.win_rate(mine, theirs, 1)
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 400), rel=0.1)


def test_win_rates_interval_resamples_prompts_not_answers():
    wins = [1.0] * 8 + [-1.0] * 8 + [1.0] * 8 + [-1.0] * 8      # 4 prompts of 8 answers that always agree
    low, high = evaluate.win_rate(wins, [0.0] * 32, 8)[1:]
    assert (low, high) == (0.0, 1.0)                            # 32 independent answers would give about 0.33 to 0.67


def test_distinct2_is_the_share_of_different_word_pairs_within_texts():
    assert evaluate.distinct2(["a b a b", "b a"]) == 2 / 4      # ab ba ab · ba; never across texts
    assert evaluate.distinct2(["a b c d"]) == 1 and evaluate.distinct2(["one", ""]) == 0


def test_best_of_picks_the_highest_reward_in_each_group_of_n():
    pool = [[(0.1, 0), (0.9, 1), (0.5, 2), (0.4, 3)], [(3.0, 4), (-1.0, 5), (-2.0, 6), (-1.5, 7)]]
    assert evaluate.best_of(pool, 1, 2) == [0, 1, 4, 5]
    assert evaluate.best_of(pool, 2, 2) == [1, 2, 4, 7]
    assert evaluate.best_of(pool, 4, 1) == [1, 4]


def test_seconds_count_overlapping_stages_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "STARTED", 10000.0)
    monkeypatch.setattr(runtime.time, "time", lambda: 10007.0)
    for name, started, ended in (("sft", 100, 160), ("reward_model", 150, 200), ("ppo", 300, 400), ("dpo", 320, 350)):
        os.makedirs(tmp_path / name)
        runtime.write_json(str(tmp_path / name / "run.json"), {"started": started, "ended": ended, "seconds": ended - started})
    os.makedirs(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("{")
    assert evaluate.seconds(str(tmp_path), ["ppo", "dpo", "broken", "absent"]) == {
        "sft": 60, "reward_model": 50, "ppo": 100, "dpo": 30, "evaluate": 7.0, "total": 207.0}
