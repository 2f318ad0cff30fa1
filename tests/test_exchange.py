"""Weights that come in from elsewhere and go out: nothing lost, nothing silently left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from conftest import small_ijepa, small_iwm, trainer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn, use_fused_attn

from jepa_lightning import IJEPA, load, start_from
from jepa_lightning.cli import main as command_line
from jepa_lightning.weights import formats
from jepa_lightning.weights.__main__ import main
from jepa_lightning.weights.checkpoints import load_jepa
from jepa_lightning.weights.importing import load_encoder, load_official

# What the released code at 52c1ae9 calls the weights of an encoder and a predictor of one block.
BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
RELEASED_ENCODER = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"} | {
    f"blocks.0.{part}.{kind}" for part in BLOCK for kind in ("weight", "bias")
}
RELEASED_PREDICTOR = {"mask_token", "predictor_pos_embed"} | {
    f"{part}.{kind}"
    for part in ["predictor_embed", "predictor_norm", "predictor_proj", *(f"predictor_blocks.0.{part}" for part in BLOCK)]
    for kind in ("weight", "bias")
}


@pytest.fixture
def jepa() -> IJEPA:
    """A model whose two encoders differ and whose weights are those of no initialization."""
    jepa = small_ijepa(predictor_heads=3).eval()
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return jepa


@pytest.fixture
def checkpoint(jepa: IJEPA, tmp_path: Path) -> Path:
    path = tmp_path / "ours.ckpt"
    runner = trainer(tmp_path)
    runner.strategy.connect(jepa)
    runner.save_checkpoint(path)
    return path


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def features(jepa: IJEPA) -> torch.Tensor:
    return jepa.encode(images())


def test_official_has_the_released_names_and_comes_back_the_same(jepa: IJEPA, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.pth.tar"
    main(["export", str(checkpoint), str(path), "--layout", "official"])
    found = torch.load(path, weights_only=True)
    for part in ("encoder", "target_encoder"):
        assert set(found[part]) == {f"module.{name}" for name in RELEASED_ENCODER}
    assert set(found["predictor"]) == {f"module.{name}" for name in RELEASED_PREDICTOR}
    assert found["encoder"]["module.pos_embed"].shape == (1, 16, 192)
    again = load_official(path)
    assert again.image_size == (16, 16)
    torch.testing.assert_close(again.state_dict(), jepa.state_dict(), rtol=0, atol=0)


def test_import_makes_a_checkpoint_that_probes_can_read(jepa: IJEPA, checkpoint: Path, tmp_path: Path) -> None:
    main(["export", str(checkpoint), str(tmp_path / "out.pth.tar"), "--layout", "official"])
    main(["import", str(tmp_path / "out.pth.tar"), str(tmp_path / "back" / "in.ckpt")])
    again = load_jepa(tmp_path / "back" / "in.ckpt")
    torch.testing.assert_close(features(again), features(jepa), rtol=0, atol=0)


@pytest.fixture
def same_attention() -> Iterator[None]:
    """timm's attention with plain products of matrices, as ours computes on a CPU: else the last digits differ."""
    fused = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(fused))


@pytest.mark.parametrize("which", ["target", "context"])
def test_timm_loads_the_folder_and_gives_the_same_embeddings(
    jepa: IJEPA, checkpoint: Path, tmp_path: Path, which: str, same_attention: None
) -> None:
    folder = tmp_path / "timm"
    main(["export", str(checkpoint), str(folder), "--layout", "timm", "--encoder", which])
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    encoder = jepa.target_encoder if which == "target" else jepa.context_encoder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(-1,)).eval()
    with torch.no_grad():
        patches = encoder(images())
        assert torch.equal(model(images()), patches.mean(dim=1))
        (found,) = maps(images())
        assert found.shape == (2, 192, 4, 4)
        assert torch.equal(model.norm(found.flatten(2).transpose(1, 2)), patches), "maps are those before the last norm"
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.new("RGB", (40, 30), (10, 200, 90))
    torch.testing.assert_close(transform(image), jepa.transform(image), atol=1e-6, rtol=1e-6)
    again = load(folder)
    torch.testing.assert_close(again.target_encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.context_encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)


