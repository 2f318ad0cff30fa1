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

.PHONY: help install demo images coordinates plan room lab lab-model lab-images ijepa iwm test campaign mutate check docs format benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with the tested versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Choose one with make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train and evaluate the pendulum JEPA: 5 to 10 minutes on 2 CPU cores, into runs/demo
	$(RUN) fit --config configs/pendulum/demo.yaml
	$(RUN) fit --config configs/probes/decoder.yaml --model.checkpoint runs/demo --trainer.accelerator cpu
	$(RUN) fit --config configs/probes/state.yaml --model.checkpoint runs/demo --model.decoder runs/demo/decoder --trainer.accelerator cpu
	$(RUN) test --config configs/probes/state.yaml --model.checkpoint runs/demo --ckpt_path runs/demo/state --data.test_size 500 --trainer.default_root_dir runs/demo --trainer.accelerator cpu

images: $(READY) ## the full pendulum run from images and its report, into runs/pendulum
	$(RUN) fit --config configs/pendulum/images.yaml
	$(RUN) fit --config configs/probes/decoder.yaml --model.checkpoint runs/pendulum --model.width 16 --trainer.max_epochs 12
	$(RUN) fit --config configs/probes/state.yaml --model.checkpoint runs/pendulum --model.decoder runs/pendulum/decoder --model.num_steps 4000 --data.size 4000
	$(RUN) test --config configs/probes/state.yaml --model.checkpoint runs/pendulum --ckpt_path runs/pendulum/state --trainer.default_root_dir runs/pendulum

coordinates: $(READY) ## the full pendulum run from coordinates and its report, into runs/pendulum_coordinates
	$(RUN) fit --config configs/pendulum/coordinates.yaml
	$(RUN) fit --config configs/probes/decoder.yaml --model.checkpoint runs/pendulum_coordinates --model.width 256 --trainer.max_epochs 10
	$(RUN) fit --config configs/probes/state.yaml --model.checkpoint runs/pendulum_coordinates --model.decoder runs/pendulum_coordinates/decoder --model.num_steps 4000 --data.size 4000
	$(RUN) test --config configs/probes/state.yaml --model.checkpoint runs/pendulum_coordinates --ckpt_path runs/pendulum_coordinates/state --trainer.default_root_dir runs/pendulum_coordinates

plan: $(READY) ## a world model of the actuated pendulum, trained (unless it is there) and planned with: 16 minutes on 2 CPU cores, into runs/plan
	$(RUN) fit --config configs/pendulum/actuated.yaml --ckpt_path auto
	$(RUN) fit --config configs/probes/image_decoder.yaml --model.checkpoint runs/plan --data.size 20000 --data.clip_length 23 --trainer.default_root_dir runs/plan/decoder
	$(RUN) test --config configs/probes/planning.yaml --model.checkpoint runs/plan --model.decoder runs/plan/decoder/checkpoints/best.ckpt --trainer.default_root_dir runs/plan

room: .venv/.swm ## a world model of stable-worldmodel's TwoRoom: collect, train, plan; 6 minutes on 2 CPU cores and 0.6 GB of packages, into runs/tworoom
	$(RUN) fit --config configs/worlds/tworoom.yaml --ckpt_path auto --trainer.accelerator cpu
	$(BIN)/python -m jepa_lightning.harness runs/tworoom
	$(RUN) test --config configs/probes/goals.yaml --config configs/overlays/tworoom_goals.yaml --model.checkpoint runs/tworoom --trainer.accelerator cpu

.venv/.swm: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,swm]'
	@touch $@

lab: $(READY) ## the three notebooks of docs/lab as scripts, one after the other: 5 minutes on one CPU core, figures into runs/lab
	MPLBACKEND=agg $(BIN)/python docs/lab/1_learn.py
	MPLBACKEND=agg $(BIN)/python docs/lab/2_collapse.py
	MPLBACKEND=agg $(BIN)/python docs/lab/3_plan.py

lab-model: $(READY) ## train the world model that the lab plans with anew, into docs/lab/world_model.ckpt
	$(RUN) fit --config configs/pendulum/actuated.yaml --model.predictor_width 256 --trainer.accelerator cpu --trainer.default_root_dir runs/lab/world_model
	$(BIN)/python docs/lab/make_world_model.py runs/lab/world_model docs/lab/world_model.ckpt

lab-images: lab ## the lab, and its figures of the front page into docs/images
	cp runs/lab/collapse.png runs/lab/plan.gif docs/images/

ijepa: $(READY) ## I-JEPA on CIFAR-10 (downloaded) without a GPU: an hour and a half on one CPU core, into runs/ijepa_cifar10_cpu
	$(RUN) fit --config configs/ijepa/cifar10_cpu.yaml $(DATA)
	$(RUN) fit --config configs/probes/linear.yaml --model.checkpoint runs/ijepa_cifar10_cpu
	$(RUN) test --config configs/probes/linear.yaml --model.checkpoint runs/ijepa_cifar10_cpu --ckpt_path last
	$(RUN) test --config configs/probes/knn.yaml --model.checkpoint runs/ijepa_cifar10_cpu
	$(RUN) fit --config configs/probes/completion.yaml --model.checkpoint runs/ijepa_cifar10_cpu
	$(RUN) test --config configs/probes/completion.yaml --model.checkpoint runs/ijepa_cifar10_cpu --ckpt_path last

iwm: $(READY) ## IWM on CIFAR-10 (downloaded) without a GPU, into runs/iwm_cifar10_cpu and runs/iwm_frozen
	$(RUN) fit --config configs/iwm/cifar10_cpu.yaml $(DATA)
	$(RUN) fit --config configs/iwm/cifar10_cpu.yaml --config configs/overlays/frozen_encoder.yaml --init_from runs/iwm_cifar10_cpu $(DATA)
	$(RUN) test --config configs/probes/equivariance.yaml --model.checkpoint runs/iwm_frozen
	$(RUN) fit --config configs/probes/predictor_finetuning.yaml --model.checkpoint runs/iwm_cifar10_cpu
	$(RUN) test --config configs/probes/predictor_finetuning.yaml --model.checkpoint runs/iwm_cifar10_cpu --ckpt_path last
	$(RUN) fit --config configs/probes/completion.yaml --model.checkpoint runs/iwm_cifar10_cpu
	$(RUN) test --config configs/probes/completion.yaml --model.checkpoint runs/iwm_cifar10_cpu --ckpt_path last

test: $(READY) ## run every test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

campaign: $(READY) ## cut 212 runs in every way, resume them, and compare them bit for bit: 25 minutes on 2 CPU cores
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

mutate: .venv/.mutation ## which small changes of the code no test sees: all modules of mutation.toml, or MODULES="FILE ..." SAMPLE=N
	$(BIN)/python benchmarks/mutation.py $(MODULES) $(if $(SAMPLE),--sample $(SAMPLE))

.venv/.mutation: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutation]'
	@touch $@

check: $(READY) docs ## format, lint, types, import contracts and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs ## build the documentation into site/, and fail at a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

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
	$(BIN)/python benchmarks/trajectories.py

clean: ## remove the environment, all runs and the built documentation
	rm -rf .venv runs site
