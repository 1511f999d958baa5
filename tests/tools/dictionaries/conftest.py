"""A tiny subject, and SAELens dictionaries of every architecture for it, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.subject import Subject, subject_from_model

POINT = "blocks.1.hook_resid_post"
WIDTH, LATENTS = 32, 96


def _subject(seed: int = 0, **options: Any) -> Subject:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({"<s>": 0, **{f"w{i}": i + 1 for i in range(40)}}, unk_token="<s>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    torch.manual_seed(seed)
    shape = {"n_positions": 64, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return subject_from_model(GPT2LMHeadModel(GPT2Config(vocab_size=41, **shape)), tokenizer, "tiny", **options)


def _sae(architecture: str, hook_point: str = POINT, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a SAELens dictionary whose every parameter is random, so that nothing passes by being zero."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, configuration_class = get_sae_class(architecture)
    known = {"hook_name": hook_point, **(metadata or {})}
    sae = sae_class(configuration_class(d_in=WIDTH, d_sae=LATENTS, metadata=SAEMetadata(**known), **options))
    source = torch.Generator().manual_seed(3)
    for name, value in sae.named_parameters():
        scale = 0.3 if value.dim() == 1 else 0.15
        value.data = torch.randn(value.shape, generator=source) * scale
        if name == "threshold":
            value.data = value.data.abs()
    return sae


def _saved(sae: Any, folder: Path) -> str:
    sae.save_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_subject() -> Callable[..., Subject]:
    return _subject


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., Any]:
    return _sae


@pytest.fixture(scope="session")
def save_sae() -> Callable[..., str]:
    return _saved


@pytest.fixture(scope="session")
def subject() -> Subject:
    return _subject()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.3
