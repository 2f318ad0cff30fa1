"""Embeddings out: what `predict` computes, as files."""

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[Any, tuple[int, ...]]]

PROJECTED = 1000
"""Images in TensorBoard's projector, at most: their thumbnails are one image of 8192 pixels a side at most."""

THUMBNAIL = 32
"""Height and width of a thumbnail in pixels."""


class EmbeddingWriter(Callback):
    """Write the embeddings of all images of a folder, in order, and a table of their files and classes.

    embeddings.safetensors (or .npz) holds "embeddings" (N, D) in float32, with `patches` also "patches" (N, P, D) in
    float16; index.csv names the file and the class of each row. Processes write their own rows into one file that they
    map into memory, so nothing is gathered and nothing repeated. A run that was cut goes on with the rows that are missing.
    Files that cannot be decoded have no row; the log names them.

    Args:
        dirpath: Folder to write into; RUN/predict/NAME by default, with the name of the folder of images.
        format: "safetensors" or "npz".
        patches: Also write the embeddings of the patches.
        projector: Show images by their embeddings in TensorBoard's projector.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        format: Literal["safetensors", "npz"] = "safetensors",
        patches: bool = False,
        projector: bool = True,
    ) -> None:
        if format not in ("safetensors", "npz"):
            raise ValueError(f"format={format!r}: choose 'safetensors' or 'npz'.")
        self.dirpath, self.format, self.patches, self.projector = dirpath, format, patches, projector
        self._rows: dict[str, np.memmap] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "predict" or trainer.fast_dev_run:
            return
        if not hasattr(data, "predict_files"):
            raise ValueError(
                f"Embeddings are written of folders of images, not of {type(data).__name__}: use model.encode in Python."
            )
        self.folder = self._folder(trainer, data)
        model: Any = pl_module
        model.predict_patches = self.patches
        count, dim = len(data.predict_files.labels), model.embedding_dim
        shapes: Shapes = {"done": (np.uint8, (count,)), "embeddings": (np.float32, (count, dim))}
        if self.patches:
            rows, columns = model.target_encoder.grid
            shapes["patches"] = (np.float16, (count, rows * columns, dim))
        identity = self._identity(trainer, model, data)
        if trainer.is_global_zero:
            self._make(shapes, identity)
        trainer.strategy.barrier("files of embeddings")
        self._rows = {name: np.lib.format.open_memmap(self._part(name), mode="r+") for name in shapes}
        missing = np.flatnonzero(self._rows["done"] == 0).tolist()
        if len(missing) < count:
            rank_zero_info(f"{count - len(missing)} of {count} embeddings are in {self.folder} already.")
        data.predict_indices = missing

    def _folder(self, trainer: Trainer, data: Any) -> Path:
        """Where to write: by the name of the folder of images, with more behind it if that is another folder's already."""
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "predict" / Path(data.root).resolve().name)
        note, source = folder / "source.json", _source(data)
        if self.dirpath is None and note.is_file() and json.loads(note.read_text())["root"] != source:
            folder = folder.with_name(f"{folder.name}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:6]}")
        return folder

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.npy.part"

    def _identity(self, trainer: Trainer, model: Any, data: Any) -> str:
        """Distinguishes these embeddings, of these files by these weights, from others."""
        files = hashlib.sha256(b"\0".join([os.fsencode(_source(data)), *data.predict_files.paths.tolist()]))
        files.update(repr((trainer.ckpt_path, data.image_size, getattr(data, "pixels", None), self.patches)).encode())
        if trainer.ckpt_path and os.path.exists(trainer.ckpt_path):
            files.update(str(os.stat(trainer.ckpt_path).st_mtime_ns).encode())
        elif not trainer.ckpt_path:  # else the weights are not there yet
            files.update(repr([parameter.double().sum().item() for parameter in model.target_encoder.parameters()]).encode())
        return files.hexdigest()

    def _make(self, shapes: Shapes, identity: str) -> None:
        """Empty files of all rows, unless those of a run that was cut are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "part.json"
        files = [note, *(self._part(name) for name in shapes)]
        if all(file.is_file() for file in files) and json.loads(note.read_text()) == identity:
            return
        note.unlink(missing_ok=True)
        for name, (dtype, shape) in shapes.items():
            np.lib.format.open_memmap(self._part(name), mode="w+", dtype=dtype, shape=shape)
        note.write_text(json.dumps(identity))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._rows:
            return
        rows, found = list(batch.key), outputs.detach().float().cpu()
        if self.patches:
            self._rows["patches"][rows] = found.numpy()
            found = found.mean(dim=1)
        self._rows["embeddings"][rows] = found.numpy()
        self._rows["done"][rows] = 1  # last, so that a row that counts is there

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._rows:
            return
        for rows in self._rows.values():
            rows.flush()
        trainer.strategy.barrier("embeddings")
        if trainer.is_global_zero:
            self._finish(trainer)
        trainer.strategy.barrier("files of embeddings are complete")
        self._forget(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._rows:
            self._forget(trainer, pl_module)

    def _forget(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave model and data as they were found."""
        self._rows = {}
        model: Any = pl_module
        data: Any = trainer.datamodule
        model.predict_patches, data.predict_indices = False, None

    def _finish(self, trainer: Trainer) -> None:
        data: Any = trainer.datamodule
        kept = np.flatnonzero(self._rows["done"])
        left_out = len(self._rows["done"]) - len(kept)
        if not len(kept) or left_out > data.num_unreadable:
            rank_zero_warn(
                f"{len(kept)} of {len(self._rows['done'])} images have embeddings; {data.num_unreadable} cannot be decoded. "
                f"If the rest was not asked for, run it again without a limit: {self.folder} keeps what there is."
            )
            return
        names = [name for name in ("embeddings", "patches") if name in self._rows]
        whole = len(kept) == len(self._rows["done"])
        arrays = {name: self._rows[name] if whole else self._rows[name][kept] for name in names}
        path = self.folder / f"embeddings.{self.format}"
        partial = path.with_name(f"part-{path.name}")  # what may be there already stays until this is complete
        if self.format == "npz":
            np.savez(partial, **arrays)  # type: ignore[arg-type]
        else:
            save_file({name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}, partial)
        partial.replace(path)
        files = data.predict_files
        labels = [data.predict_classes[label] if label >= 0 else "" for label in files.labels[kept].tolist()]
        with (self.folder / "index.csv").open("w", newline="", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["row", "path", "label"])
            for row, (path_bytes, label) in enumerate(zip(files.paths[kept].tolist(), labels, strict=True)):
                table.writerow([row, os.fsdecode(path_bytes), label])
        (self.folder / "source.json").write_text(
            json.dumps({"root": _source(data), "checkpoint": str(trainer.ckpt_path)}) + "\n"
        )
        projected = arrays["embeddings"][self._spread(len(kept))].copy()
        for name in self._rows:
            self._part(name).unlink(missing_ok=True)
        (self.folder / "part.json").unlink(missing_ok=True)
        rank_zero_info(
            f"{path}: {len(kept)} embeddings of {arrays['embeddings'].shape[1]} numbers; index.csv names their files."
            + (f" {left_out} files could not be decoded and have no row." if left_out else "")
        )
        if self.projector:
            self._project(trainer, projected, kept, labels)

    @staticmethod
    def _spread(count: int) -> np.ndarray:
        """Places of at most `PROJECTED` rows, spread evenly."""
        return np.unique(np.linspace(0, count - 1, min(PROJECTED, count)).round().astype(int))

    def _project(self, trainer: Trainer, embeddings: np.ndarray, kept: np.ndarray, labels: list[str]) -> None:
        """Hand some embeddings with thumbnails to TensorBoard."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if logger is None or len(kept) < 2:
            return
        chosen, data = self._spread(len(kept)), trainer.datamodule
        thumbnails = data.thumbnails(kept[chosen].tolist(), THUMBNAIL)
        names = [os.fsencode(labels[place]).decode("utf-8", "backslashreplace") or "-" for place in chosen]
        tag = self.folder.name
        logger.experiment.add_embedding(torch.from_numpy(embeddings), metadata=names, label_img=thumbnails, tag=tag)


def _source(data: Any) -> str:
    """Where images come from: their folder, and what else distinguishes them."""
    return " ".join([str(Path(data.root).resolve()), *([data.source_name] if getattr(data, "source_name", "") else [])])
