"""`exegete doctor`: what is installed, which device there is, what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

EXPECTED = (
    "torch", "transformer-lens", "sae-lens", "transformers", "duckdb", "pyarrow", "langgraph", "openai", "anthropic",
    "sentence-transformers", "tenacity", "pydantic", "typer",
)  # fmt: skip


def findings() -> tuple[list[str], list[str]]:
    """Return what was found, as lines, and the names of packages that are missing."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    missing = []
    for name in EXPECTED:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
            lines.append(f"{name}: MISSING; pip install {_requirement(name)}")
    lines.append(_device() if "torch" not in missing else "device: unknown without torch")
    lines.append(f"free disk here: {shutil.disk_usage(Path.cwd()).free / 1e9:,.1f} GB")
    return lines, missing


def _requirement(name: str) -> str:
    wanted = (re.split(r"[\s;]", line, maxsplit=1)[0] for line in metadata.requires("exegete") or [])
    return next((line for line in wanted if re.match(rf"{re.escape(name)}\b(?!-)", line)), name)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"device: cuda ({torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB)"
    return f"device: {'mps' if torch.backends.mps.is_available() else 'cpu'} ({torch.get_num_threads()} threads)"
