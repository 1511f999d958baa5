"""Evidence from elsewhere: the JSONL interchange format, in and out.

One latent per line; `.jsonl`, `.jsonl.gz` and `.jsonl.zst`. For example:

    {"dictionary": "gpt2/oai-128k/layer 8", "latent": 412, "explanation": "months of the year", "windows": [
      {"tokens": ["In", " May", " we"], "activations": [0, 7.2, 0], "fires": true, "split": "explain", "kind": "firing"},
      {"tokens": ["In", " town"], "activations": null, "fires": false, "split": "test", "kind": "random", "marks": [1]}]}

Importing:
1. Every line is checked and spooled to a temporary folder, so that a wrong line leaves nothing behind.
2. A window's id is a digest of its tokens and document: the same run of tokens is stored once for all latents.
3. The spool is sorted (on disk where it must be) and written as evidence, one folder per dictionary.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.evidence_writing import write_evidence
from exegete.tools.interchange_lines import Line, parse_line
from exegete.tools.interchange_spool import Spool
from exegete.tools.seeds import digest
from exegete.tools.store import DictionaryRecord, Store, Writer
from exegete.tools.windows import LatentEvidence, Window

LATENTS_PER_READ = 64


@dataclass(frozen=True, slots=True)
class Imported:
    """One dictionary that a file brought."""

    dictionary: str
    """Fingerprint: a digest of the name."""
    name: str
    """The `dictionary` of the file's lines."""
    folder: Path
    latents: int
    windows: int
    """Rows of evidence: a window that two latents share counts twice."""


def imported_fingerprint(name: str) -> str:
    """Return the fingerprint of an imported dictionary: there are no weights to digest, so its name stands for it."""
    return digest(f"imported:{name}")


def import_evidence(file: Path, store: Path, seed: int = 0) -> list[Imported]:
    """Read `file` and write one folder of evidence per dictionary into the store; register them and publish.

    Importing the same file again changes nothing.

    Raises:
        UserError: a line is wrong (file, line and mistake are named), or the store has other evidence of a dictionary of
            that name; nothing was written.
    """
    with tempfile.TemporaryDirectory(prefix="exegete-import-") as temporary:
        try:
            spools = _read(file, Path(temporary))
        except OSError as error:
            raise UserError(
                f"cannot read {str(file)!r} or spool it to {temporary!r} ({error}); mend that or set TMPDIR"
            ) from error
        content = _file_digest(file)
        opened = Store.create_or_open(store)
        with opened.writer() as writer:
            new = [s for s in spools.values() if not _is_there(opened, s.name, content)]
            for spool in new:
                _write(spool, opened.evidence_folder(imported_fingerprint(spool.name)), file, content, seed)
            found = [_register(writer, opened, spool) for spool in spools.values()]
            writer.publish()
    return found


def export_evidence(store: Path, file: Path, dictionary: str | None = None) -> int:
    """Write the evidence of one dictionary (fingerprint, a prefix of it, or name; all where None); return the lines written.

    Raises:
        UserError: no such dictionary, no evidence, or `file` cannot be written; a file that was there stays as it was.
    """
    chosen = _choose(Store.open(store), dictionary)
    temporary = file.with_name(f".writing.{file.name}")
    lines = 0
    try:
        with _open_text(temporary, "w", file.suffix) as out:
            for evidence in chosen:
                latents = evidence.latents.tolist()
                for start in range(0, len(latents), LATENTS_PER_READ):
                    for latent in evidence.read(latents[start : start + LATENTS_PER_READ], "score"):
                        out.write(
                            json.dumps(_as_json(_name(evidence), latent), ensure_ascii=False, allow_nan=False) + "\n"
                        )
                        lines += 1
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {str(file)!r} ({error.strerror}); name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return lines


def _read(file: Path, temporary: Path) -> dict[str, Spool]:
    spools: dict[str, Spool] = {}
    for line in _lines(file):
        if line.dictionary not in spools:
            spools[line.dictionary] = Spool(line.dictionary, temporary / str(len(spools)))
        spools[line.dictionary].add(line)
    if not spools:
        raise UserError(f"{str(file)!r} holds no latents; expected one JSON object a line")
    for spool in spools.values():
        spool.close()
    return spools


