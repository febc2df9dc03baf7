"""Talking to a model."""
import io

import pytest
from helpers.start import script

from lab import chat


def test_a_pipe_is_shown_with_its_questions(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of Peru?\n\nAnd Italy?\n"))
    chat.chat(chat.Config(models=("out/sft",), max_new_tokens=3, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "you> What is the capital of Peru?" and lines[2].startswith("sft> ")
    assert lines[3] == "you> " and lines[4] == "you> And Italy?" and lines[5].startswith("sft> ")


def test_a_conversation_that_no_longer_fits_starts_anew(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of Peru?\n" * 9))
    chat.chat(chat.Config(models=("out/sft",), device="cpu"))
    printed = capsys.readouterr().out
    assert printed.count("a new conversation starts)") == 9 - printed.count("sft> ") > 0


def test_nobody_talks_to_a_reward_model(trained):
    with pytest.raises(ValueError, match="out/reward_model is a reward model: it gives scores, not answers"):
        chat.chat(chat.Config(models=("out/reward_model",), device="cpu"))


def test_chat_answers_several_turns(chain):
    questions = "What is the capital of Peru?\nAnd Italy?\n\n"
    done = script("lab.chat", "out/sft --device cpu --max_new_tokens 8", chain[0], questions)
    assert done.returncode == 0 and done.stdout.count("sft> ") == 2, done.stdout + done.stderr
