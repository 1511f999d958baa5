"""Tiny transformers models with random weights, of the four families that the instruments are proved on.

Weights are drawn larger than transformers' defaults, so that attention, norms and logits are far from uniform and an error
of a wrong position or mask cannot hide below the tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject, subject_from_model

WIDTH, LAYERS, CONTEXT, WORDS = 32, 3, 48, 60
VOCABULARY = WORDS + 1
"""Words and the end token, 0."""
WINDOW = 6
"""Of Gemma-2's sliding attention: shorter than the prompts."""

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_LLAMA))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape))


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(**_LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, tie_word_embeddings=True)
    )


FAMILIES: dict[str, Callable[[], Any]] = {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "gemma2": _gemma2}


def bare(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a transformers model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    source = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        spread = 0.1 if value.dim() == 1 else 1.5 / value.shape[-1] ** 0.5
        value.data = value.data * (value.dim() == 1) + spread * torch.randn(value.shape, generator=source)
        if "embed" in name or "wte" in name or "wpe" in name:
            value.data = torch.randn(value.shape, generator=source) * 0.5
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return random words."""
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a bare model."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    layers = inner.h if hasattr(inner, "h") else inner.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def tokenizer(**special: str) -> Any:
    """Return a tokenizer of words `w0` … behind the end token; no beginning or padding unless named."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<e>": 0, **{f"w{i}": i + 1 for i in range(WORDS)}}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<e>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<e>", **special)


@cache
def tiny_subject(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **special: str) -> Subject:
    """Return the subject of `bare(family, seed, dtype)`, always the same."""
    return subject_from_model(bare(family, seed, dtype), tokenizer(**special), f"tiny-{family}")


class Device:
    """Fails as a device does, where more rows than `room` run at once."""

    def __init__(self, model: LiveModel, room: int, error: Exception | None = None) -> None:
        self.rows: list[int] = []
        run = model.logits

        def logits(tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
            self.rows.append(len(tokens))
            if len(tokens) > room:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")
            return run(tokens, mask, **options)

        model.logits = logits  # type: ignore[method-assign]
