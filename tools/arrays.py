"""New arrays on disk, mapped into memory, for which the disk has room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 20


def new_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return a new `.npy` file at `path`, all zeros, mapped for writing.

    The zeros are written before the file is mapped: a map of a hole in the file ends the process (SIGBUS) when the disk
    turns out to be full.

    Raises:
        OSError: there is no room for it.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        left = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        zeros = bytes(min(left, _BLOCK))
        while left:
            left -= file.write(zeros[:left])
    empty = 0 in shape
    array: npt.NDArray[Any] = np.load(path, mmap_mode=None if empty else "r+", allow_pickle=False)
    return array
