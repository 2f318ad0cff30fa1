"""What the readers of other formats share: actions, vectors and images as an `Episode` has them, and errors of one sentence.

Shapes: N rows, A scalars of an action, V scalars of a vector, H W pixels, C channels.
"""

import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def library(name: str) -> Any:
    """A package that only some formats need, imported when one of them is read.

    Raises:
        ValueError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'This recording needs {name.split(".")[0]}: pip install "jepa-lightning[data]".') from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong into one sentence that names what was read.

    Raises:
        ValueError: Something went wrong. Libraries raise nearly every kind for damaged files, so that all are caught; only a
            lack of memory is no fault of the file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()).rstrip(".")
        reason = said if type(error) is ValueError else f"{type(error).__name__}: {said}"
        raise ValueError(f"{what} cannot be read ({reason})") from error


def same_length(**columns: Any) -> None:
    """Check that columns, None among them left out, have as many rows as the first one.

    Raises:
        ValueError: One has another number of rows.
    """
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    first = next(iter(lengths))
    for name, length in lengths.items():
        if length != lengths[first]:
            raise ValueError(f"it has {lengths[first]} rows of {first}, and {length} of {name}")


def as_actions(values: NDArray[Any]) -> NDArray[Any]:
    """Actions as an `Episode` has them.

    Args:
        values: (N,) or (N, ...) numbers.

    Returns:
        (N, A) floats, or (N,) integers.

    Raises:
        ValueError: Each action is of several integers.
    """
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    if flat.dtype.kind == "f":
        return flat
    if flat.shape[1] != 1:
        raise ValueError(f"each of its actions is of {flat.shape[1]} integers, and only one choice at a time is known here")
    return flat[:, 0].astype(np.int64)


def as_vectors(columns: Sequence[NDArray[Any]]) -> NDArray[np.float32] | None:
    """Columns (N, ...) next to each other: (N, V); None if there are none."""
    flat = [column.reshape(len(column), int(np.prod(column.shape[1:]))).astype(np.float32) for column in columns]
    return np.concatenate(flat, axis=1) if flat else None


def scalar_names(name: str, shape: Sequence[int]) -> list[str]:
    """A name for each scalar of a column of that shape: the column's own if there is only one."""
    count = int(np.prod(shape))
    return [name] if count == 1 else [f"{name}.{number}" for number in range(count)]


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Pixels (H, W, C) of an image that was encoded as JPEG or PNG: gray stays gray, all else becomes RGB."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
