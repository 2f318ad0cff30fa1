"""A model of images that is trained from the command line takes its size and channels from the data."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_images, small_trajectories, small_views
from PIL import Image

from datamodules.batches import ImageBatch
from jepa_lightning import IJEPA, IWM, DynamicsJEPA
from jepa_lightning.cli import main
from jepa_lightning.run_defaults import sizes_for
from jepa_lightning.weights.checkpoints import load_jepa

SMALL = [
    *(
        "--model.encoder=vit_tiny_patch16_224",
        "--model.encoder_depth=1",
        "--model.patch_size=4",
        "--model.predictor_width=24",
    ),
    *("--model.predictor_depth=1", "--data.batch_size=4", "--data.num_workers=0", "--trainer.max_steps=1"),
    *("--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"),
]


def fit(root: Path, folder: Path, *arguments: str) -> IJEPA:
    main(["fit", "--model=IJEPA", "--data=ImageFolder", f"--data.root={folder}", *SMALL, *arguments])
    found = load_jepa(root)
    assert isinstance(found, IJEPA)
    return found


def test_size_and_channels_are_those_of_the_data(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "gray").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30), number, np.uint8)).save(tmp_path / "gray" / f"{number}.png")
    arguments = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--data.image_size=[16, 24]", "--data.channels=1"]
    model = fit(tmp_path / "run", tmp_path / "gray", *arguments)
    assert model.image_size == (16, 24) and model.channels == 1 and model.target_encoder.grid == (4, 6)
    main(["validate", f"--ckpt_path={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"])


def test_what_is_given_stays(image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--data.image_size=16", "--model.image_size=32"]
    with pytest.raises(SystemExit):
        fit(tmp_path, image_root, *arguments)
    assert "The model has image_size=(32, 32) but data.image_size=(16, 16)" in capsys.readouterr().err


def test_each_family_takes_what_it_has(image_root: Path, points_root: Path) -> None:
    assert sizes_for(IJEPA, small_images(image_root)) == {"image_size": (16, 16), "channels": 3}
    assert sizes_for(IWM, small_views(image_root)) == {"image_size": (16, 16)}
    assert sizes_for(IJEPA, small_trajectories(points_root)) == {} == sizes_for(IJEPA, object())
    assert sizes_for(DynamicsJEPA, small_images(image_root)) == {}


def test_data_of_ones_own_may_say_less() -> None:
    class Bare:
        batch_type = ImageBatch

    assert sizes_for(IJEPA, Bare()) == {}
    Bare.image_size = (8, 8)  # type: ignore[attr-defined]
    assert sizes_for(IJEPA, Bare()) == {"image_size": (8, 8)}
