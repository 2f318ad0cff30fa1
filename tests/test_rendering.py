"""The renderer draws what the states say, to a fraction of a pixel."""

import pytest
import torch

from datamodules.physics import Pendulum, sample_initial_states
from datamodules.rendering import CPU_CHUNK, MARGIN, render, render_whole
from datamodules.rng import seeded_generator

STATES = sample_initial_states(CPU_CHUNK // 64**2 + 40, seeded_generator(0)).float()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (0.4, 1.6)])
@pytest.mark.parametrize("size", [16, 32, 64, 96])
def test_patches_equal_the_whole_image(size: int, lengths: tuple[float, float], channels: int) -> None:
    quick = render(STATES, size, lengths, channels)
    whole = render_whole(STATES[:, :2], size, lengths, channels).view_as(quick)
    torch.testing.assert_close(quick, whole, rtol=0, atol=1e-6)


def test_a_hundredth_of_a_pixel_changes_the_image() -> None:
    size = 64
    angle_of_a_hundredth_pixel = 0.01 * (2 * MARGIN * 2) / size  # at the first bob, 1 m from the pivot
    moved = STATES.clone()
    moved[:, 0] += angle_of_a_hundredth_pixel
    changed = (render(moved, size) != render(STATES, size)).flatten(1).sum(dim=1)
    assert changed.min() > 20


def test_motion_and_change_of_the_image_are_proportional() -> None:
    moved, moved_twice = STATES.clone(), STATES.clone()
    moved[:, 0] += 1e-4
    moved_twice[:, 0] += 2e-4
    image = render(STATES.double(), 64)
    once, twice = ((render(s.double(), 64) - image).abs().sum() for s in (moved, moved_twice))
    assert twice / once == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_mirrored_state_gives_the_mirrored_image(channels: int) -> None:
    image, mirrored = (render(s, 64, channels=channels) for s in (STATES, -STATES))
    torch.testing.assert_close(mirrored, image.flip(-1), rtol=0, atol=2e-5)


def test_hanging_points_down_and_positions_agree_with_the_physics() -> None:
    size = 64
    hanging = render(torch.zeros(1, 4), size)[0, 0]
    assert hanging[: size // 2 - 2].sum() == 0
    assert hanging[size // 2 :, size // 2 - 1 : size // 2 + 1].sum() > 0.9 * hanging.sum() * 0.5
    # The brightest 3 x 3 neighborhood is a bob's: the bobs are thicker than the rods.
    state = torch.tensor([[0.7, -1.9, 0.0, 0.0]])
    image = render(state, size)
    x1, y1, x2, y2 = Pendulum().positions(state)[0].tolist()
    scale = size / (2 * MARGIN * 2)
    blurred = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2)[0, 0]
    for x, y in ((x1, y1), (x2, y2)):
        column, row = int(size / 2 + x * scale), int(size / 2 - y * scale)
        assert blurred[row, column] > 0.4


def test_a_stretched_pendulum_is_whole_in_every_direction() -> None:
    stretched = torch.stack([torch.tensor([a, a, 0.0, 0.0]) for a in torch.linspace(-3.1416, 3.1416, 64)])
    image = render(stretched, 32)
    assert (image.sum(dim=(1, 2, 3)) / image.sum(dim=(1, 2, 3)).mean() - 1).abs().max() < 0.05


def test_shapes_dtypes_and_range() -> None:
    image = render(STATES[:6].view(2, 3, 4).double(), 32, channels=3)
    assert image.shape == (2, 3, 3, 32, 32)
    assert image.dtype == torch.float64
    assert 0 <= image.min() and image.max() <= 1
    assert render(STATES[:0], 32).shape == (0, 1, 32, 32)


@pytest.mark.parametrize(("size", "channels", "message"), [(8, 1, "image_size=8"), (32, 2, "channels=2")])
def test_impossible_images_are_refused(size: int, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(STATES, size, channels=channels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same() -> None:
    torch.testing.assert_close(render(STATES.cuda(), 64).cpu(), render(STATES, 64), rtol=0, atol=1e-5)
