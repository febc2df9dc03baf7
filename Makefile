# make demo     the whole of RLHF on the embedded world, then the report   (minutes on two CPU cores)
# make seeds    the same for three seeds, and the README's table of them
# make test     the fast tests, and ruff
# make quick    only the tests of the losses and the known answers         (half a minute)
# make proofs   the slow tests: kills at random moments, fuzzing, planted mistakes   (over an hour)
# make real DATA=preferences.json     SFT, reward model and DPO on real text
#
# All of them set up .venv with the pinned requirements first. PYTHON=python3.12 make demo takes another interpreter;
# SEED=1 make demo takes another seed, for the world, the weights and the sampling.
PYTHON ?= python3
PY = .venv/bin/python
SEED ?= 0

.PHONY: demo seeds test quick proofs real clean

demo: .venv/ready
	rm -rf out/world out/sft out/reward_model out/dpo out/ppo out/ppo_no_kl
	$(PY) -m data --seed $(SEED)
	$(PY) sft.py --seed $(SEED)
	$(PY) reward_model.py --seed $(SEED)
	$(PY) dpo.py --seed $(SEED)
	$(PY) ppo.py --seed $(SEED)
	$(PY) ppo.py --kl_coef 0 --no-adaptive_kl --steps 44 --out out/ppo_no_kl --seed $(SEED)
	$(PY) evaluate.py --seed $(SEED)

seeds: .venv/ready
	mkdir -p out/seeds
	for seed in 0 1 2; do $(MAKE) demo SEED=$$seed && cp out/report.json out/seeds/$$seed.json || exit 1; done
	$(PY) docs/seeds.py out/seeds/0.json out/seeds/1.json out/seeds/2.json

# The same stages on real text with GPT-2's tokenizer: make real DATA=some_preferences.json
real: .venv/ready
	$(PY) sft.py --data $(DATA) --tokenizer gpt2 --block_size 512 --epochs 3 --lr 1e-3 --out out/real/sft
	$(PY) reward_model.py --data $(DATA) --init out/real/sft --out out/real/reward_model --epochs 2
	$(PY) dpo.py --data $(DATA) --init out/real/sft --out out/real/dpo --records 0

test: .venv/ready
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

quick: .venv/ready
	$(PY) -m pytest -q -k "not plain_loop" tests/test_sft.py tests/test_reward_model.py tests/test_ppo.py \
	    tests/test_dpo.py tests/test_choices.py tests/test_known_answers.py

proofs: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow -n 2 --dist loadfile
	$(PY) tests/helpers/mistakes.py

clean:
	rm -rf out

.venv/ready: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8' 'ruff>=0.6' \
	    'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6.100'
	touch $@
