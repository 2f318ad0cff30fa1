"""Retrieval: average precision by hand, and the gallery."""

import pytest
import torch

import jepa_lightning.probes.images.retrieval as retrieval
from jepa_lightning.classifiers import directions
from jepa_lightning.probes.images.retrieval import average_precisions, gallery, similarities


def by_hand(relevant: list[bool], scores: list[float]) -> float:
    """The mean, over what is relevant, of the share of relevant images down to it."""
    ranked = [flag for _, flag in sorted(zip(scores, relevant, strict=True), reverse=True)]
    return sum(sum(ranked[: place + 1]) / (place + 1) for place, flag in enumerate(ranked) if flag) / sum(ranked)


@pytest.mark.parametrize("rows", [5, 1024])
def test_average_precision_by_hand(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERY_ROWS", rows)
    torch.manual_seed(0)
    embeddings, labels = torch.randn(30, 5) + 3, torch.randint(4, (30,))
    labels[7] = 9  # a class of its own: nothing to find
    found = average_precisions(embeddings, labels)
    unit = directions(embeddings, embeddings.mean(dim=0))
    expected = []
    for place in range(30):
        others = [other for other in range(30) if other != place]
        relevant = [bool(labels[other] == labels[place]) for other in others]
        if any(relevant):
            expected.append(by_hand(relevant, (unit[others] @ unit[place]).tolist()))
    assert len(found) == 29
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_nothing_to_find_is_no_figure() -> None:
    assert average_precisions(torch.randn(4, 3), torch.arange(4)).shape == (0,)


def test_an_image_is_not_its_own_neighbor() -> None:
    embeddings = torch.randn(6, 3)
    found = similarities(embeddings, slice(1, 4))
    assert torch.isinf(found).nonzero().tolist() == [[0, 1], [1, 2], [2, 3]]
    unit = directions(embeddings, embeddings.mean(dim=0))
    torch.testing.assert_close(found[1, 5], unit[2] @ unit[5])


def test_the_gallery_frames_what_is_of_the_same_class() -> None:
    embeddings = torch.tensor([[0.0, 1], [0.1, 1], [1, 0], [1, 0.1], [-1, -1]])
    images = torch.arange(5).float()[:, None, None, None].expand(-1, 3, 4, 4) / 5
    axes = gallery(images, embeddings, torch.tensor([0, 0, 1, 0, 2])).axes
    assert len(axes) == 5 * 5 and [axis.get_title() for axis in axes[:6]] == ["query", "1", "2", "3", "4", ""]
    shown = [float(axis.images[0].get_array()[0, 0, 0]) for axis in axes]
    assert shown[:2] == pytest.approx([0.0, 0.2]) and shown[10:12] == pytest.approx([0.4, 0.6])
    assert not axes[0].patches and axes[1].patches[0].get_edgecolor()[1] > 0.4, "the nearest to 0 is of its class: green"
    assert axes[11].patches[0].get_edgecolor()[0] == 1, "the nearest to 2 is not: red"


def test_a_gallery_without_classes_or_colors() -> None:
    axes = gallery(torch.rand(3, 5, 4, 4), torch.randn(3, 2), torch.full((3,), -1)).axes
    assert len(axes) == 3 * 3 and not any(axis.patches for axis in axes)
    assert axes[0].images[0].get_array().shape == (4, 4)
