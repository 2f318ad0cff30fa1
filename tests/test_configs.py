"""Every YAML of configs/ is run, at the smallest sizes, through the command line."""

import inspect
import json
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, parameters_equal
from jsonargparse import ArgumentError

import jepa_lightning.action_monitor
import jepa_lightning.mean_reciprocal_rank
from jepa_lightning import DynamicsJEPA
from jepa_lightning.cli import main
from jepa_lightning.dynamics_checks import SIZES
from jepa_lightning.probes import StateProbe
from jepa_lightning.run_defaults import config_file, with_config_files
from jepa_lightning.weights.checkpoints import load_jepa, load_probe

CONFIGS = ROOT / "configs"
SMALL_DATA = ["--data.size", "80", "--data.val_size", "4", "--data.test_size", "3", "--data.test_sequence_length", "45"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FEW_STEPS = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.check_val_every_n_epoch", "1"]
FEW_STEPS += ["--trainer.devices", "1", "--trainer.num_nodes", "1"]


def run(subcommand: str, *configs: str, **settings: object) -> None:
    """A command of the program; settings are flags, with dots in the place of double underscores."""
    arguments = [subcommand]
    for config in configs:
        arguments += ["--config", str(CONFIGS / f"{config}.yaml")]
    main([*arguments, *CPU, *(f"--{name.replace('__', '.')}={value}" for name, value in settings.items())])


def pendulum(subcommand: str, *configs: str, few: bool = True, **settings: object) -> None:
    """The same with few steps on a few trajectories."""
    small = dict(zip([name[2:].replace(".", "__") for name in SMALL_DATA[::2]], SMALL_DATA[1::2], strict=True))
    small |= {"data__batch_size": 8}
    if few and subcommand == "fit":
        small |= {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2, "trainer__check_val_every_n_epoch": 1}
    run(subcommand, *configs, **(small | settings))


@pytest.mark.parametrize("name", ["demo", "images", "coordinates"])
def test_a_pendulum_from_training_to_report(name: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    pendulum("fit", f"pendulum/{name}", trainer__default_root_dir=root)
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (root / "checkpoints" / "best.ckpt").exists() and (root / "config.yaml").exists()
    assert list(root.glob("events.out.tfevents.*"))
    pendulum("validate", f"pendulum/{name}", ckpt_path=root, trainer__default_root_dir=root)
    pendulum("fit", "probes/decoder", model__checkpoint=root)
    few = {"model__num_steps": 5, "model__control_steps": 2}
    pendulum("fit", "probes/state", model__checkpoint=root, model__decoder=root / "decoder", few=False, **few)
    pendulum("test", "probes/state", model__checkpoint=root, ckpt_path=root / "state", trainer__default_root_dir=root)
    for file in (
        "report.json",
        "report.md",
        "forecast.mp4",
        "forecast.gif",
        "forecast.png",
        "reconstruction.png",
        "forecast_error.png",
    ):
        assert (root / file).stat().st_size > 100, file
    assert load_probe(root / "state", StateProbe).jepa.observation == ("coordinates" if name == "coordinates" else "pixels")


OVERLAYS = [path.stem for path in sorted((CONFIGS / "overlays").glob("*.yaml"))]
OF_THE_PENDULUM = [name for name in OVERLAYS if name.startswith(("mode", "reg", "encoder", "predictor", "rgb", "variance"))]


@pytest.mark.parametrize("overlay", OF_THE_PENDULUM)
def test_every_overlay_of_a_pendulum(overlay: str, tmp_path: Path) -> None:
    base = "images" if overlay in ("rgb", "variance_hinge") else "actuated"
    settings = {"trainer__default_root_dir": tmp_path, "trainer__limit_train_batches": 1}
    pendulum("fit", f"pendulum/{base}", f"overlays/{overlay}", **settings)
    text = (CONFIGS / "overlays" / f"{overlay}.yaml").read_text()
    asked = yaml.safe_load(text).get("model", {"init_args": {}})["init_args"]
    weights = asked.pop("regularizer_weights", None)
    jepa = load_jepa(tmp_path)
    assert asked.items() <= dict(jepa.hparams).items()
    assert jepa.channels == (3 if overlay == "rgb" else 1)
    if "regularizer" in asked:
        assert jepa.hparams["regularizer_weights"] == weights
    if base == "actuated":
        assert f"runs/plan_{overlay}" in text, "it must not write over the run of make plan"


def test_planning_from_torques_to_report(tmp_path: Path) -> None:
    root = tmp_path / "run"
    pendulum("fit", "pendulum/actuated", trainer__default_root_dir=root, ckpt_path="auto")
    first = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["global_step"] == 2
    pendulum("fit", "pendulum/actuated", trainer__default_root_dir=root, ckpt_path="auto")
    again = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert again["global_step"] == 2, "a finished run is not trained again"
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in first["state_dict"].items())
    pendulum("fit", "probes/image_decoder", model__checkpoint=root, trainer__val_check_interval=1.0, data__clip_length=23)
    few = {"num_episodes": 3, "num_swing_ups": 2}
    few |= {"planner.num_samples": 8, "planner.num_iterations": 2, "planner.num_elites": 2}
    settings = {f"model__{name}": value for name, value in few.items()} | {"data__test_sequence_length": 60}
    decoder = root / "image_decoder" / "checkpoints" / "best.ckpt"
    pendulum("test", "probes/planning", model__checkpoint=root, model__decoder=decoder, **settings)
    for file in ("report.json", "report.md", "plan.mp4", "plan.png", "rollouts.png", "rollouts_decoded.png"):
        assert (root / "planning" / file).stat().st_size > 100, file


WORLDS = [path.stem for path in sorted((CONFIGS / "worlds").glob("*.yaml"))]


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_from_collecting_to_planning(name: str, tmp_path: Path) -> None:
    """With a point in the place of the environment, whose package may not be installed."""
    points = {"id": "points:Points", "arguments": {}, "state": [], "image_size": 64, "action_repeat": 1}
    recording = {"environment": points, "episodes": 8, "steps": 60, "policy": None, "policy_arguments": {}, "num_workers": 1}
    data = {"root": tmp_path / "recording", "collect": json.dumps(recording), "batch_size": 2, "val_fraction": 0.2}
    settings = {f"data__{key}": value for key, value in data.items()} | {"data__test_fraction": 0.4}
    root = tmp_path / "run"
    few = {"trainer__max_steps": 2, "trainer__check_val_every_n_epoch": 1, "trainer__default_root_dir": root}
    run("fit", f"worlds/{name}", **settings, **few)
    jepa = load_jepa(root)
    assert isinstance(jepa, DynamicsJEPA) and jepa.action_dim == 2 * yaml.safe_load(
        (CONFIGS / "worlds" / f"{name}.yaml").read_text()
    )["data"]["init_args"].get("stride", 1)
    if name != "tworoom":
        return  # what comes after is the same for all
    planner = {"num_samples": 8, "num_iterations": 2, "num_elites": 2, "num_further_iterations": 1}
    search = {f"model__planner.{key}": value for key, value in planner.items()}
    run("fit", "probes/inverse", model__checkpoint=root, trainer__max_steps=1)
    few = {"trainer__max_steps": 1, "trainer__val_check_interval": 1, "data__batch_size": 2}
    run("fit", "probes/image_decoder", model__checkpoint=root, **few)
    run("test", "probes/forecast", model__checkpoint=root, model__decoder=root / "image_decoder")
    assert (root / "forecast" / "report.md").stat().st_size > 100
    goals = {"offset": 10, "budget": 10, "num_episodes": 3, "inverse": root / "inverse"}
    overlays = ["overlays/tworoom_goals"] if name == "tworoom" else []
    goals |= {"radius": "null"} if overlays else {}  # which is in pixels of another world
    asked = {f"model__{key}": value for key, value in goals.items()}
    run("test", "probes/goals", *overlays, model__checkpoint=root, **asked, **search)
    assert (root / "goals" / "report.md").stat().st_size > 100 and (root / "goals" / "goals.mp4").exists()
    run("fit", "probes/reward", model__checkpoint=root, trainer__max_steps=1)
    few = {"model__frames": 10, "model__num_episodes": 2, "model__horizon": 2}
    run("test", "probes/reward", model__checkpoint=root, ckpt_path=root / "reward", **few, **search)
    assert (root / "reward" / "report.md").stat().st_size > 100


# Images.

SMALL = {"model__encoder_depth": 1, "model__predictor_depth": 1}
BARELY = {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2, "trainer__check_val_every_n_epoch": 1}
IMAGENET = SMALL | {"model__encoder": "vit_tiny_patch16_224", "model__image_size": 56, "data__image_size": 56}
JEPAS_OF_IMAGES: dict[tuple[str, ...], dict] = {
    ("ijepa/cifar10_cpu",): SMALL,
    ("ijepa/cifar10",): SMALL | {"model__compile_networks": "false"},
    ("ijepa/folder",): SMALL | {"trainer__val_check_interval": 2, "model__compile_networks": "false"},
    ("ijepa/imagenet",): IMAGENET | {"model__patch_size": 8},
    ("ijepa/imagenet", "overlays/imagenet_vith14"): IMAGENET | {"trainer__num_nodes": 1},
    ("iwm/cifar10_cpu",): SMALL,
    ("iwm/cifar10",): SMALL | {"model__compile_networks": "false"},
    ("iwm/folder",): SMALL | {"trainer__val_check_interval": 2},
    ("iwm/imagenet",): IMAGENET | {"model__patch_size": 8, "trainer__num_nodes": 1},
    ("iwm/imagenet", "overlays/invariant"): IMAGENET | {"model__patch_size": 8, "trainer__num_nodes": 1},
}
PROBES_OF_IMAGES: list[tuple[str, ...]] = [
    ("probes/linear",),
    ("probes/linear", "overlays/few_labels"),
    ("probes/linear", "overlays/attentive"),
    ("probes/finetuning",),
    ("probes/completion",),
    ("probes/knn",),
    ("probes/ridge",),
    ("probes/comparison",),
]


@pytest.fixture
def few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IWM is ranked on few versions of few images."""
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 1)
    monkeypatch.setattr(jepa_lightning.mean_reciprocal_rank, "BANK_SIZE", 16)


def on_images(image_root: Path, root: Path) -> dict[str, object]:
    """Two steps on a handful of images."""
    data = {"data__root": image_root, "data__batch_size": 2, "data__num_workers": 0, "trainer__devices": 1}
    return data | BARELY | {"trainer__default_root_dir": root}


@pytest.mark.parametrize("configs", JEPAS_OF_IMAGES, ids="+".join)
def test_every_jepa_on_images(configs: tuple[str, ...], tmp_path: Path, image_root: Path, few_ranks: None) -> None:
    run("fit", *configs, **(on_images(image_root, tmp_path) | JEPAS_OF_IMAGES[configs]))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("configs", PROBES_OF_IMAGES, ids="+".join)
def test_every_probe_reads_size_classes_and_data_from_the_run(
    configs: tuple[str, ...], tmp_path: Path, image_root: Path
) -> None:
    root, name = tmp_path / "run", configs[-1].split("/")[1]
    run("fit", "ijepa/cifar10_cpu", **(on_images(image_root, root) | SMALL))
    settings = {"model__checkpoint": root, "data__batch_size": 2}
    if name == "few_labels":
        settings |= {"data__fraction": 0.3, "trainer__default_root_dir": root / name}
    if name not in ("knn", "ridge", "comparison"):
        run("fit", *configs, **(settings | BARELY))
        settings["ckpt_path"] = "last"
    run("test", *configs, **settings)
    report = (root / name / "report.md").read_text()
    assert "| " in report and "Made by `python -m jepa_lightning" in report
    assert (root / name / "report.json").exists()


def test_an_iwm_from_training_to_its_probes(tmp_path: Path, image_root: Path, few_ranks: None) -> None:
    """On synthetic images, which its probes inherit; and on others, where they are asked for."""
    root = tmp_path / "run"
    shapes = {"data__root": tmp_path / "shapes", "data__size": 40, "data__batch_size": 8}
    run("fit", "iwm/cifar10_cpu", "overlays/synthetic", **(shapes | BARELY | {"trainer__default_root_dir": root}))
    settings = {"model__checkpoint": root, "data__batch_size": 4}
    run("test", "probes/equivariance", **settings, model__num_images=2)
    assert "all four colors" in (root / "equivariance" / "report.md").read_text()
    run("fit", "probes/completion", **settings, **BARELY)
    assert (root / "completion" / "action_sweep.png").exists()
    predictor = settings | {"data__root": image_root}
    run("fit", "probes/predictor_finetuning", **predictor, **BARELY)
    run("test", "probes/predictor_finetuning", **predictor, ckpt_path="last")
    assert "predictor with random weights" in (root / "predictor_finetuning" / "report.md").read_text()
    again: dict = shapes | BARELY | {"init_from": root, "trainer__default_root_dir": tmp_path / "frozen"}
    run("fit", "iwm/cifar10_cpu", "overlays/synthetic", "overlays/frozen_encoder", **again)
    del again["init_from"]  # a run that was cut knows where it began
    run("fit", "iwm/cifar10_cpu", "overlays/synthetic", "overlays/frozen_encoder", **again, ckpt_path="last")
    before, after = load_jepa(root), load_jepa(tmp_path / "frozen")
    assert parameters_equal(before.target_encoder, after.target_encoder)
    assert not parameters_equal(before.predictor, after.predictor)
    run("test", "probes/equivariance", **(settings | {"model__checkpoint": tmp_path / "frozen"}), model__num_images=2)
    config = yaml.safe_load((CONFIGS / "overlays" / "multi_task.yaml").read_text())
    for folder in config["data"]["init_args"]["folders"].values():
        folder["init_args"] |= {"root": str(image_root), "batch_size": 2, "num_workers": 0}
        del folder["init_args"]["download"]
    (tmp_path / "multi_task.yaml").write_text(yaml.safe_dump({"data": config["data"]}))
    arguments = [
        "--config",
        str(CONFIGS / "probes" / "predictor_finetuning.yaml"),
        "--config",
        str(tmp_path / "multi_task.yaml"),
    ]
    arguments += ["--model.checkpoint", str(root), "--trainer.default_root_dir", str(tmp_path / "tasks")]
    main(["fit", *arguments, *CPU, *FEW_STEPS])
    assert (tmp_path / "tasks" / "checkpoints" / "last.ckpt").exists()


def test_every_config_is_run_by_a_test_and_opens_with_its_claim() -> None:
    tested = {name for names in (*JEPAS_OF_IMAGES, *PROBES_OF_IMAGES) for name in names}
    tested |= {f"pendulum/{name}" for name in ("demo", "images", "coordinates", "actuated")}
    tested |= {f"probes/{name}" for name in ("decoder", "state", "image_decoder", "planning")}
    tested |= {
        "probes/equivariance",
        "probes/predictor_finetuning",
        "probes/segmentation",
        "overlays/synthetic",
        "overlays/multi_task",
        "overlays/frozen_encoder",
    }
    tested |= {f"overlays/{name}" for name in (*OF_THE_PENDULUM, "tworoom_goals")}
    tested |= {f"worlds/{name}" for name in WORLDS} | {
        f"probes/{name}" for name in ("goals", "inverse", "reward", "forecast")
    }
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    assert found == tested
    assert len([name for name in found if not name.startswith("overlays")]) <= 38, "one per thing a person would run"
    for path in CONFIGS.rglob("*.yaml"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = "\n".join(header)
        assert "Source:" in text and "Command:" in text and "Expected" in text, path
        assert "TIME" not in text and "EXPECTED" not in text, f"{path} has a placeholder"


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a class itself takes: what it passes on is its base's."""
    return dict(inspect.signature(cls.__init__).parameters) if "__init__" in vars(cls) else {}


def test_no_config_repeats_a_default_or_what_the_data_says() -> None:
    import datamodules
    import jepa_lightning.probes

    for path in CONFIGS.rglob("*.yaml"):
        if path.parent.name in ("overlays", "probes"):  # what undoes something else may name a default
            continue
        for section in ("model", "data"):
            content = yaml.safe_load(path.read_text()).get(section, {})
            name = content.get("class_path", "PendulumJEPA" if section == "model" else "DoublePendulum")
            (cls,) = {
                getattr(package, name)
                for package in (jepa_lightning, jepa_lightning.probes, datamodules)
                if hasattr(package, name)
            }
            defaults = {key: value for base in reversed(cls.__mro__) for key, value in parameters(base).items()}
            for key, value in content.get("init_args", {}).items():
                default = defaults[key].default
                default = list(default) if isinstance(default, tuple) else default
                assert value != default, f"{path.name}: {section}.{key}={value} is the default"
                assert section == "data" or not (issubclass(cls, DynamicsJEPA) and key in SIZES), f"{path.name}: {key}"


def test_a_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file("ijepa/cifar10_cpu") == str(CONFIGS / "ijepa" / "cifar10_cpu.yaml")
    assert config_file("configs/overlays/rgb.yaml") == str(CONFIGS / "overlays" / "rgb.yaml")
    (tmp_path / "mine.yaml").touch()
    assert config_file("mine.yaml") == "mine.yaml"
    assert with_config_files(["fit", "--config", "probes/knn", "--config=probes/state"])[1:] == [
        "--config",
        str(CONFIGS / "probes" / "knn.yaml"),
        f"--config={CONFIGS / 'probes' / 'state.yaml'}",
    ]
    with pytest.raises(ArgumentError, match="There is no configuration ijepa/cifar: .* one of ijepa/cifar10, "):
        config_file("ijepa/cifar")


def test_a_wheel_would_have_every_configuration() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in CONFIGS.rglob("*.yaml")}
    assert {f"jepa_lightning.{'.'.join(folder.parts)}" for folder in folders} <= set(listed)
    roots = [ROOT / name for name in ("jepa_lightning", "datamodules", "callbacks")]
    ours = [path.parent.relative_to(ROOT) for root in roots for path in root.rglob("__init__.py")]
    assert {".".join(folder.parts) for folder in ours} <= set(listed)
