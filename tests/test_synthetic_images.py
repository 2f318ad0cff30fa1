"""Synthetic images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import SyntheticImages
from datamodules.rng import seeded_generator
from datamodules.synthetic_images import SHAPES, draw_shape


def test_drawn_once_and_read_like_any_folder(tmp_path: Path) -> None:
    data = SyntheticImages(str(tmp_path / "shapes"), size=20, image_size=16, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == sorted(SHAPES) and len(list((tmp_path / "shapes").rglob("*.png"))) == 20
    assert next(iter(data.train_dataloader())).images.shape == (8, 3, 16, 16)
    (tmp_path / "shapes" / "disc" / "mine.png").touch()
    data.prepare_data()
    assert (tmp_path / "shapes" / "disc" / "mine.png").exists(), "what is there is kept"


def test_a_run_that_was_cut_while_drawing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    data = SyntheticImages(str(tmp_path / "shapes"), size=20)
    monkeypatch.setattr(Image.Image, "save", fail)
    (tmp_path / "shapes.part").mkdir()
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.part"], "what is not ours is kept"


def test_shapes_stand_out_and_are_a_function_of_the_generator() -> None:
    for number, name in enumerate(SHAPES):
        image, again, other = (np.asarray(draw_shape(name, 32, seeded_generator(0, n))) for n in (number, number, 99))
        assert (image == again).all() and (image != other).any()
        assert image.astype(float).std(axis=(0, 1)).max() > 15


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="data.size=5"):
        SyntheticImages(size=5)
