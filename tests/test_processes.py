"""Several processes that fail as one, and start again."""
import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from helpers.start import (
    FLAGS,
    KINDS,
    assert_close,
    command,
    in_float64,
    in_processes,
    misbehave,
    own_lines,
    run_copies,
    torchrun,
)

from runtime import processes


@pytest.mark.parametrize("where, rank, kind", [("update", 1, "fsdp"), *(
    pytest.param(where, rank, kind, marks=pytest.mark.slow)
    for where in ("rollout", "update", "gather", "save") for rank in (0, 1) for kind in KINDS
    if (where, rank, kind) != ("update", 1, "fsdp") and (where, rank) != ("save", 1)
    and (where, kind) != ("gather", "ddp"))])
def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_checkpoint(alone, where, rank, kind):
    """kill -9, and torchrun starts all anew:
    they go on, and end in the weights of a run that was left alone."""
    out = f"out/killed_{where}_{rank}_{kind}"
    flags = f"{FLAGS['ppo']} --parallel {kind} --save_seconds 0 --out {out}"
    done = misbehave(where, "kill", rank, flags, alone, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step" in done.stdout
    assert_close(alone / out, alone / "out/alone/ppo")
    steps = [json.loads(line)["step"] for line in (alone / out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_lives_of_a_job_never_take_a_name_of_dead_processes():
    """Whoever has come and died before, and whoever comes last."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def come(number, after, wait):
        time.sleep(after)
        try:
            return processes.agree_on_a_name(store, number, 3, time.monotonic() + wait)
        except TimeoutError:
            return "too few came"
    with ThreadPoolExecutor(6) as pool:
        dead = [pool.submit(come, number, 0, 0.2) for number in (0, 2)]     # number 1 is killed at its start
        store.set("ticket/1", "of a process that was killed then")
        assert dead[0].result() == "too few came"
        names = {dead[1].result()}
        for last in (0, 1, 2):
            life = [pool.submit(come, number, 0.3 * (number == last), 20) for number in range(3)]
            [name] = {each.result() for each in life}
            assert name not in names
            names.add(name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_two_machines_start_again_after_a_killed_process(alone, rank):
    """Two torchruns of two processes each, which meet over a port."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    out = f"out/two_machines_{rank}"
    flags = f"{FLAGS['ppo']} --parallel fsdp --save_seconds 0 --out {out}"
    arguments = ["update", "kill", str(rank), "ppo.py", *flags.split()]
    start = torchrun(2, "tests/helpers/misbehave.py", arguments, alone, restarts=2)
    meet = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", f"--rdzv_id={port}"]
    start["args"] = [word for a in start["args"] for word in (meet if a == "--standalone" else [a])]
    both = [subprocess.Popen(**start) for _ in range(2)]
    said = [machine.communicate(timeout=300) for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], said
    assert "going on after step" in said[0][0] + said[1][0]
    assert_close(alone / out, alone / "out/alone/ppo")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_raises_ends_the_job_with_its_line(alone, rank):
    began = time.time()
    done = misbehave("update", "raise", rank, f"{FLAGS['ppo']} --out out/raised_{rank}", alone)
    said = ["ppo.py: this process has had enough"]
    assert done.returncode == 1 and own_lines(done.stderr) == said, done.stderr[-3000:]
    assert time.time() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_ends_the_job_within_the_time_limit(alone, rank):
    began = time.time()
    done = misbehave("rollout", "hang", rank, f"{FLAGS['ppo']} --timeout 5 --out out/hung_{rank}", alone)
    [line] = own_lines(done.stderr)
    assert done.returncode == 1 and f"process {1 - rank} has lost another one, or waited 5 s for it" in line
    assert time.time() - began < 90                             # torchrun gives the hanging one 30 s to end


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_nobody_joins_says_so(tmp_path, rank):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    alone = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    start = command("sft", "--timeout 2")
    done = run_copies(start["args"][2:], tmp_path, [start["env"] | alone])
    assert done.returncode == 1
    first = own_lines(done.stderr, "sft.py")[0]
    assert first.startswith("sft.py: the processes did not meet within 2 s (--timeout): "), done.stderr


def test_a_bad_record_is_one_line_for_all_processes(alone):
    (alone / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    arguments = ["--device", "cpu", "--data", "bad.jsonl", "--out", "out/bad"]
    done = in_processes(2, "sft.py", arguments, alone)
    assert done.returncode == 1
    assert own_lines(done.stderr, "sft.py") == [
        'sft.py: bad.jsonl, line 2: field "response" is missing (demonstrations have messages, '
        "conversations, prompt and response or completion, instruction and output, chosen, or prompt, "
        "responses and ranks) (1 of 2 records are malformed)"]


@pytest.mark.slow
@pytest.mark.parametrize("many, few", [(4, 2), (4, 1), (1, 2), (2, 4)])
def test_a_run_saved_by_some_processes_goes_on_with_others(alone, many, few):
    out = f"out/{many}_to_{few}"
    flags = f"{FLAGS['ppo']} --parallel fsdp --save_seconds 0 --out {out}"
    assert misbehave("update", "raise", 0, flags, alone, processes=many).returncode == 1
    assert (alone / out / "resume.safetensors").exists()
    assert "going on after step" in in_float64([f"ppo.py {flags}"], alone, few)
    assert_close(alone / out, alone / "out/alone/ppo")
