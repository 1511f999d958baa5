"""The live model of a command: which subject and dictionary it runs, and what a store says of the latents.

In this order: what the options name; the configuration file; the newest run of the store; else the bundled subject with its demo
dictionary. Where a store is given, its labels stand beside the latents, of exactly this dictionary (by fingerprint) or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.config import DictionaryConfig, RunConfig, SubjectConfig, load_config
from exegete.agent.gathering import BUNDLED, Inputs, is_bundled, open_dictionary, open_subject
from exegete.agent.inspection import newest_config
from exegete.tools.errors import UserError
from exegete.tools.store import connect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.interventions import Tokens
    from exegete.tools.live_model import LiveModel

MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class Wanted:
    """What a command was told of subject and dictionary."""

    store: Path | None = None
    config: Path | None = None
    subject: str | None = None
    dictionary: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4_096


@dataclass(frozen=True)
class Live:
    """A live model with one dictionary, and the store's labels for it."""

    model: LiveModel
    dictionary: Dictionary
    store: Path | None
    labels: Mapping[int, str] = field(default_factory=dict)
    """Latent → the best explanation's text, untrusted."""
    densities: Mapping[int, float] = field(default_factory=dict)
    """Latent → share of the corpus tokens on which it fires, for all latents of the store's evidence."""

    @property
    def origin(self) -> dict[str, Any]:
        """What a result came from, to be written beside it."""
        return {
            "subject": self.model.subject.name,
            "subject_fingerprint": self.model.subject.fingerprint,
            "dictionary": self.dictionary.name,
            "fingerprint": self.dictionary.fingerprint,
            "hook_point": self.dictionary.hook_point_out,
            "store": None if self.store is None else str(self.store),
        }

    @property
    def heading(self) -> str:
        """What ran, for the first line."""
        return (
            f"subject {self.model.subject.name}, dictionary {self.dictionary.name} at {self.dictionary.hook_point_out}"
        )

    def prompts(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text. Raises UserError where there is none, or one is empty or too long."""
        if not texts:
            raise UserError("there is no prompt; give one as an argument, or a file with --prompts")
        return [self.model.tokens(text) for text in texts]

    def token(self, text: str) -> int:
        """Return the one token that spells `text`.

        Raises:
            UserError: none does; the tokens that spell it together are named.
        """
        pieces = self.model.subject.pieces
        found = self.model.subject.encode([text])[0]
        if len(found) == 1 and pieces[found[0]].strip() == text.strip():
            return found[0]
        exact = [token for token, piece in enumerate(pieces) if piece == text]
        if exact:
            return exact[0]
        spelled = ", ".join(repr(pieces[token]) for token in found)
        raise UserError(
            f"{text!r} is no token of subject {self.model.subject.name!r}, which spells it {spelled}; name one token"
        )

    def label(self, latent: int) -> str:
        """Return what the store says of a latent, empty where it says nothing."""
        return self.labels.get(latent, "")

    def rates(self) -> NDArray[np.float64] | None:
        """Return the share of tokens on which each latent fires, shape (latent,), where the store knows it of all."""
        import numpy as np

        if len(self.densities) < self.dictionary.latents:
            return None
        return np.array([self.densities[latent] for latent in range(self.dictionary.latents)])


def open_live(wanted: Wanted) -> Live:
    """Load the subject and dictionary that `wanted` names, with the store's labels.

    Raises:
        UserError: one of them is missing or unfit, or the store holds another dictionary than the one that is to run.
    """
    config = _settled(wanted)
    if config.subject is None or config.dictionary is None:
        raise UserError(
            "no subject and dictionary are configured (the evidence was imported?); name them: --subject, --dictionary"
        )
    if wanted.store is not None:
        connect(wanted.store).close()  # A store that is not there is said before a model is loaded.
    from exegete.tools.live_model import LiveModel

    subject = open_subject(config.subject)
    dictionary = open_dictionary(config.dictionary.path, subject)
    model = LiveModel(subject, [dictionary], batch_tokens=wanted.batch_tokens)
    if wanted.store is None:
        return Live(model, dictionary, None)
    return Live(model, dictionary, wanted.store, *_known(wanted.store, dictionary))


def inputs_of(live: Live, wanted: SubjectConfig, dictionary: DictionaryConfig) -> Inputs:
    """Return a live model as what a labeling run works with.

    Raises:
        UserError: it is not the subject and dictionary that the configuration names.
    """
    subject = live.model.subject
    given = (_called(subject.name), subject.device.removesuffix(":0"), subject.dtype, tuple(subject.processing))
    asked = (_called(wanted.name), wanted.device.removesuffix(":0"), wanted.dtype, wanted.processing)
    if given != asked or wanted.revision not in (None, subject.revision):
        raise UserError(
            f"the shared subject is {subject.name!r} on {subject.device} in {subject.dtype}, and the configuration names "
            f"{wanted.name!r} on {wanted.device} in {wanted.dtype}, or another revision or processing of it; share what it names"
        )
    named = open_dictionary(dictionary.path, subject)
    if named.fingerprint != live.dictionary.fingerprint:
        raise UserError(
            f"the shared dictionary is {live.dictionary.name!r} ({live.dictionary.fingerprint[:19]}), and the configuration "
            f"names {dictionary.path!r} ({named.fingerprint[:19]}); share what it names"
        )
    return Inputs(subject, live.dictionary, live.model)


def _called(subject: str) -> str:
    return BUNDLED if is_bundled(subject) else subject


def _settled(wanted: Wanted) -> RunConfig:
    explicit = {
        "subject.name": wanted.subject,
        "dictionary.path": wanted.dictionary,
        "subject.device": wanted.device,
        "subject.dtype": wanted.dtype,
    }
    if wanted.config is not None:
        return load_config(wanted.config, (), explicit)
    base: dict[str, Any] = {}
    if wanted.store is not None:
        base = _of_newest_run(wanted.store)
    if wanted.subject and not wanted.dictionary:
        raise UserError(f"--subject {wanted.subject!r} needs the dictionary to go with it: add --dictionary")
    if not base and not wanted.subject:
        base = {"subject.name": BUNDLED, "dictionary.path": f"{BUNDLED}:demo"}
    return load_config(None, (), base | {key: value for key, value in explicit.items() if value is not None})


def _of_newest_run(store: Path) -> dict[str, Any]:
    config = newest_config(store)
    subject, dictionary = config.get("subject") or {}, config.get("dictionary") or {}
    found = {f"subject.{key}": value for key, value in subject.items()}
    return found | {f"dictionary.{key}": value for key, value in dictionary.items()}


def _known(store: Path, dictionary: Dictionary) -> tuple[dict[int, str], dict[int, float]]:
    """Return labels and densities that the store has for this very dictionary."""
    with connect(store) as connection:
        known = dict(connection.execute("SELECT dictionary, name FROM dictionaries").fetchall())
        if dictionary.fingerprint not in known:
            there = ", ".join(f"{name!r} ({fingerprint[:19]})" for fingerprint, name in known.items()) or "none"
            raise UserError(
                f"dictionary {dictionary.name!r} ({dictionary.fingerprint[:19]}) is not the store's: {str(store)!r} holds "
                f"{there}; its labels would be shown for other latents: name the store's dictionary and subject, or leave "
                "--store out"
            )
        labels = connection.execute(
            "SELECT latent, text FROM best_explanations WHERE dictionary = ?", [dictionary.fingerprint]
        ).fetchall()
        densities = connection.execute(
            "SELECT latent, density FROM latents WHERE dictionary = ? AND density IS NOT NULL", [dictionary.fingerprint]
        ).fetchall()
    return dict(labels), dict(densities)


def read_texts(file: Path, most: int = MOST_PROMPTS) -> list[str]:
    """Return the texts in a file: a line each of `.txt`, the field `text` (or `prompt`) of each line of `.jsonl`.

    Raises:
        UserError: there is no such file, a line is no record, it is empty, or it holds more than `most` texts.
    """
    return [text for text, _ in read_records(file, most)]


def read_records(file: Path, most: int = MOST_PROMPTS) -> list[tuple[str, Mapping[str, Any]]]:
    """Return texts with the records that they stand in (empty for `.txt`). Raises UserError as `read_texts`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(file)!r} ({error}); give a UTF-8 file with a text on each line") from error
    found = list(_records(file, lines))
    if not found:
        raise UserError(f"{str(file)!r} holds no text; put one on each line")
    if len(found) > most:
        raise UserError(f"{str(file)!r} holds {len(found):,} texts; at most {most:,} are taken: sample it first")
    return found


def _records(file: Path, lines: Sequence[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield line, {}
            continue
        try:
            record = json.loads(line)
            text = record.get("text", record.get("prompt"))
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f'{str(file)!r}, line {number}: expected {{"text": …}}, found {line[:40]!r}') from error
        if not isinstance(text, str) or not text:
            raise UserError(f'{str(file)!r}, line {number}: the record has no "text" (or it is empty)')
        yield text, record
