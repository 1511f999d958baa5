"""A night of 2,000 latents through everything that can strike it. Run `python -m benchmarks.chaos`.

The run has a cascade (one-shot, refine) and asks the test server, a process of its own, over HTTP. The server fails as in
`tests/chaos.py` (429 with and without Retry-After, 500, 503, pages of a gateway, connections cut before and within the body,
hangs, drips), the model itself says garbage at times. At random points of its progress the process group is killed ten times,
stands still for 30 s, has no room on its disk, and its clock is set back by a day and on by three hours; three readers watch
all the time. Printed as JSON: the plan, what struck and the sign of it, how each start ended, the accounts of store, journal
and server, how often readers looked, and what is wrong in the end (`complaints`: nothing, or the exit status is 1).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import Plan, falling, undisturbed, watched
from language_model_server import serving


def main() -> None:
    """Print what struck and what became of it; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=2_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stop", type=float, default=30.0, help="Seconds for which the process stands still.")
    parser.add_argument("--seed", type=int, default=0, help="Of when what strikes.")
    parser.add_argument(
        "--weather", type=float, default=0.25, help="1: one in three questions fails when it is first asked."
    )
    parser.add_argument("--in-flight", type=int, default=64, help="Calls in flight, at most.")
    parser.add_argument(
        "--disk", choices=["any", "limit"], default="any", help="limit: never by mounting a file system."
    )
    chosen = parser.parse_args()
    os.environ.setdefault("EXEGETE_API_KEY", "none")
    plan = Plan(
        chosen.latents,
        chosen.kills,
        chosen.stop,
        chosen.seed,
        in_flight=chosen.in_flight,
        control=64,
        floors=100,
        room_mib=1_024,
        disk=chosen.disk,
        weather=chosen.weather,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = night(plan, Path(folder))
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if found["complaints"] else 0)


def night(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return what came of one run through `plan`, beside the same run with nothing in the way."""
    began = time.monotonic()
    with serving() as server, falling(plan, folder, server) as night:
        wanted = undisturbed(night)
        quiet_s = time.monotonic() - began
        with watched(night) as watching:
            night.pass_by()
            struck_s = time.monotonic() - began - quiet_s
            seen = watching()
            figures = night.figures()
            complaints = night.complaints(wanted, seen)
    return {
        "plan": asdict(plan),
        "quiet_s": round(quiet_s, 1),
        "struck_s": round(struck_s, 1),
        "quiet_questions": night.whole,
        "struck": night.struck,
        "ends": night.ends,
        "rows": {name: len(rows) for name, rows in wanted.items()},
        "figures": figures,
        "readers": {reader["reader"].strip("_"): reader["queries"] for reader in seen},
        "complaints": complaints,
    }


if __name__ == "__main__":
    main()
