"""A whole tiny chain through the command lines: every stage runs, writes what it says,
and refuses what it cannot use."""
import json
import os
import subprocess
import sys

import pytest
from helpers.start import ROOT, script


@pytest.mark.parametrize("stage, names", [
    ("sft", "loss held_out_loss perplexity grad_norm lr"),
    ("reward_model", "loss grad_norm lr"),
    ("dpo", "loss accuracy margin reward_chosen reward_rejected logp_chosen logp_rejected"),
    ("ppo", "score kl kl_coef judge entropy clip_fraction value_clip_fraction approx_kl explained_variance "
            "length ended seconds")])
def test_each_stage_logs_one_line_a_step_with_what_a_person_watches(chain, stage, names):
    with open(chain[0] / f"out/{stage}/metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert set(names.split()) <= set().union(*lines)        # the held-out loss is not measured at every step


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo"])
def test_each_stage_leaves_a_whole_checkpoint_and_its_settings(chain, stage):
    files = set(os.listdir(chain[0] / f"out/{stage}"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl",
            "run.json"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    about = json.loads((chain[0] / f"out/{stage}/run.json").read_text())
    assert about["settings"]["seed"] == 0 and about["seconds"] > 0


def test_the_report_holds_every_model_with_every_number(chain):
    report = json.loads((chain[0] / "out/report.json").read_text())
    assert list(report["models"]) == ["sft", "best_of_n", "dpo", "ppo"]
    numbers = {"judge", "reward", "win_rate", "win_rate_interval", "kl", "length", "ended", "distinct2",
               "sft_loss"}
    for model in report["models"].values():
        assert numbers <= set(model)
    assert report["models"]["sft"]["win_rate"] == 0.5 and abs(report["models"]["sft"]["kl"]) < 1e-4
    assert 0.5 < report["reward_model"]["ceiling"] < 1 and 0 <= report["reward_model"]["accuracy"] <= 1
    assert {"sft", "reward_model", "dpo", "ppo", "evaluate", "total"} <= set(report["seconds"])
    assert "| ppo |" in (chain[0] / "out/report.md").read_text()


def test_the_reward_model_reports_calibration_and_accuracy_by_length(chain):
    printed = chain[1]["reward_model"]
    assert "calibration" in printed and "accuracy_same_length" in printed
    assert "SFT samples now have mean 0" in printed


def test_a_report_goes_to_a_folder_that_is_not_there_yet(chain):
    flags = "out/sft --samples 1 --best_of 0 --max_new_tokens 4 --show 0 --out out/new/place"
    done = script("evaluate", flags, chain[0])
    assert done.returncode == 0 and (chain[0] / "out/new/place/report.json").exists(), done.stderr


@pytest.mark.parametrize("stage, first", [
    ("reward_model", "sft.py"), ("ppo", "sft.py"), ("dpo", "sft.py"), ("evaluate", "sft.py")])
def test_a_stage_without_its_input_says_what_to_run_first(tmp_path, stage, first):
    done = script(stage, "", tmp_path)
    assert done.returncode == 1 and first in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_data_can_be_read_from_the_command_line():
    command = [sys.executable, "-m", "data", "--show", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("=== ") == 10 and "judge" in done.stdout, done.stderr


def test_a_bad_record_stops_the_run_before_it_trains(chain):
    bad = chain[0] / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    done = script("sft", f"--data {bad} --out out/bad", chain[0])
    assert done.returncode == 1 and 'line 2: field "response" is missing' in done.stderr
    assert not (chain[0] / "out/bad").exists()


def test_a_flag_out_of_range_is_refused_with_the_range(tmp_path):
    done = script("ppo", "--gamma 1.5", tmp_path)
    assert done.returncode == 2 and "must be in [0, 1]" in done.stderr


def test_another_seed_trains_other_weights(chain):
    for seed in (0, 1):
        assert script("dpo", f"--out out/{seed} --seed {seed}", chain[0]).returncode == 0
    a, b = ((chain[0] / f"out/{seed}/model.safetensors").read_bytes() for seed in (0, 1))
    assert len({a, b, (chain[0] / "out/sft/model.safetensors").read_bytes()}) == 3
