"""How a model has seen images: the range and normalization that its checkpoint keeps."""

from typing import Any

from lightning.pytorch import LightningModule

from datamodules.pixel_format import PixelFormat, agree


class SeesImages(LightningModule):
    """A module that sees images as it did in training: the same range of values, mean and standard deviation."""

    channels: int
    """Number of channels of its images."""

    known_pixels: PixelFormat | None = None
    """How it has seen images: of its checkpoint, or of its first data; None before both."""

    @property
    def pixels(self) -> PixelFormat:
        """Range of values and normalization of the images that it takes; ImageNet's unless it was trained otherwise."""
        return self.known_pixels or PixelFormat(self.channels)

    @property
    def data(self) -> Any:
        """The data module of its run, None outside of one."""
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.known_pixels is not None:
            checkpoint["pixels"] = self.known_pixels.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "pixels" in checkpoint:
            self.known_pixels = agree(PixelFormat.from_dict(checkpoint["pixels"]), self.channels, self.data)
