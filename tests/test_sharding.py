"""Two processes on CPU: networks that are sharded learn what replicated ones learn, and go on from sharded checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_script, small_ijepa, small_iwm, small_model, small_view_ijepa, trainer, write_images
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from callbacks.ema import local
from jepa_lightning.sharding import check_even_batches, check_strategy, is_sharded
from jepa_lightning.weights.checkpoints import load_jepa, read_checkpoint

STEPS = 20

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from jepa_lightning.sharding import FSDP2Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from conftest import FAMILIES, trainer
from jepa_lightning.optim import gradient_norm

out, images, few, steps = *map(Path, sys.argv[1:4]), int(sys.argv[4])
MODELS = {
    "views": {"view_start_fraction": 0.4},  # at the first cut its network has not been optimized yet
    "iwm": {"gradient_checkpointing": True, "regularizer": "variance_hinge"},
}
TRAINERS = {
    "views": {"check_val_every_n_epoch": 3},
    "iwm": {"check_val_every_n_epoch": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}

class Norms(Callback):
    def __init__(self):
        self.norms = []
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norms.append(gradient_norm(module.parameters()).item())

def fit(family, name, strategy, resume=None):
    make_model, make_data = FAMILIES[family]
    model, folder = make_model(momentum=0.9, encoder_depth=2, **MODELS[family]), out / family
    if os.environ.get("LOCAL_RANK") == "1":  # what the second process has drawn is of no account
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    save = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    norms = Norms()
    run = trainer(folder, devices=2, strategy=strategy, callbacks=[save, norms], max_steps=steps, limit_val_batches=1.0,
                  enable_checkpointing=True, log_every_n_steps=5,
                  logger=TensorBoardLogger(folder, name=name), **TRAINERS[family])
    run.fit(model, make_data(images, batch_size=2), ckpt_path=resume, weights_only=True)
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        assert all(isinstance(p, DTensor) == (strategy != "ddp") for p in network.parameters())
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if run.is_global_zero:
        metrics = {key: value.item() for key, value in run.callback_metrics.items()}
        torch.save((weights, run.global_step, metrics, norms.norms), folder / f"{name}.pt")

def sharded(**changes):
    return FSDP2Strategy(**changes)

for family in MODELS:
    fit(family, "ddp", "ddp")
    fit(family, "sharded", sharded())
cut = "step=8.ckpt"
fit("iwm", "resumed", sharded(), resume=out / "iwm" / "sharded" / cut)
fit("views", "resumed", sharded(save_distributed_checkpoint=False), resume=out / "views" / "sharded" / cut)
fit("views", "resumed again", sharded(), resume=out / "views" / "resumed" / "step=16.ckpt")
make_model, make_data = FAMILIES["iwm"]
run = trainer(out, devices=2, strategy=sharded(), limit_val_batches=1.0)
model, data = make_model(), make_data(few, batch_size=2)
run.validate(model, data, verbose=False)  # of three images: two for the first process and one for the second
counted = torch.tensor([len(batch.labels) for batch in data.val_dataloader()])
torch.save((counted, run.callback_metrics), out / f"few{run.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """What the runs left behind: folders "views" and "iwm", with weights, steps, metrics and gradient norms of each run."""
    out = tmp_path_factory.mktemp("sharding") / "runs"
    few = tmp_path_factory.mktemp("few")
    write_images(few / "train" / "one", 4)
    write_images(few / "val" / "one", 3)
    run_script(SCRIPT, out, str(image_root), str(few), str(STEPS))
    return out


def read(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def test_processes_with_unequal_first_batches_rank_equally_many_images(runs: Path) -> None:
    """Sharded networks compute in all processes or in none: with one image more, the first would wait for the second."""
    (first, figures0), (second, figures1) = (read(runs / f"few{rank}.pt") for rank in (0, 1))
    assert (first.tolist(), second.tolist()) == ([2], [1])
    assert figures0["val/mrr"] == figures1["val/mrr"] > 0


@pytest.mark.parametrize("family", ["views", "iwm"])
def test_weights_and_average_equal_those_of_ddp(runs: Path, family: str) -> None:
    sharded, replicated = (read(runs / family / f"{name}.pt") for name in ("sharded", "ddp"))
    assert sharded[1] == replicated[1] == STEPS
    names = set(sharded[0])
    assert names == set(replicated[0]) and any(name.startswith("target_encoder.") for name in names)
    for name, value in replicated[0].items():
        torch.testing.assert_close(sharded[0][name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sharded[3] == pytest.approx(replicated[3], rel=1e-5), "norms of the gradients"
    assert set(sharded[2]) == set(replicated[2])
    for name, value in replicated[2].items():
        assert sharded[2][name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("family", "name", "step"), [("views", "resumed", 8), ("views", "resumed again", 16), ("iwm", "resumed", 8)]
)
def test_resumed_from_a_checkpoint_equals_uncut(runs: Path, family: str, name: str, step: int) -> None:
    uncut, cut = (read(runs / family / f"{run}.pt") for run in ("sharded", name))
    assert cut[1] == STEPS and len(cut[3]) == STEPS - step, "did not go on from where it was cut"
    for key, value in uncut[0].items():
        assert torch.equal(value, cut[0][key]), key
    assert uncut[3][step:] == cut[3]


def test_a_checkpoint_is_a_folder_or_a_file(runs: Path) -> None:
    assert (runs / "views" / "sharded" / "step=8.ckpt").is_dir()
    assert (runs / "views" / "resumed" / "step=16.ckpt").is_file()


def test_one_process_reads_a_sharded_checkpoint(runs: Path, tmp_path: Path) -> None:
    folder = runs / "views" / "sharded" / "step=8.ckpt"
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    weights, rest = read(tmp_path / "weights.pt")["state_dict"], read(folder / "meta.pt")
    assert rest["global_step"] == 8 and rest["class"] == "jepa_lightning.ijepa.IJEPA"
    small_view_ijepa(encoder_depth=2, momentum=0.9).load_state_dict(weights)


def attached(model: Any, **trainer: Any) -> Any:
    """A model with as much of a trainer as it asks for."""
    model._trainer = SimpleNamespace(**trainer)
    return model


@pytest.mark.parametrize("make_model", [small_ijepa, small_iwm, small_model])
def test_a_strategy_that_flattens_parameters_is_refused_before_anything_is_wrapped(make_model: Any) -> None:
    model = attached(make_model(), strategy=FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(ValueError, match="trainer.strategy=FSDPStrategy is not supported"):
        model.configure_model()


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_spawn", "ddp_notebook", "ddp_find_unused_parameters_true"])
def test_replicating_strategies_leave_the_networks_alone(tmp_path: Path, strategy: str) -> None:
    model = attached(small_ijepa(), strategy=trainer(tmp_path, strategy=strategy).strategy)
    model.configure_model()
    assert not is_sharded(model.context_encoder)


def test_a_small_model_is_not_sharded() -> None:
    with pytest.raises(ValueError, match="PendulumJEPA is small enough for every device.* choose ddp"):
        small_model().shard_networks(None, torch.device("cpu"))


def test_narrow_networks_are_not_sharded() -> None:
    model = attached(small_ijepa(), precision="bf16-true", precision_plugin=HalfPrecision("bf16-true"))
    with pytest.raises(ValueError, match="trainer.precision=bf16-true with ModelParallelStrategy.* choose bf16-mixed"):
        model.shard_networks(None, torch.device("cpu"))


def test_processes_with_other_numbers_of_held_out_batches_fail_before_they_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_another_process(ends: torch.Tensor, operation: Any) -> None:
        ends.copy_(torch.maximum(ends, torch.tensor([3, -3])))

    monkeypatch.setattr(torch.distributed, "all_reduce", with_another_process)
    check_even_batches(3, torch.device("cpu"))
    for count, message in ((2, "make 3 batches in one process and 2"), (4, "make 4 batches in one process and 3")):
        with pytest.raises(ValueError, match=message):
            check_even_batches(count, torch.device("cpu"))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_other_engines_that_shard_are_refused(strategy: type) -> None:
    with pytest.raises(ValueError, match=f"strategy={strategy.__name__} is not supported.* choose one device, any .* ddp"):
        check_strategy(strategy.__new__(strategy))


def test_tensor_parallelism_is_refused() -> None:
    strategy = ModelParallelStrategy()
    sizes = {"data_parallel": 1, "tensor_parallel": 2}
    strategy._device_mesh = {name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match="set data_parallel_size=2 and tensor_parallel_size=1"):
        check_strategy(strategy)


def test_a_sharded_run_of_the_command_line_goes_on(tmp_path: Path, image_root: Path) -> None:
    def command(*extra: str) -> None:
        script = "from jepa_lightning.cli import main; main()"
        arguments = ["fit", "--model", "IJEPA", "--model.encoder=vit_tiny_patch16_224", "--model.encoder_depth=1"]
        arguments += ["--model.image_size=16", "--model.patch_size=4", "--model.predictor_width=24", "--data=ImageFolder"]
        arguments += [
            "--model.predictor_depth=1",
            f"--data.root={image_root}",
            "--data.image_size=16",
            "--data.batch_size=4",
        ]
        arguments += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=fsdp2"]
        arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"]
        arguments += ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
        run_script(script, tmp_path / f"call{len(extra)}", *arguments, *extra, own=False)

    command("--trainer.max_epochs=1")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (last / "meta.pt").is_file() and read_checkpoint(last)["global_step"] == 3
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        load_jepa(last)
    command("--trainer.max_epochs=2", "--ckpt_path=last")
    assert read_checkpoint(last)["global_step"] == 6
    assert sorted(path.name for path in last.parent.iterdir() if path.name != "best.ckpt") == [
        "last-1.ckpt",
        "last-2.ckpt",
        "last.ckpt",
    ]


def test_of_a_sharded_tensor_this_process_has_its_part() -> None:
    whole = torch.arange(6.0)
    assert local(whole) is whole
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        part = local(distribute_tensor(whole, mesh))
        assert type(part) is torch.Tensor and torch.equal(part, whole)
    finally:
        distributed.destroy_process_group()
