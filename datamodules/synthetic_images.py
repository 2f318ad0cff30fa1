"""Synthetic images (procedurally generated shapes), for trying things out where no images are at hand."""

from collections.abc import Callable

import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageDraw

from datamodules.image_folder import ImageFolder
from datamodules.new_folder import new_folder
from datamodules.rng import seeded_generator
from datamodules.views import Views

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a shape in pixels."""


def _triangle(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=color)


def _cross(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    third = (right - left) / 3
    draw.rectangle((left + third, top, right - third, bottom), fill=color)
    draw.rectangle((left, top + third, right, bottom - third), fill=color)


def _ring(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, ...]) -> None:
    draw.ellipse(box, outline=color, width=max(2, round((box[2] - box[0]) / 6)))


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, tuple[int, ...]], None]] = {
    "cross": _cross,
    "disc": lambda draw, box, color: draw.ellipse(box, fill=color),
    "ring": _ring,
    "square": lambda draw, box, color: draw.rectangle(box, fill=color),
    "triangle": _triangle,
}


def draw_shape(name: str, side: int, generator: torch.Generator) -> Image.Image:
    """One shape of random place, size and color on a shaded background of another.

    Args:
        name: Name of the shape, one of `SHAPES`.
        side: Height and width of the image, in pixels.
        generator: CPU generator from which all randomness comes.
    """
    numbers = torch.rand(9, generator=generator)
    shade = torch.linspace(0.4, 1, side)[:, None, None] * numbers[:3] * 255  # darker at the top
    pixels = (shade.expand(side, side, 3) + 12 * torch.randn(side, side, 3, generator=generator)).clamp(0, 255)
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    extent = side * (0.35 + 0.3 * numbers[3].item())
    left, top = ((side - extent) * place for place in numbers[4:6].tolist())
    # A color on the other side of gray from the background, so that the shape stands out.
    color = tuple((255 * torch.where(numbers[:3] > 0.5, numbers[6:9] / 2, 0.5 + numbers[6:9] / 2)).int().tolist())
    SHAPES[name](ImageDraw.Draw(image), (left, top, left + extent, top + extent), color)
    return image


class SyntheticImages(ImageFolder):
    """Crosses, discs, rings, squares and triangles, drawn once into a folder that everything else reads like any other.

    >>> data = SyntheticImages("shapes", size=20, batch_size=4)
    >>> data.prepare_data(), data.setup("fit")
    (None, None)
    >>> next(iter(data.val_dataloader())).images.shape, data.classes
    (torch.Size([4, 3, 32, 32]), ['cross', 'disc', 'ring', 'square', 'triangle'])

    Args:
        root: Folder to draw into; one that is there already is kept.
        size: Number of images.
        image_size: Height and width in pixels.
        val_fraction: Fraction of each class that is held out, in (0, 1).
        fraction: Fraction of each class that is trained on, in (0, 1].
        crop_scale: Minimum and maximum area of a training crop, as fractions of the image.
        flip: Probability of a horizontal flip in training.
        rand_augment: Two random distortions per training image (RandAugment).
        views: As for `ImageFolder`.
        batch_size: Images per batch and process.
        num_workers: Number of processes that decode.
        seed: Seed of images, splits, orders, crops and masks.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    def __init__(
        self,
        root: str = "data/shapes",
        size: int = 3_000,
        image_size: int = 32,
        val_fraction: float = 0.2,
        fraction: float = 1.0,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        flip: float = 0.5,
        rand_augment: bool = False,
        views: Views | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            image_size=image_size,
            val_fraction=val_fraction,
            fraction=fraction,
            crop_scale=crop_scale,
            flip=flip,
            rand_augment=rand_augment,
            views=views,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if size < 2 * len(SHAPES):
            raise ValueError(f"data.size={size}: {len(SHAPES)} shapes need at least {2 * len(SHAPES)} images.")
        self.size = size

    def prepare_data(self) -> None:
        """Draw the images into a folder that appears when all are there; see `new_folder` for what a killed run leaves."""
        if self.root.exists():
            return
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            raise FileNotFoundError(f"There is no folder {self.root} to predict on: nothing is drawn for that.")
        with new_folder(self.root) as folder:
            for name in SHAPES:
                (folder / name).mkdir()
            for number in range(self.size):
                name = sorted(SHAPES)[number % len(SHAPES)]
                image = draw_shape(name, self.image_size[0], seeded_generator(self.seed, number))
                image.save(folder / name / f"{number:06d}.png")
