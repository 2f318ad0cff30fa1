"""Every YAML of configs/ is run, at the smallest sizes, through the command line."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import jepa_lightning.iwm
import jepa_lightning.mean_reciprocal_rank
from jepa_lightning.cli import main
from jepa_lightning.weights.checkpoints import load_jepa

CONFIGS = ROOT / "configs"
JEPAS = ("demo", "pendulum", "pendulum_coordinates")
SMALL_DATA = ["--data.size", "80", "--data.val_size", "4", "--data.test_size", "3", "--data.test_sequence_length", "45"]


def run(root: Path, subcommand: str, config: Path | str, *extra: str) -> None:
    arguments = [subcommand, "--config", str(config), *SMALL_DATA, "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]
    main(arguments + list(extra))


@pytest.mark.parametrize("name", JEPAS)
def test_both_phases_of_a_run(name: str, tmp_path: Path) -> None:
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.check_val_every_n_epoch", "1"]
    run(tmp_path, "fit", CONFIGS / f"{name}.yaml", *few)
    jepa = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(jepa, weights_only=True)["global_step"] == 2
    assert (tmp_path / "checkpoints" / "best.ckpt").exists() and (tmp_path / "config.yaml").exists()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    run(tmp_path, "validate", CONFIGS / f"{name}.yaml", "--ckpt_path", str(jepa))

    run(tmp_path / "decoder", "fit", CONFIGS / f"{name}_decoder.yaml", "--model.checkpoint", str(jepa), *few)
    decoder = tmp_path / "decoder" / "checkpoints" / "last.ckpt"
    chosen = ["--model.checkpoint", str(jepa), "--model.decoder", str(decoder)]
    chosen += ["--model.num_steps", "5", "--model.control_steps", "2"]
    run(tmp_path / "state", "fit", CONFIGS / f"{name}_state.yaml", *chosen)
    state = tmp_path / "state" / "checkpoints" / "last.ckpt"
    run(tmp_path, "test", CONFIGS / f"{name}_state.yaml", *chosen, "--ckpt_path", str(state))
    for file in ("report.json", "report.md", "forecast.mp4", "reconstruction.png", "forecast_error.png"):
        assert (tmp_path / file).stat().st_size > 100, file


OVERLAYS = [path for path in sorted((CONFIGS / "overlays").glob("*.yaml")) if not path.stem.startswith("iwm")]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_of_a_pendulum(overlay: Path, tmp_path: Path) -> None:
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.check_val_every_n_epoch", "1"]
    base = "pendulum" if overlay.stem in ("rgb", "variance_hinge") else "pendulum_actions"
    few += ["--trainer.default_root_dir", str(tmp_path)]  # the overlay has one of its own, and what comes last counts
    run(tmp_path, "fit", CONFIGS / f"{base}.yaml", "--config", str(overlay), *few)
    asked = yaml.safe_load(overlay.read_text())["model"]["init_args"]
    weights = asked.pop("regularizer_weights", None)
    jepa = load_jepa(tmp_path / "checkpoints" / "last.ckpt")
    assert asked.items() <= dict(jepa.hparams).items()
    if "regularizer" in asked:
        assert jepa.hparams["regularizer_weights"] == weights
    if base == "pendulum_actions":
        assert f"runs/plan_{overlay.stem}" in overlay.read_text(), "it must not write over the run of make plan"


def test_planning_from_torques_to_report(tmp_path: Path) -> None:
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.check_val_every_n_epoch", "1"]
    run(tmp_path, "fit", CONFIGS / "pendulum_actions.yaml", *few, "--ckpt_path", "auto")
    jepa = tmp_path / "checkpoints" / "last.ckpt"
    first = torch.load(jepa, weights_only=True)
    assert first["global_step"] == 2
    run(tmp_path, "fit", CONFIGS / "pendulum_actions.yaml", *few, "--ckpt_path", "auto")
    again = torch.load(jepa, weights_only=True)
    assert again["global_step"] == 2, "a finished run is not trained again"
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in first["state_dict"].items())
    run(tmp_path / "decoder", "fit", CONFIGS / "state_decoder.yaml", "--model.checkpoint", str(jepa), *few)
    decoder = tmp_path / "decoder" / "checkpoints" / "best.ckpt"
    chosen = ["--model.checkpoint", str(jepa), "--model.decoder", str(decoder)]
    chosen += ["--model.num_episodes", "3", "--model.num_swing_ups", "2", "--data.test_sequence_length", "60"]
    chosen += ["--model.planner.num_samples", "8", "--model.planner.num_iterations", "2", "--model.planner.num_elites", "2"]
    run(tmp_path, "test", CONFIGS / "planning.yaml", *chosen)
    for file in ("report.json", "report.md", "plan.mp4", "plan.png", "rollouts.png", "rollouts_decoded.png"):
        assert (tmp_path / file).stat().st_size > 100, file


def test_both_phases_of_ijepa(tmp_path: Path) -> None:
    small = ["--data.root", str(tmp_path / "shapes"), "--data.size", "40", "--data.batch_size", "8"]
    small += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.check_val_every_n_epoch", "1"]
    small += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(CONFIGS / "ijepa_smoke.yaml"), *small, "--trainer.default_root_dir", str(tmp_path)])
    jepa = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(jepa, weights_only=True)["global_step"] == 2
    probe = ["--config", str(CONFIGS / "ijepa_smoke_linear.yaml"), *small, "--model.checkpoint", str(jepa)]
    probe += ["--trainer.default_root_dir", str(tmp_path / "linear")]
    main(["fit", *probe])
    main(["test", *probe, "--ckpt_path", str(tmp_path / "linear" / "checkpoints" / "last.ckpt")])
    assert (tmp_path / "linear" / "report.json").exists() and (tmp_path / "linear" / "report.md").exists()


SMALL_IWMS = {
    "iwm_cifar10_cpu": ["--model.encoder_depth", "1"],
    "iwm_cifar10": ["--model.encoder_depth", "1", "--model.compile_networks", "false"],
    "iwm_imagenet": ["--model.encoder", "vit_tiny_patch16_224", "--model.encoder_depth", "1"],
}
SMALL_IJEPAS = {
    "ijepa_cifar10_cpu": ["--model.encoder_depth", "1"],
    "ijepa_cifar10": ["--model.encoder_depth", "1", "--model.compile_networks", "false"],
    "ijepa_imagenet_vitb16": ["--model.encoder", "vit_tiny_patch16_224", "--model.encoder_depth", "1"],
    "ijepa_imagenet_vith14": ["--model.encoder", "vit_tiny_patch16_224", "--model.encoder_depth", "1"],
}
IMAGENET_SIZE = ["--model.image_size", "56", "--model.predictor_depth", "1", "--data.image_size", "56"]
CIFAR_PROBES = ("linear", "lowshot_1", "lowshot_10", "attentive", "finetuning", "completion", "knn")


def few_images(image_root: Path, root: Path) -> list[str]:
    """Two steps on a handful of images, on one CPU."""
    arguments = ["--data.root", str(image_root), "--data.batch_size", "2", "--data.num_workers", "0"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.default_root_dir", str(root)]
    return arguments


FEW_STEPS = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.check_val_every_n_epoch", "1"]


@pytest.fixture
def few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IWM is evaluated on few versions of few images."""
    monkeypatch.setattr(jepa_lightning.iwm, "WATCHED", 1)
    monkeypatch.setattr(jepa_lightning.mean_reciprocal_rank, "BANK_SIZE", 16)


