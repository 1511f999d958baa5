"""What the benchmarks run on: a model of GPT-2 small's shape with random weights, and random text for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from exegete.tools.corpus import Corpus
from exegete.tools.seeds import generator
from exegete.tools.subject import Subject, subject_from_model

VOCABULARY = 50_257
HOOK_POINT = "blocks.6.hook_resid_pre"
LAYERS = 6


def gpt2_small(device: str = "cpu", dtype: str = "float32") -> tuple[Any, Subject]:
    """Return a transformers model of GPT-2 small's shape with random weights, and a subject of the same weights."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(device=device, dtype=getattr(torch, dtype)).eval()
    bare = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).to(device=device, dtype=getattr(torch, dtype)).eval()
    bare.load_state_dict(model.state_dict())
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<|endoftext|>")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    return bare, subject_from_model(model, tokenizer, "gpt2-small-shaped")


def random_corpus(contexts: int) -> Corpus:
    """Return so many contexts of random text."""
    return cast(Corpus, RandomCorpus(contexts))


@dataclass(frozen=True)
class RandomCorpus:
    """Contexts of random tokens with natural frequencies (Zipf), in the form of `exegete.tools.corpus.Corpus`."""

    contexts: int
    seed: int = 0
    context_tokens: int = 256
    vocabulary: int = VOCABULARY - 1
    counts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What the text depends on."""
        return f"random-{self.contexts}-{self.seed}-{self.vocabulary}"

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return tokens, each context from a generator of its own."""
        rows = [generator(self.seed, "context", context).random(self.context_tokens) for context in range(start, stop)]
        return (float(self.vocabulary) ** np.array(rows)).astype(np.int32).reshape(-1, self.context_tokens)

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return true everywhere but at the first position, where a beginning of text would be."""
        mask = np.ones((stop - start, self.context_tokens), bool)
        mask[:, 0] = False
        return mask

    def split_of(self, contexts: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return splits in the default proportions."""
        return np.array([0, 0, 2, 0, 1, 0, 2, 0, 1, 2], np.uint8)[contexts % 10]

    def document_of(self, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the context: each is a document."""
        return np.broadcast_to(contexts, np.broadcast_shapes(contexts.shape, positions.shape)).astype(np.int64)

    def usable(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return true."""
        return np.ones((stop - start, self.context_tokens // 32), bool)
