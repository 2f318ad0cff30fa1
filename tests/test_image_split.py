"""Which images of a folder are held out, listed, or drawn from each class."""

import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import small_images, touch, write_images

from datamodules.image_files import scan
from datamodules.image_split import draw_per_class, read_list
from datamodules.rng import seeded_generator


@pytest.mark.parametrize("line", ["../a/0.jpg", "a/../../root/a/0.jpg", "/a/0.jpg"])
def test_a_list_does_not_lead_out_of_the_folder(tmp_path: Path, line: str) -> None:
    touch(tmp_path / "root" / "a" / "0.jpg", tmp_path / "a" / "0.jpg")
    (tmp_path / "list.txt").write_text(f"a/0.jpg\n{line}\n")
    everything = scan(tmp_path / "root").samples
    with pytest.raises(ValueError, match=r"list.txt names .*0.jpg, outside of .*root: write paths relative to that folder"):
        read_list(tmp_path / "list.txt", tmp_path / "root", everything)


def test_a_list_is_compared_with_what_was_found(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg")))
    (tmp_path / "list").write_text("b/2.jpg\r\n\r\n a/../a/0.jpg \n")
    everything = scan(tmp_path).samples
    listed = read_list(tmp_path / "list", tmp_path, everything)
    assert listed.paths.tolist() == [os.fsencode(tmp_path / name) for name in ("b/2.jpg", "a/0.jpg")]
    assert listed.labels.tolist() == [1, 0]
    (tmp_path / "list").write_text("b/2.jpg\nc/2.jpg\nlist\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images of .*list are not among those of .*, first c/2.jpg"):
        read_list(tmp_path / "list", tmp_path, everything)
    (tmp_path / "list").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_list(tmp_path / "list", tmp_path, everything)


def test_the_only_image_of_a_class_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("alone", 1), ("many", 10), ("pair", 2)):
        write_images(tmp_path / name, count)
    data = small_images(tmp_path, val_fraction=0.9)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert data._samples["train"].labels.tolist() == [0, 1, 2]
    assert sorted(data._samples["val"].labels.tolist()) == [1] * 9 + [2]
    assert caplog.records[-1].message == "1 of 3 classes have one image each, which is not held out."


def test_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 1)
    with pytest.raises(ValueError, match="too few images to hold out 20% of each class"):
        small_images(tmp_path).setup("fit")


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("spare", [0, 1])
def test_a_fraction_of_each_class_is_drawn(fraction: float, spare: int) -> None:
    labels = torch.tensor([-1, 3, 3, 0, 0, 0, 0, 0, 0, 3, 7, 3, 0, 0])
    chosen = draw_per_class(labels, fraction, seeded_generator(1), spare)
    assert chosen.dtype == torch.bool and torch.equal(chosen, draw_per_class(labels, fraction, seeded_generator(1), spare))
    for label in labels.unique():
        size = int((labels == label).sum())
        assert chosen[labels == label].sum() == min(max(1, round(fraction * size)), size - spare)


def test_each_image_is_drawn_as_often() -> None:
    labels = torch.tensor([0] * 4 + [1] * 8)[torch.randperm(12, generator=seeded_generator(0))]
    generator = seeded_generator(0)
    drawn = sum(draw_per_class(labels, 0.5, generator).int() for _ in range(2000))
    assert ((drawn - 1000).abs() < 100).all(), "within 4.5 standard deviations"
