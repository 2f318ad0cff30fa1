"""A model of images that is trained from the command line takes its size and channels from the data."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_ijepa, small_images, small_trajectories, small_views, trainer
from PIL import Image

from datamodules.batches import ImageBatch
from jepa_lightning import IJEPA, IWM, DynamicsJEPA, ImageFolder
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


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([(100, 300)] * 3 + [(300, 70)] * 2, 96),  # half of them have 96 on both sides
        ([(100, 300)] * 2 + [(300, 70)] * 3, 64),
        ([(100, 300)] * 2 + [(300, 70)] * 2, 96),
        ([(500, 400)], 128),
        ([(128, 400)], 128),
        ([(127, 400)], 96),
        ([(20, 28)], 32),  # there is nothing smaller
    ],
)
def test_a_size_is_found_in_the_images(sizes: list[tuple[int, int]], found: int, tmp_path: Path) -> None:
    for number, size in enumerate(sizes):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    assert ImageFolder(str(tmp_path), image_size=None).image_size == (found, found)


def test_a_size_is_not_found_where_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Not one of 1 images can be read, so that data.image_size cannot be found"):
        _ = ImageFolder(str(tmp_path), image_size=None).image_size
    with pytest.raises(FileNotFoundError, match="no folder"):
        _ = ImageFolder(str(tmp_path / "missing"), image_size=None).image_size


def test_size_and_patches_of_folder_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (70, 90)).save(tmp_path / "train" / f"{number}.png")
    arguments = [
        *("fit", "--config", "ijepa/folder", f"--data.root={tmp_path}", "--data.batch_size=4", "--data.num_workers=0"),
        *(f"--trainer.default_root_dir={tmp_path / 'run'}", "--model.compile_networks=false", "--model.encoder_depth=1"),
        *("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"),
        "--trainer.enable_progress_bar=false",
    ]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        main(arguments)
    assert "Images are resized to 64 x 64 pixels; data.image_size chooses another size." in caplog.text
    model = load_jepa(tmp_path / "run")
    assert isinstance(model, IJEPA) and model.image_size == (64, 64)
    assert model.target_encoder.grid == (8, 8) and model.target_encoder.patch_size == 8
    # Other images than those that it was trained on are read in its size.
    (tmp_path / "large").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (200, 300)).save(tmp_path / "large" / f"{name}.png")
    main(["predict", f"--ckpt_path={tmp_path / 'run'}", f"--data.root={tmp_path / 'large'}", "--data.num_workers=0"])
    assert len((tmp_path / "run" / "predict" / "large" / "index.csv").read_text().splitlines()) == 1 + 2
    for number in range(20):  # the folder grows, and the run goes on in its own size
        Image.new("RGB", (200, 300)).save(tmp_path / "train" / f"more {number}.png")
    assert ImageFolder(str(tmp_path), image_size=None).image_size == (128, 128)
    with pytest.warns(UserWarning, match="This run goes on with other samples: data.images"):
        main([*arguments, "--ckpt_path=last"])


def test_patches_are_an_eighth_of_the_shorter_side() -> None:
    model = IJEPA("vit_tiny_patch16_224", (48, 72), None, encoder_depth=1, predictor_width=24)
    assert model.target_encoder.grid == (8, 12) and model.target_encoder.patch_size == 6
    with pytest.raises(ValueError, match=r"image_size=\(100, 100\): patches of an eighth of the shorter side, 12 pixels"):
        IJEPA("vit_tiny_patch16_224", 100, None)


def test_data_that_leave_their_size_open_take_the_model_s(image_root: Path, tmp_path: Path) -> None:
    data = small_images(image_root, image_size=None)
    trainer(tmp_path, max_steps=1).fit(small_ijepa(), data)
    assert data.image_size == (16, 16), "and not 32, which the images would have"
    alone = small_images(image_root, image_size=None)
    alone.setup("fit")
    assert alone.image_size == (32, 32)