def _lines(file: Path) -> Iterator[Line]:
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}")
    number = 0
    seen: dict[tuple[str, int], int] = {}
    try:
        with _open_text(file, "r", file.suffix) as source:
            for number, text in enumerate(source, 1):
                if not text.strip():
                    continue
                line = parse_line(text, f"{file}:{number}")
                first = seen.setdefault((line.dictionary, line.latent), number)
                if first != number:
                    raise UserError(
                        f"{file}:{number}: latent {line.latent} of {line.dictionary!r} stands on line {first} already"
                    )
                yield line
    except (UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{file}:{number + 1}: not readable as UTF-8 text ({error})") from error


@contextmanager
def _open_text(path: Path, mode: str, suffix: str) -> Iterator[IO[str]]:
    """Open text that is compressed as `suffix` says."""
    if suffix == ".gz":
        import gzip

        with gzip.open(path, f"{mode}t", encoding="utf-8") as text:
            yield text  # type: ignore[misc]  # gzip's stub forgets that a text mode gives text
    elif suffix == ".zst":
        import zstandard

        with zstandard.open(path, f"{mode}t", encoding="utf-8") as text:
            try:
                yield text
            except zstandard.ZstdError as error:
                raise UserError(f"{str(path)!r} is not readable as zstd ({error})") from error
    else:
        with path.open(mode, encoding="utf-8") as text:
            yield text


def _is_there(store: Store, name: str, content: str) -> bool:
    folder = store.evidence_folder(imported_fingerprint(name))
    if not (folder / "evidence.json").exists():
        return False
    if Evidence.open(folder).provenance.get("content") != content:
        raise UserError(
            f"the store {str(store.folder)!r} has other evidence of a dictionary named {name!r};"
            " give it another name in the file, or import into another store"
        )
    return True


def _write(spool: Spool, folder: Path, file: Path, content: str, seed: int) -> None:
    provenance = {
        "dictionary": imported_fingerprint(spool.name),
        "name": spool.name,
        "source": "import",
        "seed": seed,
        "file": file.name,
        "content": content,
    }
    write_evidence(
        folder,
        vocabulary=spool.vocabulary(),
        windows=spool.windows(),
        items=spool.items(),
        latents=spool.latents(),
        provenance=provenance,
    )


def _register(writer: Writer, store: Store, spool: Spool) -> Imported:
    fingerprint = imported_fingerprint(spool.name)
    writer.add_dictionary(
        DictionaryRecord(fingerprint, spool.name, spool.latent_count, provenance={"source": "import"})
    )
    return Imported(fingerprint, spool.name, store.evidence_folder(fingerprint), spool.latent_count, spool.item_count)


def _file_digest(file: Path) -> str:
    with file.open("rb") as source:
        return f"sha256:{hashlib.file_digest(source, 'sha256').hexdigest()}"


def _choose(store: Store, dictionary: str | None) -> list[Evidence]:
    folders = sorted(path.parent for path in (store.folder / "evidence").glob("*/evidence.json"))
    found = [Evidence.open(folder) for folder in folders if not folder.name.startswith(".")]
    if not found:
        raise UserError(
            f"the store {str(store.folder)!r} has no evidence; run `exegete label` or `exegete evidence import`"
        )
    if dictionary is None:
        return found
    bare = dictionary.removeprefix("sha256:")
    chosen = [e for e in found if _name(e) == dictionary or e.dictionary.removeprefix("sha256:").startswith(bare)]
    if len(chosen) != 1:
        there = ", ".join(_name(e) for e in found)
        count = "no" if not chosen else "more than one"
        raise UserError(f"{count} dictionary is named {dictionary!r}; there are: {there}")
    return chosen


def _name(evidence: Evidence) -> str:
    return str(evidence.provenance["name"] if evidence.provenance["source"] == "import" else evidence.dictionary)


def _as_json(dictionary: str, evidence: LatentEvidence) -> dict[str, Any]:
    line: dict[str, Any] = {"dictionary": dictionary, "latent": evidence.latent}
    if evidence.given_explanation is not None:
        line["explanation"] = evidence.given_explanation
    return line | {"windows": [_window_as_json(window) for window in evidence.windows]}


def _window_as_json(window: Window) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens": list(window.tokens),
        "activations": None if window.activations is None else window.activations.tolist(),
        "fires": window.fires,
        "split": window.split,
        "kind": window.kind,
    }
    if window.marks is not None:
        found |= {"marks": list(window.marks), "marks_correct": window.marks_correct}
    if window.document is not None:
        found["document"] = window.document
    return found
