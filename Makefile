# make demo   the whole of RLHF on the embedded world, then the report   (minutes on two CPU cores)
# make test   the fast tests
# make proofs   the slow ones: kills at random moments, fuzzing, planted mistakes   (about an hour)
# make real DATA=preferences.json   SFT, reward model and DPO on real text
# Both set up .venv with the pinned requirements first. PYTHON=python3.12 make demo takes another interpreter;
# SEED=1 make demo another seed, for the world, the weights and the sampling.
PYTHON ?= python3
PY = .venv/bin/python
SEED ?= 0

.PHONY: demo test proofs real clean

demo: .venv/ready
	rm -rf out/world out/sft out/reward_model out/dpo out/ppo out/ppo_no_kl
	$(PY) -m data --seed $(SEED)
	$(PY) sft.py --seed $(SEED)
	$(PY) reward_model.py --seed $(SEED)
	$(PY) dpo.py --seed $(SEED)
	$(PY) ppo.py --seed $(SEED)
	$(PY) ppo.py --kl_coef 0 --no-adaptive_kl --steps 44 --out out/ppo_no_kl --seed $(SEED)
	$(PY) evaluate.py --seed $(SEED)

# The same stages on real text with GPT-2's tokenizer: make real DATA=some_preferences.json
real: .venv/ready
	$(PY) sft.py --data $(DATA) --tokenizer gpt2 --block_size 512 --epochs 3 --lr 1e-3 --out out/real/sft
	$(PY) reward_model.py --data $(DATA) --init out/real/sft --out out/real/reward_model --epochs 2
	$(PY) dpo.py --data $(DATA) --init out/real/sft --out out/real/dpo --records 0

test: .venv/ready
	$(PY) -m pytest -q

proofs: .venv/ready
	$(PY) -m pytest -q -m slow
	$(PY) tests/mutations.py

clean:
	rm -rf out

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8' 'pytest>=8' 'hypothesis>=6.100'
	touch $@
