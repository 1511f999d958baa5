"""Measure whether a budget holds. Run `python -m benchmarks.budget`; `--runs N --first SEED` for others.

Each run labels 24 planted latents by the command line, in this process, with `--budget 1`, through the real client, journal and
store. The provider bills each request with usage drawn up to its worst case, fails some, loses the replies of some that it has
billed, and keeps its own account. Price, calls in flight (1 to 64) and latents in flight are drawn; two runs in five are
interrupted at a random request so that calls in flight are given up, and taken up again. Then the run is resumed with
`--budget 2`. Printed are the provider's accounts, and every run whose account exceeds its budget, exceeds what the store
says was spent at most, does not go on, or asks an answered question again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from budgeted import Budgeted, budgeted
from planted_store import planted_file, planted_store

LATENTS = 24
BUDGET_USD = 1.0


def measure(runs: int, first: int) -> tuple[list[Budgeted], list[str]]:
    """Return what became of each run, and what is wrong with any."""
    found: list[Budgeted] = []
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        template = planted_store(planted_file(Path(folder), LATENTS, 4), Path(folder) / "template")
        for seed in range(first, first + runs):
            # What a run says is not of interest here.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found.append(budgeted(seed, template, Path(folder), BUDGET_USD))
            complaints += [f"run {seed}: {one}" for one in found[-1].complaints(BUDGET_USD)]
    return found, complaints


def lines(found: list[Budgeted], complaints: list[str]) -> list[str]:
    """Return the figures."""
    before = [max(one.usd[:-1]) for one in found]
    used_up = [one for one in found if one.exits[-2] == 2]
    exits = Counter(one.exits[-1] for one in found)
    return [
        f"{len(found)} runs, {sum(one.interrupted for one in found)} interrupted",
        f"largest account: {max(before):.6f} USD of {BUDGET_USD}; "
        f"after resuming {max(one.usd[-1] for one in found):.6f} of {2 * BUDGET_USD}",
        f"used up: {len(used_up)} runs, which had spent {sum(one.usd[-2] for one in used_up) / max(1, len(used_up)):.3f} USD on average",
        f"went on with the larger budget: {sum(one.usd[-1] > one.usd[-2] for one in used_up)} of {len(used_up)}; "
        f"finished: {exits[0]}, used up again: {exits[2]}",
        f"answered questions asked again: {sum(one.asked_again for one in found)}",
        *(complaints or ["no complaints"]),
    ]


def main() -> None:
    """Measure and print; status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    begun = time.perf_counter()
    found, complaints = measure(given.runs, given.first)
    print("\n".join(lines(found, complaints)))
    print(f"{time.perf_counter() - begun:.0f} s")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
