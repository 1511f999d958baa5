"""The language model under study, behind TransformerLens' bridge: tokens in, vectors at a named hook point out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Subject:
    """A causal language model with named hook points. Make one with `load_subject` (or `Subject(...)` from a model)."""

    name: str
    revision: str | None
    fingerprint: str
    device: str
    dtype: str
    hook_points: Mapping[str, int]
    """Hook point → width, for every point that a dictionary can be at (heads of `hook_z` concatenated)."""
    pieces: list[str]
    """Token → text, such that the pieces of a context join into its text (a leading space belongs to its word)."""
    bos: int | None
    special_tokens: frozenset[int]
    max_context: int
    tokenizer_digest: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens."""
        raise NotImplementedError

    def width(self, hook_point: str) -> int:
        """Return the length of the vectors at `hook_point`. Raises UserError where the subject has no such point."""
        raise NotImplementedError

    def residual(self, tokens: Tensor, hook_point: str) -> Tensor:
        """Return the vectors at `hook_point`, shape (context, position) → (context, position, width).

        Runs only up to the hook point, in inference mode.
        """
        raise NotImplementedError

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits, shape (context, position) → (context, position, vocabulary)."""
        raise NotImplementedError


def load_subject(name_or_path: str, *, device: str = "cpu", dtype: str = "float32", revision: str | None = None) -> Subject:
    """Load a Hugging Face causal language model, by name or from a local folder.

    Raises:
        UserError: there is no such model or folder, it is not a causal language model, or its weights hold NaN.
    """
    raise NotImplementedError


def subject_from_model(model: Any, tokenizer: Any, name: str) -> Subject:
    """Return the subject of a transformers model that is in memory already (benchmarks, tests)."""
    raise NotImplementedError
