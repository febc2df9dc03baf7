"""Talk to a checkpoint in the terminal.

    python -m lab.chat out/ppo                  an empty line starts a new conversation, Ctrl-D ends
"""
import itertools
import os
import sys
from dataclasses import dataclass

from evaluate import Sampler, Sampling
from runtime.flags import flag
from runtime.launch import main


@dataclass
class Config(Sampling):
    models: tuple = flag(("out/ppo",), "checkpoint folder; further ones are not used")


def chat(cfg):
    folder, messages = cfg.models[0], []
    sampler = Sampler(cfg, [folder])
    model, name = sampler.load(folder), os.path.basename(os.path.normpath(folder))
    print(f"talking to {folder}; an empty line starts a new conversation, Ctrl-D ends")
    for turn in itertools.count():
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():                                  # unlike a terminal, a pipe shows no input
            print(text)
        messages.append({"role": "user", "content": text})
        room = model.config.block_size - len(sampler.tokenizer.prompt(messages))
        if text and room < 1:
            print("(this is longer than the model can read: a new conversation starts)")
        if not text or room < 1:
            messages = []
            continue
        answer = sampler.sample(model, [messages], turn, min(cfg.max_new_tokens, room))
        messages.append({"role": "assistant", "content": sampler.texts(answer)[0]})
        print(f"{name}> {messages[-1]['content']}")


if __name__ == "__main__":
    main(Config, chat, __doc__)