def test_timm_takes_other_image_sizes(checkpoint: Path, tmp_path: Path) -> None:
    """Positions are interpolated there, where ours are computed: the same up to that."""
    main(["export", str(checkpoint), str(tmp_path / "timm"), "--layout", "timm"])
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, img_size=(32, 24)).eval()
    assert model(torch.randn(1, 3, 32, 24)).shape == (1, 192)


@pytest.mark.parametrize("which", ["target", "context"])
def test_a_file_of_timm_s_names_comes_back(jepa: IJEPA, checkpoint: Path, tmp_path: Path, which: str) -> None:
    path = tmp_path / "out.safetensors"
    main(["export", str(checkpoint), str(path), "--encoder", which])
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "depth": 1}
    vit = timm.create_model(
        *("vit_tiny_patch16_224",), **sizes, class_token=False, num_classes=0, global_pool="avg", fc_norm=False
    ).eval()
    vit.load_state_dict(load_file(path))
    encoder = jepa.target_encoder if which == "target" else jepa.context_encoder
    torch.testing.assert_close(load(path).target_encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)


def test_training_starts_from_an_encoder_alone(jepa: IJEPA, checkpoint: Path, tmp_path: Path) -> None:
    for layout in ("timm", "huggingface"):
        main(["export", str(checkpoint), str(tmp_path / layout), "--layout", layout])
        model = small_ijepa(predictor_heads=3)
        before = {name: value.clone() for name, value in model.predictor.state_dict().items()}
        start_from(model, tmp_path / layout)
        torch.testing.assert_close(features(model), features(jepa), rtol=0, atol=0)
        torch.testing.assert_close(model.context_encoder.state_dict(), jepa.target_encoder.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(model.predictor.state_dict(), before, rtol=0, atol=0)
    arguments = ["fit", "--model", "IJEPA", "--model.encoder", "vit_tiny_patch16_224", "--model.encoder_depth", "1"]
    arguments += [
        "--model.image_size",
        "16",
        "--model.patch_size",
        "4",
        "--model.predictor_width",
        "24",
        "--model.momentum=1",
    ]
    arguments += ["--model.predictor_depth", "1", "--data", "SyntheticImages", "--data.root", str(tmp_path / "shapes")]
    arguments += ["--data.size", "40", "--data.image_size", "16", "--data.batch_size", "8", "--trainer.max_steps", "1"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    command_line([*arguments, "--trainer.limit_val_batches", "0", "--init_from", str(tmp_path / "timm")])
    torch.testing.assert_close(features(load(tmp_path / "run")), features(jepa), rtol=0, atol=0)
    main(["export", str(checkpoint), str(tmp_path / "out.pth.tar"), "--layout", "official"])
    start_from(model, tmp_path / "out.pth.tar")
    torch.testing.assert_close(model.state_dict(), jepa.state_dict(), rtol=0, atol=0)


def test_safetensors_says_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    main(["export", str(checkpoint), str(tmp_path / "out.safetensors")])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() | {"depth": "1", "patch_size": "4", "image_size": "16,16"} == file.metadata()


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    main(["export", str(checkpoint), str(tmp_path / "hf"), "--layout", "huggingface"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 12}))
    with pytest.raises(ValueError, match=r"says 12 heads; vit_tiny_patch16_224 has 3"):
        load_encoder(tmp_path / "hf")
    run = trainer(tmp_path)
    run.strategy.connect(small_ijepa(predictor_heads=6))
    run.save_checkpoint(tmp_path / "six.ckpt")
    with pytest.raises(SystemExit, match="the predictor has 6 heads and the encoder 3"):
        main(["export", str(tmp_path / "six.ckpt"), str(tmp_path / "out.pth.tar"), "--layout", "official"])


def test_the_encoder_of_an_iwm_goes_out_too(tmp_path: Path) -> None:
    iwm, run = small_iwm(), trainer(tmp_path)
    run.strategy.connect(iwm)
    run.save_checkpoint(tmp_path / "iwm.ckpt")
    main(["export", str(tmp_path / "iwm.ckpt"), str(tmp_path / "out.safetensors")])
    torch.testing.assert_close(load_encoder(tmp_path / "out.safetensors").encode(images()), iwm.eval().encode(images()))
    with pytest.raises(SystemExit, match="holds a IWM: an IJEPA has all layouts"):
        main(["export", str(tmp_path / "iwm.ckpt"), str(tmp_path / "out.pth.tar"), "--layout", "official"])


def test_training_does_not_go_on_from_an_import(
    tmp_path: Path, image_root: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["export", str(checkpoint), str(tmp_path / "out.pth.tar"), "--layout", "official"])
    main(["import", str(tmp_path / "out.pth.tar"), str(tmp_path / "in.ckpt")])
    with pytest.raises(SystemExit):
        command_line(["fit", "--model", "IJEPA", "--data", "ImageFolder", "--data.root", str(image_root),
                      "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "in.ckpt")])  # fmt: skip
    assert "holds weights alone" in capsys.readouterr().err


def broken(change: str, state: dict[str, Any]) -> None:
    encoder = state["target_encoder"]
    match change:
        case "missing":
            del encoder["module.blocks.0.mlp.fc1.bias"]
        case "unknown":
            encoder["module.blocks.0.gamma"] = torch.ones(1)
        case "misshapen":
            encoder["module.blocks.0.norm1.weight"] = torch.ones(7)
        case "positions":
            encoder["module.pos_embed"] = encoder["module.pos_embed"].flip(2)
        case "predictor":
            state["predictor"]["module.mask_token"] = torch.zeros(1, 1, 9)
        case "no target encoder":
            del state["target_encoder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"target_encoder: blocks.0.mlp.fc1.bias is missing"),
        ("unknown", r"target_encoder: blocks.0.gamma is not known"),
        ("misshapen", r"blocks.0.norm1.weight has shape \(7,\), not \(192,\)"),
        ("positions", r"pos_embed is not I-JEPA's table of sines and cosines"),
        ("predictor", r"predictor: mask_token has shape \(1, 1, 9\), not \(1, 1, 24\)"),
        ("no target encoder", r"it has no target_encoder"),
    ],
)
def test_weights_that_do_not_match_are_fatal_and_listed(checkpoint: Path, tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "out.pth.tar"
    main(["export", str(checkpoint), str(path), "--layout", "official"])
    state = torch.load(path, weights_only=True)
    broken(change, state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        load_official(path)


def test_weights_of_something_else_are_one_message(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match=r"not the weights of an I-JEPA's vision transformer"):
        main(["import", str(tmp_path / "other.safetensors"), str(tmp_path / "in.ckpt")])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(SystemExit, match=r"cannot be read as a checkpoint"):
        main(["import", str(tmp_path / "cut.pth"), str(tmp_path / "in.ckpt")])
    with pytest.raises(SystemExit, match=r"No weights at"):
        main(["import", str(tmp_path / "nothing.pth"), str(tmp_path / "in.ckpt")])


def test_images_that_are_not_square_need_their_size(tmp_path: Path) -> None:
    jepa = small_ijepa(image_size=(16, 24))
    state = {"pos_embed": jepa.target_encoder.positions[None].clone(), **jepa.target_encoder.vit.state_dict()}
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="24 patches, which make no square: give image_size"):
        load_encoder(tmp_path / "wide.safetensors")
    assert load_encoder(tmp_path / "wide.safetensors", (16, 24)).image_size == (16, 24)
    with pytest.raises(ValueError, match="not I-JEPA's table"):
        load_encoder(tmp_path / "wide.safetensors", (24, 16))


def test_hugging_face_round_trip_keeps_every_weight(jepa: IJEPA) -> None:
    state = {"pos_embed": jepa.target_encoder.positions[None], **jepa.target_encoder.vit.state_dict()}
    torch.testing.assert_close(formats.from_hugging_face(formats.to_hugging_face(state)), state, rtol=0, atol=0)
