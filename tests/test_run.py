"""A stage at work: whatever happens to it, its work is there afterwards, and it ends as if nothing
had happened."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from helpers.start import ROOT, SMALL, in_background, script

import dpo
import ppo
import reward_model
import sft
from data import records
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime import outputs, processes
from runtime import run as run_module
from runtime.checkpoints import Checkpoints
from runtime.flags import Training
from runtime.optimizer import make_optimizer, schedule
from runtime.run import Run
from runtime.terminal import Table

STAGES = ["sft", "reward_model", "dpo", "ppo"]


def a_run(folder, total=10, **settings):
    run = Run(Training(out=str(folder), device="cpu", save_seconds=0.0, **settings), total)
    model = GPT(GPTConfig(vocab_size=8, block_size=4, n_layer=1, n_head=1, n_embd=4))
    optimizer = make_optimizer(model, 0.1)
    run.resume(model=model, optimizer=optimizer)
    return run, model, optimizer


def a_step(run, model, optimizer, scale=1.0):
    (model(torch.randint(8, (2, 4))).pow(2).mean() * scale).backward()
    run.optimizer_step(optimizer, 0.1, scale, "batch 7")
    run.log({"loss": scale})


def steps(folder):
    """Steps that metrics.jsonl has so far."""
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------------------------------ metrics

def test_a_run_writes_its_settings_and_one_line_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "SummaryWriter", None)
    run = a_run(tmp_path / "run", 40, seed=4)[0]
    for i in range(40):
        run.log({"loss": torch.tensor(i / 3), "n": i})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert all(0 <= line.pop("seconds") < 10 for line in lines)
    assert lines[20] == {"step": 21, "loss": round(20 / 3, 6), "n": 20.0}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 4
    first, *shown = [line.split() for line in capsys.readouterr().out.splitlines()[-23:]]
    assert first == ["step", "loss", "n", "left"] == shown[12]              # again after 12 lines
    assert shown[0][0] == "1/40" and shown[-1] == ["40/40", "13", "39", "0:00"]


def test_a_steps_line_is_aligned_under_the_first_metrics_that_fit_into_100_columns(capsys):
    table, metrics = Table(54), {f"number_{i:02}": 12345.6 / 10 ** i for i in range(20)} | {"nan": math.nan}
    for step in (1, 2):
        table.add(step, metrics, keep=True)
    heads, first, second = capsys.readouterr().out.splitlines()
    names = heads.split()
    assert 90 < len(heads) == len(second) <= 100 and names[:2] == ["step", "number_00"] and len(names) == 10
    for name in names[1:-1]:
        end = heads.index(name) + len(name)
        assert first[end - 1] != " " != second[end - 1] and first[end:end + 1] in ("", " ")
    table.add(3, {"other": 1.0}, keep=True)                 # a metric that a step does not have
    assert capsys.readouterr().out.split()[0] == "3/54"


def test_answers_are_to_the_same_prompts_with_the_same_noise_and_change_no_random_number_of_the_run(
        tiny_inputs, tmp_path, capsys):
    folder = str(tiny_inputs / "out/sft")
    run, model = Run(Training(out=str(tmp_path), device="cpu"), 9), GPT.load(folder).float()
    tokenizer = Tokenizer.load(folder)
    run.place(model)
    prompts = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(7)]
    shown = []
    for step in (0, 8):
        run.begin(step)
        before = run.rng.getstate(), torch.get_rng_state()
        capsys.readouterr()
        run.show_answers(model, tokenizer, [[], *prompts])                  # an empty prompt has no question
        shown.append(capsys.readouterr().out)
        assert run.rng.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert shown[0] == shown[1] and re.findall(r"What is (\d)", shown[0]) == ["0", "2", "4"]


def test_a_line_that_is_not_to_be_kept_is_seen_on_a_terminal_alone(capsys, monkeypatch):
    Table(3).add(1, {"loss": 1.0}, keep=True)                               # "step" is wider than "1/3"
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.index("loss") + 4 == len(line)
    Table(54).add(2, {"loss": 1.0}, keep=False)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table = Table(54)
    table.add(2, {"loss": 1.0}, keep=False)
    table.add(3, {"loss": 2.0}, keep=True)
    shown = capsys.readouterr().out.split("\r\033[K")
    assert shown[2].startswith(" 2/54") and "\n" not in shown[2] and shown[-1].endswith("\n")


def test_a_run_shows_the_flags_that_differ_from_their_defaults(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = ppo.Config(device="cpu", lr=5e-4, adaptive_kl=False, reward="a" * 50, data="b" * 50)
    Run(cfg, 10)
    said = capsys.readouterr().out.splitlines()
    flags = f"--device cpu --reward {'a' * 50} --data {'b' * 50} --lr 0.0005 --no-adaptive_kl"
    assert " ".join(" ".join(said).split()).endswith(f"on cpu: {flags}")
    assert max(map(len, said)) <= 100


def test_the_time_left_is_estimated_without_the_slow_first_step(tmp_path, capsys, monkeypatch):
    run, now = a_run(tmp_path, 20)[0], time.time()
    capsys.readouterr()
    for seconds in (100, 110, 120):
        monkeypatch.setattr(run_module.time, "time", lambda: now + seconds)
        run.log({"loss": 1.0})
    heads, first, second, third = capsys.readouterr().out.splitlines()
    assert heads == " step     loss   left" and first == " 1/20        1"
    assert second.endswith("1   3:00") and third.endswith("1   2:50")


def test_a_run_writes_to_tensorboard_what_it_writes_to_its_file(tmp_path, monkeypatch):
    board = mock.Mock()
    monkeypatch.setattr(run_module, "SummaryWriter", mock.Mock(return_value=board))
    run = a_run(tmp_path / "run", 2)[0]
    run.log({"loss": 0.5, "kl": 3.0})
    *calls, seconds = board.add_scalar.call_args_list
    assert calls == [mock.call("loss", 0.5, 1), mock.call("kl", 3.0, 1)] and seconds.args[0] == "seconds"


def test_a_note_is_logged_with_its_step_and_no_other(tmp_path):
    run = a_run(tmp_path / "run", 2)[0]
    run.note(ood=0.25)
    run.log({"loss": 1.0})
    run.log({"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["ood"] == 0.25 and "ood" not in lines[1]


# -------------------------------------------------------------------------------- an optimiser step

@pytest.mark.parametrize("warmup, warned", [(10, False), (11, True)])
def test_a_warm_up_that_outlasts_the_run_is_said(tmp_path, capsys, warmup, warned):
    cfg = sft.Config(out=str(tmp_path), device="cpu", warmup=warmup)
    Run(cfg, 10)
    error = capsys.readouterr().err
    assert error.count("\n") == (1 if warned else 0)
    said = "--warmup 11 is longer than the run of 10 steps: the learning rate never reaches --lr"
    assert (said in error) == warned


@pytest.mark.parametrize("stage", [sft, reward_model, dpo], ids=lambda stage: stage.__name__)
def test_a_run_is_as_long_as_the_records_that_fit(trained, tmp_path, stage):
    """And its learning rate decays to the end of them."""
    path = tmp_path / "some.jsonl"
    records.write(path, [
        {"prompt": "Hi", "response": text, "chosen": text, "rejected": "no"}
        for text in ("yes", "a much longer answer " * 20) for _ in range(20)])
    settings = {"init": "out/sft", "warmup": 0, "decay": "linear", "epochs": 2, "batch": 3, "lr": 0.01}
    cfg, _, lines, _ = trained(stage, data=str(path), **settings)
    assert len(lines) == 2 * math.ceil(18 / 3)    # of 40, 4 are held out, and 18 too long
    last = 0.01 * schedule(len(lines) - 1, len(lines), 0, "linear")
    assert lines[-1]["lr"] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("stage", [sft, reward_model, dpo, ppo], ids=lambda stage: stage.__name__)
def test_a_system_message_is_put_first_and_stays_with_the_model(trained, stage):
    small = dict(steps=1, batch=4, max_new_tokens=3) if stage is ppo else dict(batch=400)
    start = {} if stage is sft else {"init": "out/sft"}
    settings = dict(system="Be kind.", warmup=0, **small, **start)
    cfg, _, lines, _ = trained(stage, **settings)
    tokenizer = Tokenizer.load(cfg.out)
    assert tokenizer.system == "Be kind." and lines
    assert "Be kind." in tokenizer.decode(tokenizer.prompt([{"role": "user", "content": "Hi"}]))


def test_a_warning_is_given_once_until_it_passes_and_comes_back(tmp_path, capsys):
    run, said = a_run(tmp_path)[0], []
    for texts in (["a"], ["a", "b"], ["b"], [], ["b"]):
        for text in "ab":
            run.warn_if(text in texts, text)
        said.append(re.findall(r"warning: step 1: (.)", capsys.readouterr().err))
    assert said == [["a"], ["b"], [], [], ["b"]]


def test_a_good_step_of_one_optimiser_does_not_reset_anothers_count_of_failed_steps(tmp_path):
    run, optimizers = a_run(tmp_path)[0], []
    for _ in range(2):
        p = torch.nn.Parameter(torch.zeros(1))
        optimizers.append((p, torch.optim.SGD([p], lr=0.1)))

    def step(number, gradient):
        p, optimizer = optimizers[number]
        p.grad = torch.tensor([gradient])
        run.optimizer_step(optimizer, 0.1, 1.0, "rows")
    for _ in range(2):
        step(0, math.nan)
        step(1, 1.0)
    with pytest.raises(ValueError, match="third in a row"):
        step(0, math.nan)


@pytest.mark.parametrize("max_norm,factor", [(1.0, 0.2), (2.5, 0.5), (5.5, 1.0), (100.0, 1.0)])
def test_an_optimizer_step_clips_the_norm_of_all_parameters_and_returns_it_unclipped(
        tmp_path, max_norm, factor):
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=77.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    run = a_run(tmp_path, max_norm=max_norm)[0]
    assert run.optimizer_step(optimizer, 0.1, 1.0, "it") == pytest.approx(5.0)
    torch.testing.assert_close(a.detach(), torch.tensor([-0.3 * factor]), rtol=1e-5, atol=0)
    torch.testing.assert_close(b.detach(), torch.tensor([0.0, -0.4 * factor]), rtol=1e-5, atol=0)
    assert not any(p.grad is not None and p.grad.any() for p in (a, b))


def test_a_step_that_is_not_finite_is_named_and_skipped_and_three_in_a_row_stop_the_run(tmp_path, capsys):
    run, model, optimizer = a_run(tmp_path)
    a_step(run, model, optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = (tmp_path / "resume.safetensors").read_bytes()
    for bad in (float("nan"), float("inf")):
        a_step(run, model, optimizer, bad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (tmp_path / "resume.safetensors").read_bytes() == kept
    error = capsys.readouterr().err
    assert "step 2: loss nan" in error and "step 3: loss inf" in error
    assert "batch 7: not finite, no update made" in error
    a_step(run, model, optimizer)                                   # a good one: the count starts anew
    assert (tmp_path / "resume.safetensors").read_bytes() != kept
    with pytest.raises(ValueError, match="step 7: loss nan.*third in a row.*last checkpoint is kept"):
        for _ in range(3):
            a_step(run, model, optimizer, float("nan"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] is None and lines[0]["loss"] == 1.0


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run, model, optimizer = a_run(tmp_path)
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    run.log({"loss": 1.0})
    assert not (tmp_path / "resume.safetensors").exists()
    with pytest.raises(ValueError, match="no longer finite"):
        run.finish(model, None)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "new").exists()


def test_the_checkpoint_is_there_until_the_model_is(trained, tmp_path, monkeypatch):
    run, model, optimizer = a_run(tmp_path)
    a_step(run, model, optimizer)
    checkpoint, moved, replace = tmp_path / "resume.safetensors", [], os.replace

    def watched(source, target):
        moved.append((os.path.basename(target), checkpoint.exists()))
        replace(source, target)
    monkeypatch.setattr(os, "replace", watched)
    run.finish(model, Tokenizer.load("out/sft"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json"} <= {name for name, _ in moved}
    assert all(there for _, there in moved) and not checkpoint.exists()


def test_a_learning_rate_far_too_high_ends_in_one_line_and_spares_the_model_in_the_folder(chain, inside):
    out = chain[0] / "out/diverged"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")
    too_high = "--lr 1e30 --warmup 0 --max_norm 0"
    status, error = inside("sft", f"{SMALL['sft']} {too_high} --out out/diverged", chain[0])
    assert status == 1 and "third in a row" in error.splitlines()[-1] and "--lr" in error.splitlines()[-1]
    assert (out / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    child = "from runtime.run import peak_memory; print(peak_memory('cpu'))"
    parent = (f"import subprocess, sys; x = b'1' * 10 ** 9; "
              f"subprocess.run([sys.executable, '-c', {child!r}], check=True)")
    found = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True)
    assert 5e7 < int(found.stdout) < 9e8


# -------------------------------------------------------------------------------------------- kills

def flags(stage, out):
    return f"{SMALL[stage]} --out {out} --save_seconds 0"           # a checkpoint per step


def started(stage, flags, folder, out, saved=True):
    """A stage at work that has logged two steps, and if it saves every step, has a checkpoint on the disk."""
    process = in_background(stage, flags, folder)
    checkpoint = out / "resume.safetensors"
    while process.poll() is None and (steps(out) < 2 or (saved and not checkpoint.exists())):
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    return process


def assert_ends_as_uninterrupted(stage, chain, out, inside=None, more=""):
    """The same command again ends in the weights of the chain's uninterrupted run,
    and each step is logged once."""
    if inside:
        assert inside(stage, flags(stage, out) + more, chain[0])[0] == 0
    else:
        done = script(stage, flags(stage, out), chain[0])
        assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr
    whole, resumed = (chain[0] / name for name in (f"out/{stage}", out))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), \
        f"{stage}: an interrupted run ends in other weights"
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (whole, resumed))
    for line in a + b:
        line.pop("seconds", None)
    assert a == b
    assert not [n for n in os.listdir(resumed)
                if n.endswith(".tmp") or n in ("resume.safetensors", "unfinished", "new")]


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])        # all stages, often: below
def test_a_killed_run_resumes_and_ends_in_the_same_weights(chain, stage):
    out = chain[0] / f"out/killed_{stage}"
    process = started(stage, flags(stage, f"out/killed_{stage}"), chain[0], out)
    process.kill()
    process.wait()
    assert not (out / "model.safetensors").exists()
    assert_ends_as_uninterrupted(stage, chain, f"out/killed_{stage}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_at_random_moments_lose_nothing(chain, inside, stage):
    """From the moment the run's folder is there,
    saves after every step and the writing of the model included."""
    out, rng, kills, began = chain[0] / f"out/twenty_{stage}", random.Random(stage), 0, time.time()
    whole = json.loads((chain[0] / f"out/{stage}/run.json").read_text())
    length = 3 * (whole["ended"] - whole["started"])
    while kills < 20:
        process = in_background(stage, flags(stage, out.relative_to(chain[0])), chain[0])
        process.stdout.readline()                                   # the settings: the run begins
        time.sleep(rng.random() ** 2 * min(length, 3.0))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        if (out / "model.safetensors").exists() and not (out / "resume.safetensors").exists():
            GPT.load(str(out))                                      # it had ended: once more
            for path in out.iterdir():
                path.unlink()
        assert time.time() - began < 1200
    assert_ends_as_uninterrupted(stage, chain, f"out/twenty_{stage}", inside)


@pytest.mark.parametrize("number", [
    signal.SIGINT, signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda n: n.name)
def test_ctrl_c_and_a_closed_terminal_finish_the_step_and_keep_it(chain, number):
    name = f"out/stopped_{number.name}"
    process = started("ppo", f"{SMALL['ppo']} --out {name}", chain[0], chain[0] / name, saved=False)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 130 and "stopping after this step" in error
    assert "goes on from the last checkpoint" in error
    assert (chain[0] / name / "resume.safetensors").exists()
    assert_ends_as_uninterrupted("ppo", chain, name)


def test_output_that_nobody_reads_any_more_ends_the_run_with_one_line(chain, inside):
    out = chain[0] / "out/unread"
    process = started("dpo", flags("dpo", "out/unread"), chain[0], out)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and error == "dpo.py: nobody reads the output any more\n"
    assert_ends_as_uninterrupted("dpo", chain, "out/unread", inside)


@pytest.mark.skipif(run_module.lock.__globals__["fcntl"] is None, reason="no locks here")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(chain):
    out = chain[0] / "out/claimed"
    long = f"{SMALL['ppo']} --steps 1000 --out out/claimed --save_seconds 0".replace("--steps 3 ", "")
    process = started("ppo", long, chain[0], out)
    done = script("dpo", f"{SMALL['dpo']} --out out/claimed --no-resume", chain[0])
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"another run is at work here (process {process.pid})" in done.stderr
    assert process.poll() is None and (out / "resume.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["stage"] == "ppo.py"
    process.kill()
    process.wait()
    done = script("dpo", f"{SMALL['dpo']} --out out/claimed --no-resume", chain[0])
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------- disks

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", [
    "metrics.jsonl.tmp", "resume.safetensors.tmp", "new/model.safetensors.tmp", "new/config.json.tmp",
    "new/tokenizer_config.json.PID.tmp", "new/run.json.tmp"])
def test_a_full_disk_is_one_line_and_the_run_that_was_there_stays_whole(chain, inside, monkeypatch, name):
    name, out = name.replace("PID", str(os.getpid())), chain[0] / ("out/full_" + name.replace("/", "_"))
    shutil.copytree(chain[0] / "out/sft", out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    path = out / "unfinished" / name
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    command = flags("dpo", out) + " --overwrite"
    with monkeypatch.context() as patch:            # of shutil.rmtree, which would remove the link
        patch.setattr(run_module.shutil, "rmtree", lambda *args, **how: None)
        status, error = inside("dpo", command, chain[0])
    assert status == 1 and error.count("\n") == 1, error
    assert "No space left on device" in error and str(out) in error, error
    assert {name: (out / name).read_bytes() for name in before} == before
    if path.is_symlink():
        path.unlink()
    # With room again, the same command goes on.
    assert_ends_as_uninterrupted("dpo", chain, out.relative_to(chain[0]), inside, " --overwrite")


def test_a_folder_that_cannot_be_written_is_refused_before_training(chain, inside):
    (chain[0] / "file").write_text("")
    assert inside("dpo", "--out file/x", chain[0]) == (1, "dpo.py: file/x: Not a directory\n")


# -------------------------------------------------------------------- what a finished run's folder refuses

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name not in (".lock", "unfinished")}


def test_a_finished_run_is_refused_under_other_flags_and_named(chain, inside):
    shutil.copytree(chain[0] / "out/ppo", chain[0] / "out/finished")
    before = contents(chain[0] / "out/finished")
    command = f"{SMALL['ppo']} --out out/finished"
    status, error = inside("ppo", f"{command} --lr 5e-4 --seed 3", chain[0])
    date = time.strftime("%Y-%m-%d", time.localtime(json.loads(before["run.json"])["ended"]))
    assert status == 1 and error.count("\n") == 1
    assert f"ppo.py: out/finished holds a finished run of ppo.py, {date} " in error
    assert "(lr was 0.001, is now 0.0005, seed was 0, is now 3)" in error
    assert error.endswith("name another --out, or add --overwrite\n")
    status, error = inside("dpo", f"{SMALL['dpo']} --out out/finished", chain[0])
    assert status == 1 and "it is of ppo.py" in error
    assert inside("ppo", command, chain[0]) == (0, "")              # the same once more: nothing to do
    assert contents(chain[0] / "out/finished") == before


def test_a_run_of_changed_code_is_another_run(tmp_path, monkeypatch):
    run, model, _ = a_run(tmp_path, 1)
    run.log({"loss": 1.0})
    run.finish(model, mock.Mock(save=lambda folder: None, ids=dict))
    with pytest.raises(SystemExit) as e:
        a_run(tmp_path, 1)
    assert e.value.code == 0
    now = outputs.code()
    monkeypatch.setattr(outputs, "code", lambda: {**now, "model.py": "another"})
    with pytest.raises(ValueError, match="model.py has changed since"):
        a_run(tmp_path, 1)


def test_a_model_that_no_run_has_written_is_never_overwritten(chain, inside):
    shutil.copytree(chain[0] / "out/sft", chain[0] / "out/downloaded")
    (chain[0] / "out/downloaded/run.json").unlink()
    before = contents(chain[0] / "out/downloaded")
    for more in ("", " --overwrite", " --no-resume"):
        status, error = inside("dpo", f"{SMALL['dpo']} --out out/downloaded{more}", chain[0])
        assert status == 1 and "a model that no run has written: name another --out" in error
    assert contents(chain[0] / "out/downloaded") == before


def test_what_is_overwritten_stays_whole_until_the_new_run_is_done(chain, inside):
    out = chain[0] / "out/overwritten"
    shutil.copytree(chain[0] / "out/ppo", out)                      # whose rollouts dpo.py does not write
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    command = flags("dpo", "out/overwritten") + " --overwrite"
    process = started("dpo", command, chain[0], out / "unfinished")
    process.kill()
    process.wait()
    assert contents(out) == before and GPT.load(str(out)).head_kind == "lm"
    status, error = inside("dpo", f"{SMALL['dpo']} --init out/overwritten --out out/after", chain[0])
    assert status == 0 and error.count("out/overwritten also holds an unfinished run") == 1
    done = script("dpo", command, chain[0])
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr
    whole = contents(chain[0] / "out/dpo")
    assert contents(out).keys() == whole.keys() | {"notes.txt"} and not (out / "unfinished").exists()
    assert contents(out)["model.safetensors"] == whole["model.safetensors"]
    assert (out / "metrics.jsonl").read_text().count("\n") == whole["metrics.jsonl"].count(b"\n")
    assert json.loads((out / "run.json").read_text())["stage"] == "dpo.py"


# ---------------------------------------------------------------------------- what a resume refuses

def test_a_flag_that_is_new_counts_as_its_default_and_new_code_is_said(tmp_path, monkeypatch, capsys):
    a_step(*a_run(tmp_path))
    about = json.loads((tmp_path / "run.json").read_text())
    del about["settings"]["max_norm"]
    about["code"]["model.py"] = "as it was"
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert a_run(tmp_path)[0].step == 1
    assert "model.py has changed since; the run goes on with the new code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_norm was 1.0, is now 2.0"):
        a_run(tmp_path, max_norm=2.0)


def test_an_unfinished_run_of_something_else_is_refused_and_kept(tmp_path):
    a_step(*a_run(tmp_path))
    with pytest.raises(ValueError, match="with other settings .seed was 0, is now 1.*--no-resume"):
        a_run(tmp_path, seed=1)
    run = a_run(tmp_path)[0]
    assert run.step == 1
    run = a_run(tmp_path, seed=1, resume=False)[0]
    assert run.step == 0 and steps(tmp_path) == 0 and not (tmp_path / "resume.safetensors").exists()


def test_processes_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """As on two machines, one of which has an out/ of its own."""
    a_step(*a_run(tmp_path))
    monkeypatch.setattr(processes, "gather", lambda x: [x, None])
    monkeypatch.setattr(Checkpoints, "load",
                        lambda *parts: pytest.fail("one process waits for the others in vain"))
    said = "do not see the same checkpoint in .*: machines must share that folder"
    with pytest.raises(ValueError, match=said):
        a_run(tmp_path)


def test_a_run_whose_inputs_have_changed_is_refused(chain, inside):
    (chain[0] / "some.jsonl").write_text((chain[0] / "out/world/preferences.jsonl").read_text())
    with_data = flags("dpo", "out/changed") + " --data some.jsonl"
    process = started("dpo", with_data, chain[0], chain[0] / "out/changed")
    process.kill()
    process.wait()
    with open(chain[0] / "some.jsonl", "a") as f:
        f.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    status, error = inside("dpo", with_data, chain[0])
    assert status == 1 and "(some.jsonl was " in error and error.count("\n") == 1
    assert (chain[0] / "out/changed/resume.safetensors").exists()


def test_a_run_without_its_settings_is_refused(tmp_path):
    a_step(*a_run(tmp_path))
    said = "run.json: not a run's settings .name another --out"
    for text in ("", "{}", "[1]", '{"stage": "ppo.py", "settings": 3, "inputs": {}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            a_run(tmp_path)
