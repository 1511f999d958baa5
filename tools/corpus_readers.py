"""Documents from files and datasets, one at a time, whatever the form.

    stories.txt               documents between `<|endoftext|>` or a separator of one's own; in a text without either,
                              paragraphs (blank lines between) gathered until a document has 2,000 characters
    pages.jsonl[.gz|.zst]     one JSON object (or string) a line; its `text_field` is the document
    pages.json                one JSON list of such
    pages.parquet             its column `text_field`
    a folder                  all files of these kinds in it, by name; or what `datasets.save_to_disk` wrote
    hf:name[:config][:split]  a dataset of the Hugging Face hub, streamed (split "train" unless named)

Bytes that are not UTF-8 become U+FFFD and are counted; nothing stops for them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import mmap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from exegete.tools.errors import UserError, nearest
from exegete.tools.seeds import digest

END_OF_TEXT = "<|endoftext|>"
GATHERED_CHARACTERS = 2_000
LONGEST_DOCUMENT = 1 << 20
"""Bytes after which a text file's document is cut, so that a file without any separator does not fill the memory."""

_ENDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")


@dataclass
class Source:
    """Where documents come from, and what was wrong with them."""

    spec: str
    text_field: str = "text"
    separator: str | None = None
    """Between the documents of a `.txt`; None: `<|endoftext|>` where it occurs, else blank lines (see above)."""
    invalid_utf8: int = 0
    """Places replaced by U+FFFD so far, in `documents`."""

    def documents(self) -> Iterator[str]:
        """Yield the text of each document, in order.

        Raises:
            UserError: the source is missing, of an unknown kind, damaged, or has no such field.
        """
        self.invalid_utf8 = 0
        for text in self._texts():
            yield self._encodable(text)

    def _texts(self) -> Iterator[str]:
        if self.spec.startswith("hf:"):
            yield from self._hub()
            return
        path = _existing(self.spec)
        if path.is_dir() and _is_saved_dataset(path):
            yield from self._saved_dataset(path)
            return
        for file in _files(path):
            with _readable(file):
                yield from self._file(file)

    def identity(self) -> str:
        """Return `sha256:…` over everything that decides the documents: the files' content, or the dataset's name."""
        parts = [self.text_field, self.separator or ""]
        if self.spec.startswith("hf:"):
            return digest("hf", self.spec, *parts)
        path = _existing(self.spec)
        for file in sorted(path.rglob("*")) if _is_saved_dataset(path) else _files(path):
            if file.is_file():
                with file.open("rb") as opened:
                    parts += [file.name, hashlib.file_digest(opened, "sha256").hexdigest()]
        return digest("files", *parts)

    def _file(self, path: Path) -> Iterator[str]:
        match _end(path):
            case ".txt":
                yield from self._text(path)
            case ".jsonl" | ".jsonl.gz" | ".jsonl.zst":
                with _opened(path) as file:
                    yield from self._lines(file, path)
            case ".json":
                yield from self._list(path)
            case _:
                yield from self._parquet(path)

    def _text(self, path: Path) -> Iterator[str]:
        separator = self.separator or (END_OF_TEXT if _contains(path, END_OF_TEXT) else None)
        with path.open("rb") as file:
            pieces = _gathered(file) if separator is None else _separated(file, separator.encode())
            for piece in pieces:
                yield self._decode(piece)

    def _lines(self, file: IO[bytes], path: Path) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(self._decode(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{str(path)!r}, line {number} is not JSON ({error.msg}); one object a line is expected"
                ) from error
            yield self._field(row, f"{str(path)!r}, line {number}")

    def _list(self, path: Path) -> Iterator[str]:
        try:
            rows = json.loads(self._decode(path.read_bytes()))
        except json.JSONDecodeError as error:
            raise UserError(f"{str(path)!r} is not JSON ({error}); for one object a line, name it .jsonl") from error
        if not isinstance(rows, list):
            raise UserError(f"{str(path)!r} holds a JSON {type(rows).__name__}; a list of texts or objects is expected")
        for number, row in enumerate(rows):
            yield self._field(row, f"{str(path)!r}, item {number}")

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        if self.text_field not in file.schema_arrow.names:
            raise self._no_field(file.schema_arrow.names, repr(str(path)))
        for batch in file.iter_batches(batch_size=1024, columns=[self.text_field]):
            for value in batch.column(0).to_pylist():
                yield self._field({self.text_field: value}, repr(str(path)))

    def _saved_dataset(self, path: Path, split: str | None = None) -> Iterator[str]:
        from datasets import DatasetDict, load_from_disk

        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            name = split or ("train" if "train" in dataset else next(iter(dataset)))
            if name not in dataset:
                raise UserError(f"dataset {str(path)!r} has no split {name!r}; it has {', '.join(dataset)}")
            dataset = dataset[name]
        yield from self._rows(dataset)

    def _hub(self) -> Iterator[str]:
        from datasets import load_dataset

        name, *rest = self.spec.removeprefix("hf:").split(":")
        split = rest[-1] if rest else "train"
        path = Path(name).expanduser()
        if path.is_dir() and _is_saved_dataset(path):
            yield from self._saved_dataset(path, split if rest else None)
            return
        try:
            dataset = load_dataset(name, rest[0] if len(rest) > 1 else None, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot read dataset {self.spec!r}; expected hf:name[:config][:split] ({reason})"
            ) from error
        yield from self._rows(dataset)

    def _rows(self, dataset: Any) -> Iterator[str]:
        for row in dataset:
            yield self._field(row, f"dataset {self.spec!r}")

    def _field(self, row: Any, where: str) -> str:
        """Return the text of a row: a string, an object with the field, or a list of paragraphs in either."""
        value = row
        if isinstance(row, dict):
            if self.text_field not in row:
                raise self._no_field(list(row), where)
            value = row[self.text_field]
        if isinstance(value, list):
            value = "\n".join(map(str, value))
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(f"{where}: the text is a {type(value).__name__}, expected a string; set text_field")
        return value

    def _no_field(self, names: list[str], where: str) -> UserError:
        hint = nearest(self.text_field, names)
        return UserError(f"{where} has no field {self.text_field!r}; it has {', '.join(names)}: set text_field.{hint}")

    def _encodable(self, text: str) -> str:
        """Replace halves of surrogate pairs, which JSON can spell ("\\ud83d") and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.invalid_utf8 += sum("\ud800" <= character <= "\udfff" for character in text)
            return text.encode(errors="replace").decode()
        return text

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            self.invalid_utf8 += text.count("\ufffd") - data.count("\ufffd".encode())
            return text


def require_source(spec: str) -> None:
    """Look whether the corpus is there, without reading it; what is on the hub is not asked for.

    Raises:
        UserError: it is missing, or of an unknown kind.
    """
    if not spec.startswith("hf:"):
        path = _existing(spec)
        if not (path.is_dir() and _is_saved_dataset(path)):
            _files(path)


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"there is no corpus {spec!r}; give a file ({', '.join(_ENDS)}), a folder of them, or hf:name")
    return path


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _end(file))
        if not found:
            raise UserError(f"folder {str(path)!r} holds no file of a known kind ({', '.join(_ENDS)})")
        return found
    if not _end(path):
        raise UserError(f"corpus {str(path)!r} is of no known kind; expected {', '.join(_ENDS)}, a folder, or hf:name")
    return [path]


def _end(path: Path) -> str | None:
    return next((end for end in sorted(_ENDS, key=len, reverse=True) if path.name.lower().endswith(end)), None)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader say into one line."""
    import pyarrow as pa
    import zstandard

    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)
    try:
        yield
    except damage as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"corpus {str(path)!r} cannot be read ({reason}); fetch or write it again") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    import zstandard

    with path.open("rb") as raw:
        if _end(path) == ".jsonl.gz":
            with gzip.open(raw) as file:
                yield cast("IO[bytes]", file)
        elif _end(path) == ".jsonl.zst":
            decompressed = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.BufferedReader(decompressed)
        else:
            yield raw


