"""Which files a run reads, and their checksums."""
import os
from types import SimpleNamespace

from runtime import inputs
from runtime.files import write_json


def test_named_files_are_those_that_a_run_depends_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/world/prompts.jsonl", "out/world/tokenizer.json", "out/world/run.json",
                 "model/model.safetensors", "model/metrics.jsonl", "data.jsonl", "mine/model.safetensors",
                 "scores/model.safetensors", "program.py"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").write(name)
    os.mkdir("adapters")
    write_json("adapters/adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2, "task_type": "",
                                                "base_model_name_or_path": "model"})
    write_json("adapter_config.json", {})                       # beside the script, where no flag points
    cfg = SimpleNamespace(out="mine", data="out/world", init="adapters", more="data.jsonl", none="", n=3,
                          word="cosine", sum="0.5*scores,-1*program.py:words")
    found = inputs.fingerprints(cfg)
    assert list(found) == ["adapters/adapter_config.json", "data.jsonl", "model/model.safetensors",
                           "out/world/prompts.jsonl", "out/world/tokenizer.json", "program.py",
                           "scores/model.safetensors"]
    assert len(set(found.values())) == 7
    open("model/model.safetensors", "a").write(".")
    changed = {name for name, checksum in inputs.fingerprints(cfg).items() if checksum != found[name]}
    assert changed == {"model/model.safetensors"}


def test_several_processes_read_each_file_once_and_to_its_end(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(os.urandom(9 << 20))       # more than is read at once
    cfg, sent = SimpleNamespace(data=str(tmp_path)), []
    alone = inputs.fingerprints(cfg)
    for rank in range(2):
        with monkeypatch.context() as process:
            process.setattr(inputs, "rank", lambda: rank)
            process.setattr(inputs, "world_size", lambda: 2)
            process.setattr(inputs, "gather", lambda x: sent.append(x) or sent)
            together = inputs.fingerprints(cfg)
    assert sorted(map(len, sent)) == [1, 2] and together == alone and list(together) == list(alone)
    content = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = inputs.fingerprints(cfg)
    assert [name for name in alone if changed[name] != alone[name]] == [str(tmp_path / "b.jsonl")]
