"""The folder of an activation pass: its manifest, its slices, and whatever else is complete or absent.

    manifest.json               what the parts were made from and with; a resumed pass must match it
    slice-00000-of-00004/       one piece of the corpus, renamed into place when complete
        events.parquet          what may still matter (EVENTS), sorted by latent within each row group run
        pool.parquet            every firing window of the pool (POOL)
        statistics.npz          integer sums
        done.json               bytes and rows of each file
    selected.parquet, …         later stages, each written aside and renamed

Parquet pages carry checksums. A part that is not what `done.json` says, or cannot be read, is a UserError.

Several workers may write into one folder, on shared storage: whatever is unfinished has a name that no other process
uses, and of two workers that do the same slice, the first to rename it wins; the other's copy, equal bit for bit, is
thrown away.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exegete.tools.errors import UserError
from exegete.tools.firing_events import Events, Statistics

EVENTS = pa.schema(
    [
        ("latent", pa.int32()),
        ("split", pa.uint8()),
        ("window", pa.int64()),
        ("peak", pa.float32()),
        ("positions", pa.list_(pa.int16())),
        ("values", pa.list_(pa.float32())),
    ]
)
POOL = pa.schema([("latent", pa.int32()), ("window", pa.int64()), ("peak", pa.float32())])
ROW_GROUP = 32_768
_STATISTICS = ("firings", "windows", "whole", "fraction", "peak", "histogram")
_NOT_COMPARED = ("threads",)
"""What a manifest says of how the pass was begun. Who goes on with it takes that over, and need not have the same."""


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or hold it against the one that is there.

    Raises:
        UserError: the folder holds parts that were made from or with something else.
    """
    path = folder / "manifest.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(dict(manifest), indent=1, sort_keys=True).encode())
        return
    stored, wanted = _comparable(read_manifest(folder)), _comparable(json.loads(json.dumps(dict(manifest))))
    differing = sorted(key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key))
    if differing:
        key = differing[0]
        raise UserError(
            f"{str(folder)!r} holds parts of another activation pass ({key} was {stored.get(key)!r}, "
            f"now {wanted.get(key)!r}); remove that folder or name another"
        )


def _comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two parts of one pass must have in common. Which of several GPUs it was does not count."""
    kept = {key: value for key, value in manifest.items() if key not in _NOT_COMPARED}
    return kept | {"device": str(kept.get("device")).partition(":")[0]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises UserError where there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} holds no activation pass ({error}); run `exegete label`") from error
    return manifest


def slice_folders(folder: Path, slices: int) -> list[Path]:
    """Return where each of `slices` slices belongs."""
    return [folder / f"slice-{index:05d}-of-{slices:05d}" for index in range(slices)]


def is_complete(part: Path) -> bool:
    """Return whether a slice is there and whole.

    Raises:
        UserError: it is there, but a file of it is truncated or missing.
    """
    if not part.exists():
        return False
    try:
        done = json.loads((part / "done.json").read_text())
        for name, (size, rows) in done.items():
            if (part / name).stat().st_size != size:
                raise ValueError(f"{name} has {(part / name).stat().st_size} bytes, not {size}")
            if rows is not None and pq.read_metadata(part / name).num_rows != rows:
                raise ValueError(f"{name} has not {rows} rows")
    except (OSError, ValueError) as error:
        raise damaged(part, error) from error
    return True


def damaged(part: Path, error: Exception) -> UserError:
    """Return the error to raise for a part that cannot be read."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"part {str(part)!r} is damaged ({first}); remove it and run again")


def open_part(path: Path) -> pq.ParquetFile:
    """Open a Parquet file of a pass for reading, its pages checked. Raises UserError where it is truncated or missing."""
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder`, with `done.json`, if the block ends without an error.

    Where another worker has put `folder` there in the meantime, that one stays.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    _remove_unfinished_of_the_dead(folder)
    temporary = _aside(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        done = {}
        for path in sorted(temporary.iterdir()):
            rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
            done[path.name] = (path.stat().st_size, rows)
            sync(path)
        write_bytes(temporary / "done.json", json.dumps(done).encode())
        sync(temporary)
        _rename_unless_there(temporary, folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {str(folder)!r} ({error}); mend that and run again") from error
        raise


def _aside(path: Path) -> Path:
    """Return the name of an unfinished file or folder: of this machine, this process, and this attempt."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.writing")


def _rename_unless_there(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (folder / "done.json").exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unfinished_of_the_dead(path: Path) -> None:
    """Remove what processes of this machine that have ended left of `path`."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.writing"):
        pid = left.name.rsplit(".", 3)[1]
        if not (pid.isdecimal() and _runs(int(pid))):
            _remove(left)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(left: Path) -> None:
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what lost workers left in the folder of a pass, whose slices are all complete."""
    for left in folder.glob(".slice-*.writing"):
        shutil.rmtree(left, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`."""
    _remove_unfinished_of_the_dead(path)
    temporary = _aside(path)
    try:
        write(temporary)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {str(path)!r} ({error}); mend that and run again") from error


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer for parts: cheap to write, checksummed."""
    return pq.ParquetWriter(
        path, schema, compression="lz4", use_dictionary=False, write_statistics=["latent"], write_page_checksum=True
    )


def events_table(events: Events) -> pa.Table:
    """Return the events as rows of EVENTS, sorted by latent."""
    order = np.sort(events.latents * (1 << 32) + np.arange(len(events.latents))) & 0xFFFFFFFF
    events = events.take(order)
    offsets = pa.array(np.append(events.starts, len(events.values)).astype(np.int32))
    return pa.table(
        [
            pa.array(events.latents.astype(np.int32)),
            pa.array(events.splits.astype(np.uint8)),
            pa.array(events.windows),
            pa.array(events.peaks),
            pa.ListArray.from_arrays(offsets, pa.array(events.positions)),
            pa.ListArray.from_arrays(offsets, pa.array(events.values)),
        ],
        schema=EVENTS,
    )


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write the sums, uncompressed."""
    with path.open("wb") as file:
        np.savez(file, tokens=statistics.tokens, **{name: getattr(statistics, name) for name in _STATISTICS})


def load_statistics(part: Path, latents: int) -> Statistics:
    """Read a slice's sums. Raises UserError where they are damaged."""
    statistics = Statistics(latents)
    try:
        with np.load(part / "statistics.npz", allow_pickle=False) as stored:
            statistics.tokens = int(stored["tokens"])
            for name in _STATISTICS:
                getattr(statistics, name)[...] = stored[name]
    except Exception as error:
        raise damaged(part, error) from error
    return statistics


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file aside and rename it."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_whole(path, write)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
