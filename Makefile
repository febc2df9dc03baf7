# make demo     the whole of RLHF on the embedded world, then the report   (minutes on two CPU cores)
#               it goes on where it was stopped; FRESH=1 make demo runs everything again
# make seeds    the same for three seeds, and the README's table of them
# make loop     three rounds: sample from the policy, label, learn, again; and one round with as many labels
# make methods  PPO, RLOO, GRPO, DPO and others on three seeds, and a table of them   (40 minutes)
# make lab      a policy that hacks its reward model, seven defences, and the laws of over-optimisation (12 minutes)
# make exercise NAME=gae        a copy without that function, to be written: docs/exercises.md
# make grade    what holds of it, and what does not yet
# make test     the fast tests, and ruff
# make capabilities    the tests that compare with plain loops, under each of the processor's vector instructions
# make quick    only the tests of losses, the exact policy gradient and flags      (14 seconds)
# make proofs   the slow tests: kills at random moments, fuzzing, planted mistakes   (about an hour)
# make real MODEL=folder DATA=preferences.json     reward model, DPO and PPO with LoRA on a real chat model
# make follow MODEL=folder DATA=preferences.json IFEVAL=input_data.jsonl    a chat model learns to keep rules that
#               a program can check; METHOD=grpo in place of PPO; EVERY=1 for the whole benchmark;
#               QUALITY=0 gives the reward model's term no weight
# make follow-all MODEL=... DATA=... IFEVAL=...    three seeds of both, on the whole benchmark (hours)
# make scratch DATA=preferences.json     SFT, reward model and DPO on real text, from nothing
# make bench                    beside TRL, transformers and peft, in an environment of its own: bench/README.md
#
# All of them set up .venv with the pinned requirements first. PYTHON=python3.12 make demo takes another interpreter;
# SEED=1 OUT=out/demo1 make demo takes another seed, for the world, the weights and the sampling, and another folder.
PYTHON ?= python3
PY = .venv/bin/python
SEED ?= 0
OUT ?= out/demo

.PHONY: demo seeds loop methods lab exercise grade test capabilities quick proofs real follow follow-all scratch bench clean

demo: .venv/ready
	@$(PY) demo.py --seed $(SEED) --out $(OUT) $(if $(FRESH),--overwrite)

seeds: .venv/ready
	for seed in 0 1 2; do $(PY) demo.py --seed $$seed --out out/seeds/$$seed || exit 1; done
	$(PY) -m lab.seeds out/seeds/0/report.json out/seeds/1/report.json out/seeds/2/report.json

ROUNDS ?= 3
loop: .venv/ready
	$(PY) -m feedback.rounds --rounds $(ROUNDS) --seed $(SEED)
	$(PY) -m feedback.rounds --rounds 1 --labels 3000 --seed $(SEED) --out out/once

methods: .venv/ready
	$(PY) -m lab.methods

lab: .venv/ready
	$(PY) -m lab.hacking --seed $(SEED)

exercise: .venv/ready
	@$(PY) docs/exercise.py $(NAME)

grade: .venv/ready
	@$(PY) tests/helpers/grade.py

LORA = --data $(DATA) --init $(MODEL) --lora_rank 16 --lora_alpha 32 --precision $(FAST)
real: .venv/ready
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo "make real needs MODEL=folder and DATA=file"; exit 2; }
	$(PY) reward_model.py $(LORA) --epochs 2 --lr 3e-4 --no-merge --out out/real/reward_model
	$(PY) dpo.py $(LORA) --epochs 2 --lr 3e-4 --batch 8 --beta 0.5 --nll_coef 1 --out out/real/dpo
	$(PY) ppo.py $(LORA) --reward out/real/reward_model --steps 40 --batch 32 --max_new_tokens 64 --lr 1.5e-4 \
	    --critic_lr 2e-4 --kl_coef 0.2 --kl_target 6 --kl_horizon 300 --out out/real/ppo
	$(PY) evaluate.py $(MODEL) out/real/dpo out/real/ppo --data $(DATA) --demonstrations $(DATA) --best_of 0 \
	    --reward out/real/reward_model --judge out/real/reward_model --samples 1 --show 10 \
	    --precision $(FAST) --out out/real

# bfloat16 is faster than float32 on processors with AMX, and on AMD's with AVX-512. On an Intel Xeon with AVX-512
# and without AMX it took twice as long.
CPUINFO ?= /proc/cpuinfo
FAST = $(if $(shell grep -sm1 amx_bf16 $(CPUINFO) || { grep -qs AMD $(CPUINFO) && grep -sm1 avx512_bf16 $(CPUINFO); \
    }),bfloat16,auto)
