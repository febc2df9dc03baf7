"""The same task with TRL, transformers and peft: python -m bench.theirs TASK PRECISION FOLDER REPEATS."""
import json
import os
import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.shapes import PROMPT, TASKS
from runtime.run import peak_memory


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_train_begin(self, *_, **__):
        self.last = time.time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.time() - self.last)
        self.last = time.time()


def random_text(n):
    return "".join(map(chr, torch.randint(97, 123, (n,)).tolist()))


def load(folder, head, dtype):
    kind = {"lm": AutoModelForCausalLM, "scalar": AutoModelForSequenceClassification}[head]
    return kind.from_pretrained(f"{folder}/{head}", dtype=dtype)


def lora(task, kind):
    if task.lora_rank == 0:
        return None
    return LoraConfig(r=task.lora_rank, lora_alpha=32, target_modules="all-linear", task_type=kind)


def common(folder, precision):
    return dict(output_dir=f"{folder}/theirs", report_to="none", save_strategy="no", logging_strategy="no",
                bf16=precision != "float32", use_cpu=True, disable_tqdm=True, learning_rate=1e-5,
                gradient_checkpointing=False)


def run_ppo(task, folder, precision, dtype, repeats):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/lm", padding_side="left")
    args = PPOConfig(per_device_train_batch_size=task.rows, gradient_accumulation_steps=1, num_mini_batches=1,
                     num_ppo_epochs=task.epochs, total_episodes=task.rows * repeats,
                     response_length=task.answer,
                     local_rollout_forward_batch_size=task.rows, temperature=1.0, num_sample_generations=0,
                     stop_token_id=tokenizer.eos_token_id if task.uneven else None,
                     **common(folder, precision))
    rows = [{"input_ids": tokenizer(random_text(PROMPT)).input_ids} for _ in range(task.rows * repeats)]
    clock = Clock()
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=load(folder, "lm", dtype),
        ref_model=None if task.lora_rank else load(folder, "lm", dtype),
        reward_model=load(folder, "scalar", dtype), value_model=load(folder, "scalar", dtype),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        callbacks=[clock], peft_config=lora(task, "CAUSAL_LM"))
    trainer.train()
    return clock.seconds


def run_dpo(task, folder, precision, dtype, repeats):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/lm")
    args = DPOConfig(per_device_train_batch_size=task.rows, max_steps=repeats,
                     max_length=PROMPT + task.answer, **common(folder, precision))
    rows = [{"prompt": random_text(PROMPT), "chosen": random_text(task.answer - 1),
             "rejected": random_text(task.answer - 1)} for _ in range(task.rows * repeats)]
    clock = Clock()
    trainer = DPOTrainer(
        model=load(folder, "lm", dtype), ref_model=None if task.lora_rank else load(folder, "lm", dtype),
        args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), callbacks=[clock],
        peft_config=lora(task, "CAUSAL_LM"))
    trainer.train()
    return clock.seconds


def run_sample(task, folder, precision, dtype, repeats):
    model, seconds = load(folder, "lm", dtype).eval(), []
    for _ in range(repeats):
        ids = torch.randint(0, 256, (task.rows, PROMPT))
        began = time.time()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                                   max_new_tokens=task.answer, min_new_tokens=task.answer)
        seconds.append(time.time() - began)
        assert found.shape[1] == PROMPT + task.answer
    return seconds


if __name__ == "__main__":
    name, precision, folder, repeats = sys.argv[1:]
    task, said = TASKS[name], sys.stdout
    sys.stdout = open(os.devnull, "w")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    work = {"ppo": run_ppo, "dpo": run_dpo, "sample": run_sample}[task.kind]
    seconds = work(task, folder, precision, dtype, int(repeats))
    print(json.dumps({"seconds": seconds, "peak": peak_memory("cpu")}), file=said)
