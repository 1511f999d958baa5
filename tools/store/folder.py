"""The folder of a store: where things lie, how it is made, and the lock of its one writer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from exegete.tools.errors import UserError
from exegete.tools.store.compaction import SPILLED
from exegete.tools.store.investigations import FOLDER as INVESTIGATIONS
from exegete.tools.store.naming import evidence_path
from exegete.tools.store.parts import remove_orphans, require_one_file, sync_file, sync_folder
from exegete.tools.store.publishing import SNAPSHOT, discard
from exegete.tools.store.schema import MEMORY, QUIET, migrate
from exegete.tools.store.writer import Writer

FORMAT = 1
_MARKER = "store.json"
_DATABASE = "run.duckdb"
_FOLDERS = ("evidence", "verdicts", "calls", "embeddings", "corpora", "passes", "controls", INVESTIGATIONS)


class BeingWritten(UserError):
    """Another process writes to the store."""


@dataclass(frozen=True, slots=True)
class Store:
    """A store's folder. Make one with `Store.create_or_open` or `Store.open`."""

    folder: Path
    """Absolute."""

    @classmethod
    def create_or_open(cls, folder: Path) -> Store:
        """Open the store in `folder`, or make one there if the folder is missing or empty.

        Raises:
            UserError: the folder holds something that is no store, or a store of a newer format.
        """
        if (folder / _MARKER).exists():
            return cls.open(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strangers = [entry.name for entry in folder.iterdir() if entry.name not in (*_FOLDERS, f".{_MARKER}")]
            if strangers:
                raise UserError(
                    f"{str(folder)!r} is no store and holds {min(strangers)!r}; name an empty or a new folder"
                )
            for name in _FOLDERS:
                (folder / name).mkdir(exist_ok=True)
            marker = folder / f".{_MARKER}"
            marker.write_text(json.dumps({"format": FORMAT}))
            marker.rename(folder / _MARKER)
            sync_folder(folder)
        except OSError as error:
            raise UserError(
                f"cannot make a store in {str(folder)!r} ({error.strerror}); name another folder"
            ) from error
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the store in `folder`.

        Raises:
            UserError: there is none, or it has a newer format.
        """
        marker = folder / _MARKER
        if not marker.exists():
            raise UserError(f"{str(folder)!r} is no store; make one with `exegete label --store {folder}`")
        try:
            found = int(json.loads(marker.read_text())["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(marker)!r} is damaged; restore it as {json.dumps({'format': FORMAT})}") from error
        if found > FORMAT:
            raise UserError(
                f"{str(folder)!r} has store format {found}; this exegete knows {FORMAT}: pip install -U exegete"
            )
        return cls(folder.resolve())

    def evidence_folder(self, dictionary: str, control: bool = False) -> Path:
        """Return where the evidence of the dictionary with this fingerprint lies (`sha256:…` or bare hex digits).

        `control`: it is the random-weight control of another dictionary.
        """
        return self.folder / evidence_path(dictionary, control)

    @property
    def corpora(self) -> Path:
        """Where token stores lie."""
        return self.folder / "corpora"

    @property
    def controls(self) -> Path:
        """Where random-weight controls keep what they are made from, and their evidence."""
        return self.folder / "controls"

    @property
    def passes(self) -> Path:
        """Where activation passes keep their working files."""
        return self.folder / "passes"

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Open the store for writing; everything else may go on reading the published snapshot.

        On entry migrations are applied, parts of verdicts, calls and embeddings that no transaction registered are removed,
        and records of investigations are taken in.

        Raises:
            UserError: another process writes (its pid is named), the store has a newer schema, or the disk is full.
        """
        with _locked(self.folder):
            connection = _open_database(self.folder)
            writer = Writer(self.folder, connection)
            try:
                writer.take_in_investigations()
                yield writer
            finally:
                writer.close()

    def show_investigations(self) -> bool:
        """Take in the records of investigations and publish them, where no other process writes; return whether that was done.

        A process that writes does both by itself, at its next publishing.

        Raises:
            UserError: the store has a newer schema, or the disk is full.
        """
        try:
            with self.writer() as writer:
                writer.publish()
        except BeingWritten:
            return False
        return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the writer's lock. The kernel frees it with the process, however that ends, so no lock is ever stale."""
    descriptor = os.open(folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise BeingWritten(
                f"process {pid} is writing to the store {str(folder)!r}; wait until it ends, or stop it (kill {pid})"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _make_database(folder: Path, where: str) -> None:
    """Make the database aside: one that a crash or a full disk left half made could never be opened again."""
    temporary = folder / f".{_DATABASE}.making"
    for path in (temporary, temporary.with_name(f"{temporary.name}.wal")):
        path.unlink(missing_ok=True)
    with duckdb.connect(str(temporary)) as connection:
        migrate(connection, where)
        connection.execute("CHECKPOINT")
    require_one_file(temporary)
    sync_file(temporary)
    temporary.rename(folder / _DATABASE)
    sync_folder(folder)


def _open_database(folder: Path) -> duckdb.DuckDBPyConnection:
    where = f"the store {str(folder)!r}"
    try:
        if not (folder / _DATABASE).exists():
            _make_database(folder, where)
        # What a killed process could not keep in memory.
        for name in (f"{_DATABASE}.tmp", SPILLED):
            shutil.rmtree(folder / name, ignore_errors=True)
        connection = duckdb.connect(str(folder / _DATABASE), config={"memory_limit": MEMORY})
    except (duckdb.Error, OSError) as error:
        raise UserError(
            f"{where} cannot be opened ({str(error).splitlines()[0]}); is its disk full, or the file damaged?"
        ) from error
    try:
        connection.execute(QUIET)
        migrate(connection, where)
        for kind in ("verdict", "call", "embedding"):
            registered = {part for (part,) in connection.execute(f"SELECT part FROM data.{kind}_parts").fetchall()}
            (folder / f"{kind}s").mkdir(exist_ok=True)
            # A process that was killed may have superseded parts that its snapshot still names.
            remove_orphans(folder / f"{kind}s", registered | _published(folder, kind))
        discard(folder)
    except (duckdb.IOException, duckdb.FatalException, OSError) as error:
        connection.close()
        raise UserError(
            f"cannot write to {where} ({str(error).splitlines()[0]}); free some space and resume"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _published(folder: Path, kind: str) -> set[str]:
    """Return the parts that the views of the published snapshot read; none where there is no snapshot that can be read."""
    if not (folder / SNAPSHOT).exists():
        return set()
    quoted = str(folder / SNAPSHOT).replace("'", "''")
    with duckdb.connect(":memory:") as connection:
        try:
            connection.execute(f"ATTACH '{quoted}' AS labels (READ_ONLY)")
            return {part for (part,) in connection.execute(f"SELECT part FROM labels.data.{kind}_parts").fetchall()}
        except duckdb.Error:
            # Damaged, or published by a version that had no such parts yet.
            return set()