def _contains(path: Path, text: str) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text.encode()) >= 0


def _separated(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield what stands between separators, without the line ends around it."""
    rest = b""
    while chunk := file.read(LONGEST_DOCUMENT):
        *whole, rest = (rest + chunk).split(separator)
        yield from (piece.strip(b"\r\n") for piece in whole)
        while len(rest) > LONGEST_DOCUMENT:
            cut = _boundary(rest)
            yield rest[:cut].strip(b"\r\n")
            rest = rest[cut:]
    if rest.strip():
        yield rest.strip(b"\r\n")


def _gathered(file: IO[bytes]) -> Iterator[bytes]:
    """Yield runs of whole paragraphs of at least `GATHERED_CHARACTERS` bytes."""
    held: list[bytes] = []
    size, rest = 0, b""
    while line := rest + file.readline(LONGEST_DOCUMENT):
        cut = _boundary(line) if len(line) >= LONGEST_DOCUMENT else len(line)
        line, rest = line[:cut], line[cut:]
        ends_paragraph = not line.strip()
        held.append(line)
        size += len(line)
        if (ends_paragraph and size >= GATHERED_CHARACTERS) or size >= LONGEST_DOCUMENT:
            yield b"".join(held).strip(b"\r\n")
            held, size = [], 0
    if size:
        yield b"".join(held).strip(b"\r\n")


def _boundary(data: bytes) -> int:
    """Return where to cut a document that is too long: after its last space or line end within the limit."""
    space = max(data.rfind(mark, 0, LONGEST_DOCUMENT) for mark in (b"\n", b" "))
    cut = space + 1 if space > 0 else LONGEST_DOCUMENT
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut -= 1  # never inside a character
    return cut
