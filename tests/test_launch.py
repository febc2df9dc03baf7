"""From the command line to a stage and back: errors in one line."""
import sys
import warnings

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from runtime import launch, processes
from runtime.flags import Training


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory: a lower --micro_batch"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: "
                  "can't allocate memory: you tried"), "out of memory"),
    (OSError(28, "No space left on device"), "out/run: No space left on device"),
    (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory")])
def test_what_a_machine_can_run_out_of_is_one_line(monkeypatch, error, said):
    def train(cfg):
        raise error
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        launch.main(Training, train, "")
    assert e.value.code.startswith(f"stage.py: {said}")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def train(cfg):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    with pytest.raises(RuntimeError, match="shapes"):
        launch.main(Training, train, "")


def test_an_error_that_a_user_can_put_right_is_one_line_and_status_1(monkeypatch):
    def train(cfg):
        raise ValueError("no such thing")
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py"])
    with pytest.raises(SystemExit) as e:
        launch.main(Training, train, "A test.")
    assert e.value.code == "stage.py: no such thing"        # sys.exit of a text: status 1, the text to stderr
    monkeypatch.setattr(sys, "argv", ["stage.py", "--debug"])
    with pytest.raises(ValueError, match="no such thing"):
        launch.main(Training, train, "A test.")


def test_under_torchrun_the_line_is_also_what_torchrun_prints_last(monkeypatch, tmp_path):
    def train(cfg):
        raise ValueError("no such thing")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit):
        launch.main(Training, train, "A test.")
    failure = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    assert failure.message == "stage.py: no such thing"


@pytest.mark.parametrize("first", [True, False])
def test_warnings_are_one_line_each_from_the_first_process_alone(monkeypatch, capsys, first):
    def train(cfg):
        monkeypatch.setattr(processes, "is_first", lambda: first)
        warnings.warn("a text\n  of two lines")
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    launch.main(Training, train, "A test.")
    assert capsys.readouterr().err == "script.py: warning: a text of two lines\n" * first
