# Everything a person does here. `make help` lists it.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m jepa_lightning
READY := .venv/.ready
# For `make ijepa` and `make iwm`, images that are there already: make ijepa DATA="--data.root DIR"
DATA ?=
# For `make mutate`: files, and how many mutants in all (0 for every one)
MODULES ?=
SAMPLE ?=

.PHONY: help install demo pendulum coordinates plan ijepa iwm test campaign mutate check format benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with the tested versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Choose one with make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train and judge the pendulum JEPA: 5 to 10 minutes on 2 CPU cores, into runs/demo
	$(RUN) fit --config configs/demo.yaml
	$(RUN) fit --config configs/demo_decoder.yaml
	$(RUN) fit --config configs/demo_state.yaml --trainer.default_root_dir runs/demo/state
	$(RUN) test --config configs/demo_state.yaml --ckpt_path runs/demo/state/checkpoints/last.ckpt

pendulum: $(READY) ## the full run from pixels and its report, into runs/pendulum
	$(RUN) fit --config configs/pendulum.yaml
	$(RUN) fit --config configs/pendulum_decoder.yaml
	$(RUN) fit --config configs/pendulum_state.yaml --trainer.default_root_dir runs/pendulum/state
	$(RUN) test --config configs/pendulum_state.yaml --ckpt_path runs/pendulum/state/checkpoints/last.ckpt

coordinates: $(READY) ## the full run from coordinates and its report, into runs/pendulum_coordinates
	$(RUN) fit --config configs/pendulum_coordinates.yaml
	$(RUN) fit --config configs/pendulum_coordinates_decoder.yaml
	$(RUN) fit --config configs/pendulum_coordinates_state.yaml --trainer.default_root_dir runs/pendulum_coordinates/state
	$(RUN) test --config configs/pendulum_coordinates_state.yaml --ckpt_path runs/pendulum_coordinates/state/checkpoints/last.ckpt

plan: $(READY) ## a world model of the actuated pendulum, trained (unless it is there) and put to use: 16 minutes on 2 CPU cores, into runs/plan
	$(RUN) fit --config configs/pendulum_actions.yaml --ckpt_path auto
	$(RUN) fit --config configs/state_decoder.yaml
	$(RUN) test --config configs/planning.yaml

ijepa: $(READY) ## I-JEPA on CIFAR-10 (downloaded) without a GPU: an hour and a half on one CPU core, into runs/ijepa_cifar10_cpu
	$(RUN) fit --config configs/ijepa_cifar10_cpu.yaml $(DATA)
	$(RUN) fit --config configs/ijepa_cifar10_linear.yaml $(DATA)
	$(RUN) test --config configs/ijepa_cifar10_linear.yaml --ckpt_path runs/ijepa_cifar10_cpu/linear/checkpoints/last.ckpt $(DATA)
	$(RUN) test --config configs/ijepa_cifar10_knn.yaml $(DATA)
	$(RUN) fit --config configs/ijepa_cifar10_completion.yaml $(DATA)
	$(RUN) test --config configs/ijepa_cifar10_completion.yaml --ckpt_path runs/ijepa_cifar10_cpu/completion/checkpoints/last.ckpt $(DATA)

iwm: $(READY) ## IWM on CIFAR-10 (downloaded) without a GPU, into runs/iwm_cifar10_cpu
	$(RUN) fit --config configs/iwm_cifar10_cpu.yaml $(DATA)
	$(RUN) test --config configs/iwm_cifar10_equivariance.yaml $(DATA)
	$(RUN) fit --config configs/iwm_cifar10_predictor.yaml $(DATA)
	$(RUN) test --config configs/iwm_cifar10_predictor.yaml --ckpt_path runs/iwm_cifar10_cpu/predictor/checkpoints/last.ckpt $(DATA)
	$(RUN) fit --config configs/iwm_cifar10_completion.yaml $(DATA)
	$(RUN) test --config configs/iwm_cifar10_completion.yaml --ckpt_path runs/iwm_cifar10_cpu/completion/checkpoints/last.ckpt $(DATA)

test: $(READY) ## run every test
	$(BIN)/python -m pytest -q -n auto

campaign: $(READY) ## cut 159 runs in every way, resume them, and compare them bit for bit: 25 minutes on 2 CPU cores
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

mutate: .venv/.mutation ## which small changes of the code no test sees: all modules of mutation.toml, or MODULES="FILE ..." SAMPLE=N
	$(BIN)/python benchmarks/mutation.py $(MODULES) $(if $(SAMPLE),--sample $(SAMPLE))

.venv/.mutation: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutation]'
	@touch $@

check: $(READY) ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(READY) ## speed beside plain references
	$(BIN)/python benchmarks/pendulum_data.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/ijepa.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/scan.py

clean: ## remove the environment and all runs
	rm -rf .venv runs
