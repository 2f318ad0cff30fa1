"""`predict` gives embeddings of the target encoder, of every family."""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, apart, small_data, small_model, trainer


@pytest.mark.parametrize(("model", "data"), FAMILIES.values(), ids=FAMILIES)
def test_images_are_pooled_embeddings_of_the_target_encoder(model, data, tmp_path: Path, image_root: Path) -> None:
    jepa, held_out = model(), data(image_root)
    apart(jepa)
    predicted = torch.cat(trainer(tmp_path).predict(jepa, held_out))
    batches = [held_out.on_after_batch_transfer(batch, 0) for batch in held_out.predict_dataloader()]
    images = torch.cat([batch.images for batch in batches])
    assert predicted.shape == (30, 192), "all of the folder, in order"
    with torch.no_grad():
        torch.testing.assert_close(predicted, jepa.target_encoder.eval()(images).mean(dim=1))


def test_windows_are_embeddings_of_the_target_encoder(tmp_path: Path) -> None:
    jepa, data = small_model(), small_data(test_sequence_length=12)
    apart(jepa)
    predicted = torch.cat(trainer(tmp_path).predict(jepa, data))
    observed = data.observe(data.trajectories("test")).observations
    with torch.no_grad():
        torch.testing.assert_close(predicted, jepa.encode_windows(jepa.target_encoder.eval(), observed))
