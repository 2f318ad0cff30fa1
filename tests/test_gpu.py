"""What can only be seen on a GPU: that no training step waits for it. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    small_driven_data,
    small_driven_model,
    small_ijepa,
    small_images,
    small_iwm,
    small_views,
    trainer,
    write_images,
)
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WARM_UP, WATCHED = 5, 50


class Watch(Callback):
    """Every call that waits for the device is an error, from one batch to another."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP + WATCHED - 1:
            torch.cuda.set_sync_debug_mode("default")


def pendulum(_: Path) -> tuple[LightningModule, LightningDataModule]:
    model = small_driven_model(observation="pixels", image_size=16, encoder_widths=(4,), regularizer="sigreg")
    return model, small_driven_data(observation="pixels", image_size=16, size=256)


def ijepa(image_root: Path) -> tuple[LightningModule, LightningDataModule]:
    return small_ijepa(), small_images(image_root, batch_size=1)


def iwm(image_root: Path) -> tuple[LightningModule, LightningDataModule]:
    return small_iwm(regularizer="variance_hinge"), small_views(image_root, batch_size=1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("family", [pendulum, ijepa, iwm])
def test_no_training_step_waits_for_the_gpu(tmp_path: Path, family: Any, precision: Any) -> None:
    for hue, name in enumerate(("ant", "bee")):
        write_images(tmp_path / "images" / name, 40, hue=hue)
    model, data = family(tmp_path / "images")
    run = trainer(
        tmp_path,
        accelerator="gpu",
        precision=precision,
        max_steps=WARM_UP + WATCHED + 1,
        log_every_n_steps=1000,  # what is written to a log is waited for
        callbacks=[Watch()],
    )
    try:
        run.fit(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step == WARM_UP + WATCHED + 1
    assert run.optimizers[0].param_groups[0]["fused"]
