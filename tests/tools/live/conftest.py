"""The bundled subject with a dictionary attached, shared by the tests of the instruments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.bundled.grammar import generate
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.interventions import Tokens, ablate, steer
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.subject import Subject, load_subject

from .scheduled import Gate


@pytest.fixture(scope="session")
def subject() -> Subject:
    return load_subject(str(subject_path()))


@pytest.fixture(scope="session")
def dictionary(subject: Subject) -> Dictionary:
    return load_dictionary(str(dictionary_path("tests")), subject)


@pytest.fixture
def model(subject: Subject, dictionary: Dictionary) -> LiveModel:
    return LiveModel(subject, [dictionary])


@pytest.fixture(scope="session")
def prompts(subject: Subject) -> list[Tokens]:
    """Twelve requests of different lengths, each cut somewhere in its SQL."""
    live = LiveModel(subject)
    texts = [example.text for example in generate(11, 12, "held_out")]
    return [live.tokens(text)[: -(1 + index % 5)] for index, text in enumerate(texts)]


@pytest.fixture
def trials(prompts: list[Tokens], dictionary: Dictionary) -> list[Trial]:
    """64 prompts, each with another latent steered or ablated."""
    made = []
    for number in range(64):
        latents = [7 * number % 1024]
        name = dictionary.fingerprint
        change = steer(name, latents, 5.0) if number % 2 else ablate(name, latents)
        made.append(Trial(prompts[number % 12], change))
    return made


@pytest.fixture
def gate(model: LiveModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every forward pass waits for it to open."""
    made = Gate(model)
    monkeypatch.setattr(model, "logits", made.logits)
    yield made
    made.open.set()


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """Whatever an instrument does to gradients, it leaves them as it found them."""
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
