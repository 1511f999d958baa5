"""Dictionaries from disk and from SAELens' registry."""

from __future__ import annotations

from exegete.tools.dictionaries import Dictionary
from exegete.tools.subject import Subject


def load_dictionary(spec: str, subject: Subject) -> Dictionary:
    """Load the dictionary that `spec` names onto the subject's device."""
    raise NotImplementedError
