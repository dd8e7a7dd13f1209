"""Files in the safetensors format: arrays by name and a few strings, nothing that could be executed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pspnet_jax.weights.pytorch import WeightsFileError
from pspnet_jax.whole_files import write_whole

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def is_safetensors(path: Path | str) -> bool:
    """Whether a file begins as the format does: the length of a JSON header, then its brace."""
    with Path(path).open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def read(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays by name, and the file's metadata.

    Raises:
        WeightsFileError: where it is truncated or no such file.
    """
    with _opened(path) as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}


def read_metadata(path: Path | str) -> dict[str, str]:
    """The file's metadata alone; WeightsFileError as by `read`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise WeightsFileError(f"{path} cannot be read as safetensors: {error}") from None


def write(path: Path | str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays by name; the file appears when it is complete."""
    # The library takes the buffer as it lies in memory, whatever its strides; written by it, the file
    # would be readable by its owner alone.
    contiguous = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    write_whole(Path(path), save(contiguous, dict(metadata)))
