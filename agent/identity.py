"""What makes two runs the same run: everything that its results depend on, and nothing else."""

from __future__ import annotations

from typing import Any

from exegete.agent.config import RunConfig
from exegete.tools.store import id_of_run


def identity(config: RunConfig, control: bool = False) -> dict[str, Any]:
    """Return what the results depend on: the configuration without store, concurrency, slices, batches, publishing and money.

    `control`: of the random-weight control, which how many latents and floors the dictionary itself gets does not concern.
    """
    found = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
    if control:
        found["label"] = {key: value for key, value in found["label"].items() if key not in ("limit", "floors")}
    return found


def takes_up(config: RunConfig, run: str, dictionary: str) -> bool:
    """Return whether `config` goes on with a stored run of a dictionary: not where a version with other keys began that."""
    return run in (id_of_run(identity(config, control), config.seed, dictionary) for control in (False, True))


_NOT_IDENTITY: Any = {
    "store": True,
    "label": {"concurrency", "batch", "publish_seconds", "hours", "until", "confirm_hours", "embed"},
    "evidence": {"slices", "batch", "workers"},
    "models": {
        *("budget_usd", "no_budget", "prices", "concurrency", "requests_per_minute", "tokens_per_minute"),
        *("timeout_s", "patience_s", "attempts", "batch_linger_s", "batch_poll_s", "forsake_batches"),
        *("budget_tokens", "confirm_usd"),
    },
}