@pytest.mark.parametrize("name", SMALL_IJEPAS | SMALL_IWMS)
def test_every_jepa_on_images(name: str, tmp_path: Path, image_root: Path, few_ranks: None) -> None:
    small = [*few_images(image_root, tmp_path), *FEW_STEPS, *(SMALL_IJEPAS | SMALL_IWMS)[name]]
    if "imagenet" in name:
        small += [*IMAGENET_SIZE, "--trainer.num_nodes", "1"]
        small += ["--model.patch_size", "14"] if name.endswith("14") else ["--model.patch_size", "8"]
    main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *small])
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.fixture
def small_checkpoint(tmp_path: Path, image_root: Path) -> Path:
    root = tmp_path / "ijepa"
    few = [*few_images(image_root, root), *FEW_STEPS, *SMALL_IJEPAS["ijepa_cifar10_cpu"]]
    main(["fit", "--config", str(CONFIGS / "ijepa_cifar10_cpu.yaml"), *few])
    return root / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", CIFAR_PROBES)
def test_every_probe_of_ijepa(name: str, tmp_path: Path, image_root: Path, small_checkpoint: Path) -> None:
    arguments = ["--config", str(CONFIGS / f"ijepa_cifar10_{name}.yaml"), *few_images(image_root, tmp_path)]
    arguments += ["--model.checkpoint", str(small_checkpoint)]
    if name != "completion":
        arguments += ["--model.num_classes", "2"]
    if "lowshot" in name:
        arguments += ["--data.fraction", "0.3"]
    if name != "knn":
        main(["fit", *arguments, *FEW_STEPS])
        arguments += ["--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")]
    main(["test", *arguments])
    report = (tmp_path / "report.md").read_text()
    assert "| " in report and "Made by `python -m jepa_lightning" in report
    assert (tmp_path / "report.json").exists()


