# make demo   the whole of RLHF on the embedded world, then the report   (minutes on two CPU cores)
# make test   the fast tests
# Both set up .venv with the pinned requirements first. PYTHON=python3.12 make demo takes another interpreter.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test test-slow real clean

# Stages that do not need each other run side by side, each on half of the cores; the second one's lines go to a log.
HALF = OMP_NUM_THREADS=$(shell $(PYTHON) -c "import os; print(max(1, (os.cpu_count() or 2) // 2))")
define side_by_side
	@echo "$(PY) $(2) > $(3).log &"
	@$(HALF) $(PY) $(2) > $(3).log 2>&1 & \
	echo "$(PY) $(1)"; $(HALF) $(PY) $(1) && { wait $$! || { cat $(3).log; exit 1; }; }
endef

demo: .venv/ready
	rm -rf out/world out/sft out/reward_model out/dpo out/ppo out/ppo_no_kl
	$(PY) -m data
	$(PY) sft.py
	$(call side_by_side,reward_model.py,dpo.py,out/dpo)
	$(call side_by_side,ppo.py,ppo.py --kl_coef 0 --no-adaptive_kl --out out/ppo_no_kl,out/ppo_no_kl)
	$(PY) evaluate.py

test: .venv/ready
	$(PY) -m pytest -q

test-slow: .venv/ready
	$(PY) -m pytest -q -m slow

clean:
	rm -rf out

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8' 'pytest>=8' 'hypothesis>=6.100'
	touch $@
