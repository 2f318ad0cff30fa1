"""What the tests share: the smallest data and models that do everything."""

import atexit
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from datamodules import Collect, DoublePendulum, ImageFolder, Trajectories, Views
from datamodules.collecting import collect
from datamodules.environments import EnvironmentSettings
from jepa_lightning import IJEPA, IWM, DynamicsJEPA, PendulumJEPA

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # threads only wait for each other at these sizes

SMALL_DATA: dict[str, Any] = {
    "size": 24,
    "sequence_length": 10,
    "clip_length": 8,
    "val_size": 4,
    "test_size": 3,
    "observation": "coordinates",
    "batch_size": 4,
}
SMALL_MODEL: dict[str, Any] = {
    "observation": "coordinates",
    "encoder_widths": (16,),
    "latent_dim": 8,
    "predictor_width": 16,
    "horizon": 4,
}
SMALL_IMAGES: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": 0, "val_fraction": 0.2}
SMALL_IJEPA: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_depth": 1,
    "image_size": 16,
    "patch_size": 4,
    "predictor_width": 24,
    "predictor_depth": 1,
}


RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What Lightning puts into the environment of a process that is one of several."""


@atexit.register
def leave_processes() -> None:
    """What the command line does at its end: threads of a process group that is still there now and then abort the exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A test that was one of several processes leaves nothing of it to the tests after it, and to what they start."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in RENDEZVOUS:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def one_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest's own arguments stand in sys.argv next to the ones it is given."""
    monkeypatch.setattr(sys, "argv", ["jepa-lightning"])


def small_data(**changes: Any) -> DoublePendulum:
    return DoublePendulum(**(SMALL_DATA | changes))


def small_model(**changes: Any) -> PendulumJEPA:
    torch.manual_seed(0)
    return PendulumJEPA(**(SMALL_MODEL | changes))


SMALL_DRIVEN: dict[str, Any] = {
    "torque_limits": (10.0, 5.0),
    "stride": 5,
    "history": 3,
    "sequence_length": 40,
    "clip_length": 23,
    "test_sequence_length": 60,
}


def small_driven_data(**changes: Any) -> DoublePendulum:
    return small_data(**(SMALL_DRIVEN | changes))


def small_driven_model(**changes: Any) -> PendulumJEPA:
    return small_model(**({"history": 3, "horizon": 2, "action_dim": 2} | changes))


def touch(*paths: Path) -> None:
    """Empty files, with the folders above them."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_images(folder: Path, count: int, size: tuple[int, int] = (20, 24), hue: int = 0) -> None:
    """Noise over a color, so that classes differ, as files 0000.jpg ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(hue)
    for number in range(count):
        image = torch.randint(0, 100, (3, *size), generator=generator)
        image[hue % 3] += 100
        pixels = image.to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg")


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 15 images, of which a fifth is held out: 24 to train on, 6 for validation."""
    root = tmp_path_factory.mktemp("images")
    for hue, name in enumerate(("ant", "bee")):
        write_images(root / name, 15, hue=hue)
    return root


def small_images(root: Path, **changes: Any) -> ImageFolder:
    return ImageFolder(**({"root": str(root)} | SMALL_IMAGES | changes))


def small_ijepa(**changes: Any) -> IJEPA:
    torch.manual_seed(0)
    return IJEPA(**(SMALL_IJEPA | changes))


def small_iwm(**changes: Any) -> IWM:
    torch.manual_seed(0)
    return IWM(**(SMALL_IJEPA | changes))


def small_views(root: Path, **changes: Any) -> ImageFolder:
    return small_images(root, **({"views": Views()} | changes))


def small_view_ijepa(**changes: Any) -> IJEPA:
    """With all that the recipe for folders has: a shared predictor, two contexts of an image, and two views of it."""
    return small_ijepa(**({"predictor_context": "shared", "num_contexts": 2, "view_weight": 1.0} | changes))


def small_crops(root: Path, **changes: Any) -> ImageFolder:
    return small_images(root, **({"views": Views(geometric=True, recolored=True)} | changes))


def small_recipe_iwm(**changes: Any) -> IWM:
    """With all that the recipe for a CPU has: adaptive norms, visible patches predicted, in half of the steps all seen."""
    return small_iwm(**({"conditioning": "adaptive_norm", "predict_visible": True, "whole_fraction": 0.5} | changes))


FAMILIES = {
    "ijepa": (small_ijepa, small_images),
    "views": (small_view_ijepa, small_crops),
    "iwm": (small_recipe_iwm, small_views),
}
"""Models of images: how to make the smallest model and its data."""


def trainer(root: Path, **changes: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    with warnings.catch_warnings():
        return pl.Trainer(**(settings | changes))


def parameters_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, value2) for (name, value), (other, value2) in pairs)


def run_script(script: str, out: Path, *arguments: str, own: bool = True) -> None:
    """Run a script in a process of its own, which may start others, from the folder `out`, its first argument if `own`."""
    out.mkdir()
    (out / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    command = [sys.executable, str(out / "script.py"), *([str(out)] if own else []), *arguments]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def run_here(script: str, out: Path, *arguments: str) -> None:
    """Run a script as `run_script` does, but in this process, which has imported everything already."""
    out.mkdir()
    (out / "script.py").write_text(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setattr(sys, "argv", ["script.py", str(out), *arguments])
        runpy.run_path("script.py")


def apart(jepa: torch.nn.Module) -> None:
    """The two encoders of a fresh model are alike: move the context encoder away."""
    with torch.no_grad():
        for parameter in jepa.context_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def record_points(root: Path, episodes: int = 12, steps: int = 10, **environment: Any) -> Path:
    """A recording of the pushed point of `points.py`."""
    settings = EnvironmentSettings("points:Points", environment, image_size=16)
    collect(Collect(settings, episodes=episodes, steps=steps, num_workers=1), root)
    return root


def small_trajectories(root: Path, **changes: Any) -> Trajectories:
    return Trajectories(**({"root": str(root), "windows": 5, "batch_size": 2} | changes))


def small_dynamics(data: Trajectories, **changes: Any) -> DynamicsJEPA:
    torch.manual_seed(0)
    settings = {"encoder_widths": (4,), "latent_dim": 8, "predictor_width": 16, "horizon": 2, "learning_rate": 1e-3}
    return DynamicsJEPA.for_data(data, **(settings | changes))


@pytest.fixture(scope="session")
def points_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve episodes of a pushed point, ten steps each."""
    return record_points(tmp_path_factory.mktemp("points") / "recording")