def test_both_phases_of_iwm(tmp_path: Path, image_root: Path, few_ranks: None) -> None:
    shapes = ["--data.root", str(tmp_path / "shapes"), "--data.size", "40", "--data.batch_size", "8"]
    shapes += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *FEW_STEPS]
    main(["fit", "--config", str(CONFIGS / "iwm_smoke.yaml"), *shapes, "--trainer.default_root_dir", str(tmp_path)])
    jepa = tmp_path / "checkpoints" / "last.ckpt"
    arguments = ["--config", str(CONFIGS / "iwm_cifar10_equivariance.yaml"), "--model.checkpoint", str(jepa)]
    arguments += few_images(image_root, tmp_path / "equivariance")
    main(["test", *arguments, "--model.num_images", "2"])
    assert "all four colors" in (tmp_path / "equivariance" / "report.md").read_text()
    arguments = ["--config", str(CONFIGS / "iwm_cifar10_completion.yaml"), "--model.checkpoint", str(jepa)]
    main(["fit", *arguments, *few_images(image_root, tmp_path / "completion"), *FEW_STEPS])
    assert (tmp_path / "completion" / "action_sweep.png").exists()
    arguments = ["--config", str(CONFIGS / "iwm_cifar10_predictor.yaml"), "--model.checkpoint", str(jepa)]
    arguments += [*few_images(image_root, tmp_path / "predictor"), "--model.num_classes", "2"]
    main(["fit", *arguments, *FEW_STEPS])
    main(["test", *arguments, "--ckpt_path", str(tmp_path / "predictor" / "checkpoints" / "last.ckpt")])
    assert "predictor with random weights" in (tmp_path / "predictor" / "report.md").read_text()
    config = yaml.safe_load((CONFIGS / "iwm_tasks.yaml").read_text())
    config["model"]["init_args"] = {
        "checkpoint": str(jepa),
        "num_classes": dict.fromkeys(config["data"]["init_args"]["folders"], 2),
    }
    for folder in config["data"]["init_args"]["folders"].values():
        folder["init_args"] |= {"root": str(image_root), "batch_size": 2, "num_workers": 0}
        del folder["init_args"]["download"]
    config["trainer"]["default_root_dir"] = str(tmp_path / "tasks")
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "tasks.yaml"), *FEW_STEPS, "--trainer.accelerator", "cpu"])
    assert (tmp_path / "tasks" / "checkpoints" / "last.ckpt").exists()


def test_the_overlay_of_iwm(tmp_path: Path, image_root: Path, few_ranks: None) -> None:
    config = ["--config", str(CONFIGS / "iwm_imagenet.yaml"), "--config", str(CONFIGS / "overlays" / "iwm_invariant.yaml")]
    small = [*few_images(image_root, tmp_path), *FEW_STEPS, *SMALL_IWMS["iwm_imagenet"], "--trainer.num_nodes", "1"]
    small += ["--model.image_size", "32", "--data.image_size", "32"]
    main(["fit", *config, *small])
    assert len(load_jepa(tmp_path / "checkpoints" / "last.ckpt").predictor.blocks) == 12


def test_every_config_is_run_by_a_test_and_opens_with_its_claim() -> None:
    names = {f"{name}{phase}" for name in JEPAS for phase in ("", "_decoder", "_state")}
    names |= {"ijepa_smoke", "ijepa_smoke_linear", *SMALL_IJEPAS, *(f"ijepa_cifar10_{name}" for name in CIFAR_PROBES)}
    names |= {
        "iwm_smoke",
        "iwm_cifar10_equivariance",
        "iwm_cifar10_predictor",
        "iwm_cifar10_completion",
        "iwm_tasks",
        "pendulum_actions",
        "state_decoder",
        "planning",
        *SMALL_IWMS,
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == names
    for path in CONFIGS.rglob("*.yaml"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = "\n".join(header)
        assert "Source:" in text and "Command:" in text and "Expected" in text, path
        assert "TIME" not in text and "EXPECTED" not in text, f"{path} has a placeholder"


def test_no_config_repeats_a_default() -> None:
    import inspect

    import datamodules
    import jepa_lightning.probes

    for path in CONFIGS.glob("*.yaml"):  # an overlay may undo another one, so it may name a default
        for section in ("model", "data"):
            content = yaml.safe_load(path.read_text()).get(section, {})
            name = content.get("class_path", "PendulumJEPA" if section == "model" else "DoublePendulum")
            (cls,) = {
                getattr(package, name)
                for package in (jepa_lightning, jepa_lightning.probes, datamodules)
                if hasattr(package, name)
            }
            defaults = inspect.signature(cls).parameters
            for key, value in content.get("init_args", {}).items():
                default = defaults[key].default
                default = list(default) if isinstance(default, tuple) else default
                assert value != default, f"{path.name}: {section}.{key}={value} is the default"
