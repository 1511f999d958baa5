"""Weights as things to identify and to distrust: digests, and the refusal of pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npz")
"""Ends of file names whose content can run code when it is loaded."""


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return `sha256:…` over names, number formats, shapes and bytes of tensors, whatever their order or device."""
    import torch

    parts: list[str] = []
    for name in sorted(weights):
        flat = weights[name].detach().cpu().contiguous()
        state = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().data)
        parts += [name, str(flat.dtype), str(tuple(flat.shape)), state.hexdigest()]
    return digest(*parts)


def require_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if a tensor holds NaN or infinities; `what` names their owner, for example "model 'gpt2'"."""
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{what} has NaN or infinite weights in {name!r}; fetch or export it again")


def pickles_in(folder: Path) -> list[str]:
    """Return the names of the pickled weights in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)


@contextmanager
def no_pickles(what: str) -> Iterator[None]:
    """Make `torch.load` refuse, while a library that may call it fetches weights.

    Raises:
        UserError: the library tried to.
    """
    import torch

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UserError(
            f"{what} is published as a pickle, and pickles are never loaded; convert it to safetensors first"
        )

    original = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = original