ADAPT = --lora_rank 16 --lora_alpha 32 --micro_batch 8 --micro_tokens 1000 --precision $(FAST)
METHOD ?= ppo
EVERY ?= 3
QUALITY ?= 0.1
FOLLOW_ppo = ppo.py --steps 24 --batch 64 --lr 5e-4 --critic_lr 1e-3 --lam 1
FOLLOW_grpo = -m variants.grpo --steps 30 --batch 64 --lr 5e-4 --group 8 --no-divide_by_std
FOLLOW_downsample = -m variants.downsample --steps 45 --batch 32 --minibatches 1 --lr 7e-4 --group 4 \
    --no-divide_by_std --select lab/follow.py:kept --sample_batch 64
F = out/follow
S = $(F)/seed$(SEED)
RL = $(METHOD)$(if $(filter-out 0.1,$(QUALITY)),_quality_$(QUALITY))
follow: .venv/ready
	@test -n "$(MODEL)" -a -n "$(DATA)" -a -f "$(IFEVAL)" -a -n "$(FOLLOW_$(METHOD))" || \
	    { echo "make follow needs MODEL=folder, DATA=file and IFEVAL=file; METHOD is ppo, grpo or downsample"; exit 2; }
	$(PY) -m lab.follow --model $(MODEL) --data $(DATA) --precision $(FAST)
	$(PY) reward_model.py $(ADAPT) --init $(MODEL) --data $(F)/preferences.jsonl --lr 5e-4 --normalize 64 \
	    --out $(F)/reward_model
	$(PY) sft.py $(ADAPT) --init $(MODEL) --data $(F)/demonstrations.jsonl \
	    --held_out $(F)/demonstrations_heldout.jsonl --batch 8 --lr 2e-3 --warmup 10 --evals 1 --seed $(SEED) \
	    --out $(S)/sft
	$(PY) $(FOLLOW_$(METHOD)) $(ADAPT) --init $(S)/sft --data $(F)/prompts.jsonl \
	    --reward lab/follow.py:kept,$(QUALITY)*lab/follow.py:Quality --epochs 1 --max_new_tokens 112 \
	    --temperature 0.8 --warmup 1 --kl_coef 0.02 --no-adaptive_kl --no_end_score -0.5 \
	    --seed $(SEED) --out $(S)/$(RL)
	$(PY) -m lab.ifeval $(S)/sft $(S)/$(RL) --data $(F)/prompts_heldout.jsonl --precision $(FAST) \
	    --out $(S)/own_$(RL)
	$(PY) -m lab.ifeval $(S)/sft $(S)/$(RL) --data $(F)/prompts_new_kinds.jsonl --precision $(FAST) \
	    --out $(S)/new_kinds_$(RL)
	$(PY) -m lab.ifeval $(MODEL) $(S)/sft $(S)/$(RL) --data $(IFEVAL) --every $(EVERY) --precision $(FAST) \
	    --out $(S)/ifeval_$(RL)_$(EVERY)

follow-all:
	for seed in 0 1 2; do for method in ppo grpo; do \
	    $(MAKE) follow EVERY=1 SEED=$$seed METHOD=$$method || exit 1; done; done
	$(PY) -m lab.ifeval $(foreach seed,0 1 2,$(foreach method,ppo grpo,$(F)/seed$(seed)/ifeval_$(method)_1/ifeval.json)) \
	    --data $(IFEVAL) --show 0 --out $(F)/all

scratch: .venv/ready
	@test -n "$(DATA)" || { echo "make scratch needs DATA=file"; exit 2; }
	$(PY) sft.py --data $(DATA) --tokenizer gpt2 --block_size 512 --epochs 3 --lr 1e-3 --out out/scratch/sft
	$(PY) reward_model.py --data $(DATA) --init out/scratch/sft --out out/scratch/reward_model --epochs 2 --lr 5e-4
	$(PY) dpo.py --data $(DATA) --init out/scratch/sft --batch 8 --lr 5e-4 --beta 0.5 --nll_coef 2 --out out/scratch/dpo

test: .venv/ready
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

capabilities: .venv/ready
	$(PY) tests/helpers/capabilities.py

quick: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -k "not (plain_loop or reaches or recovers or ends_at_the_margin)" \
	    tests/test_formulas.py tests/test_sft.py tests/test_reward_model.py tests/test_ppo.py tests/test_dpo.py \
	    tests/test_choices.py tests/test_known_answers.py

proofs: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow -n 2 --dist loadfile
	$(PY) tests/helpers/mistakes.py

bench: bench/.venv/ready
	bench/.venv/bin/python -m bench

clean:
	rm -rf out

.venv/ready: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8' 'ruff>=0.6' \
	    'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6.100'
	touch $@

bench/.venv/ready: bench/requirements.txt
	$(PYTHON) -m venv bench/.venv
	bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	touch $@
