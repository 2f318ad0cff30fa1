"""Folders of Hugging Face: written, read back, and read by transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exchange import checkpoint, features, images, jepa  # noqa: F401

from jepa_lightning import IJEPA
from jepa_lightning.weights.__main__ import main
from jepa_lightning.weights.importing import load_encoder


def in_memory_layout(files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 5.23 calls the same weights."""
    names = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }
    found = {}
    for name, value in files.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[f"ijepa.{name}"] = value
    return found


@pytest.mark.parametrize("layout", ["files", "memory"])
def test_both_layouts_of_hugging_face_come_back_the_same(jepa: IJEPA, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "hf"
    main(["export", str(checkpoint), str(folder), "--layout", "huggingface"])
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    if layout == "memory":
        state = in_memory_layout(load_file(folder / "model.safetensors"))
        assert "ijepa.layers.0.attention.q_proj.weight" in state and "ijepa.layers.0.mlp.fc2.bias" in state
        save_file(state | {"classifier.weight": torch.zeros(10, 192)}, folder / "model.safetensors")
    torch.testing.assert_close(features(load_encoder(folder)), features(jepa), rtol=0, atol=0)


def test_transformers_gives_the_same_features(jepa: IJEPA, checkpoint: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    main(["export", str(checkpoint), str(tmp_path / "hf"), "--layout", "huggingface"])
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(images()).last_hidden_state
    torch.testing.assert_close(theirs, features(jepa), rtol=0, atol=0)
