"""A labeling run through a bad night: whatever can strike it does, and at the end nothing shows it but the account.

1. A run on a sound disk, undisturbed, gives the tables that are wanted and the number of questions. The model of both runs is the
   same: now and then it answers with garbage, always to the same questions.
2. The same run in another store, over HTTP, on a server that fails (`WEATHER`), is struck at random points of its progress,
   which is read from the server's log: SIGKILL of the process group, SIGSTOP, a disk without room, a clock that is set. Each
   strike is noted with the sign that it took place; one that left no sign is a complaint.
3. A run that ends by itself with calls missing, or for want of room, is taken up again, by turns as `label` and as `resume`. The
   faults end when little is left to ask, or when nothing more comes of asking.
4. Readers watch all the time: one connects afresh, one holds snapshots, one asks for the status. None may see an error, half a
   latent, or a snapshot that changes while it is held.
5. `Night.complaints` holds the end against the undisturbed run, the server's log and the journal.

A full disk is a small file system (tmpfs) filled by a ballast file, where one can be mounted, else a limit on the size of files.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from chaos_checks import READERS, difference, everything, journal_figures, strangers, watch
from chaos_forces import Clock, ballast, label, mounts, size, state, waits
from crashing import FORKS
from crashing import exegete as ended
from language_model_server import Running
from planted_store import planted_line, planted_store

from exegete import connect

PRICE_USD = 10.0
"""Of a million tokens."""
DAY_S = 86_400.0
TIMEOUT_S = 2.0
"""Of one attempt at a call."""

MODEL: dict[str, Any] = {"answer": "oracle", "otherwise": "never", "rate": 0.12}
GARBAGE: list[dict[str, Any]] = [
    {"kind": kind, "share": 0.01} for kind in ("truncated_json", "wrong_length", "prose", "refusal")
]
"""Of the model itself: what it says to a question does not depend on when it is asked."""
WEATHER: list[dict[str, Any]] = [
    *({"kind": kind, "share": 0.04, "once": True} for kind in ("429", "500", "503", "html", "cut", "cut_body")),
    {"kind": "429", "share": 0.02, "once": True, "retry_after": 0.2},
    *({"kind": kind, "share": 0.01, "once": True, "seconds": 100} for kind in ("hang", "drip")),
    *({"kind": kind, "share": 0.005, "seconds": 100} for kind in ("500", "html", "cut_body")),
]
"""Of the server: most questions that suffer do so once, some each time, until it passes."""

Kind = Literal["kill", "stop", "disk", "back a day", "on three hours"]
CLOCKS: Mapping[str, float] = {"back a day": -DAY_S, "on three hours": 3 * 3_600.0}


@dataclass(frozen=True)
class Plan:
    """How large the run is, and what strikes it."""

    latents: int
    kills: int
    stop_s: float
    seed: int = 0
    windows_per_split: int = 10
    answer_s: float = 0.02
    """Time that the model takes."""
    in_flight: int = 16
    control: int = 8
    """Latents that climb every rung."""
    room_mib: int = 256
    """Of the small file system."""
    floors: int = 8
    disk: Literal["any", "limit"] = "any"
    """`limit`: never by mounting."""
    most_starts: int = 60
    weather: float = 1.0
    """By how much more often than `WEATHER` says the server fails."""
    calm_at: float = 0.93
    """Progress at which the faults end."""

    def strikes(self) -> list[tuple[float, Kind]]:
        """Return what strikes, and at which progress: the kills all over the run, each other thing once before the faults end."""
        chance = random.Random(self.seed)
        found: list[tuple[float, Kind]] = [
            ((n + chance.random()) / (self.kills + 0.2), "kill") for n in range(self.kills)
        ]
        others: list[Kind] = ["stop", "disk", "back a day", "on three hours"]
        chance.shuffle(others)
        found += [((n + chance.random()) * 0.85 / len(others), kind) for n, kind in enumerate(others)]
        return sorted(found)


@dataclass
class Night:
    """One run and all that strikes it; `pass_by` does it."""

    plan: Plan
    folder: Path
    server: Running
    store: Path
    room: Path | None
    """Where the small file system is mounted; None where the disk is full by a limit."""
    clock: Clock = field(default_factory=Clock)
    struck: list[dict[str, Any]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Exit status of each start, negative for signals."""
    pending: list[tuple[float, Kind]] = field(default_factory=list)
    whole: int = 0
    """Questions of the undisturbed run."""
    usual: int = 0
    """Those of them that it asked again: best-of-N draws several answers to one question."""
    calm: bool = False
    """Whether the faults have ended."""
    _wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"night {self.plan.seed}")
        self.pending = self.plan.strikes()

    @property
    def log(self) -> Path:
        """What the run says."""
        return self.folder / "log"

    def arguments(self, store: Path) -> list[str]:
        """Return the command that labels `store`."""
        model = self.server.spec("openai", "judge")
        prices = self.folder / "prices.toml"
        prices.write_text(f'["{model}"]\ninput = {PRICE_USD}\noutput = {PRICE_USD}\n')
        settings = {
            "label.batch": 8, "label.concurrency": 24, "label.publish_seconds": 0.3, "label.floors": self.plan.floors,
            "label.explainer_options.max_tokens": 200, "label.judge_options.max_tokens": 100,
            "cascade.rungs": '["one-shot", "refine"]', "cascade.control": self.plan.control, "cascade.target": 0.97,
            "cascade.rounds": 2, "cascade.items_per_class": self.plan.windows_per_split // 2,
            "models.concurrency": self.plan.in_flight, "models.prices": prices, "models.budget_usd": 100_000,
            "models.confirm_usd": 100_000, "models.timeout_s": TIMEOUT_S, "models.patience_s": 20, "models.attempts": 3,
        }  # fmt: skip
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        return ["label", "--store", str(store), "--model", model, *sets]

    def behave(self, *faults: dict[str, Any]) -> None:
        """Have the server fail like this from now on."""
        self.server.behave("judge", **MODEL, seconds=self.plan.answer_s, faults=[*GARBAGE, *faults])

    # ── the run ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pass_by(self) -> None:
        """Start the run again and again until it ends well. Raises AssertionError where it ends as it never should."""
        self.behave(*({**fault, "share": fault["share"] * self.plan.weather} for fault in WEATHER))
        while not self.ends or self.ends[-1] != 0:
            assert len(self.ends) < self.plan.most_starts, f"started {len(self.ends)} times: {self.ends}: {self.said()}"
            before = self.progress()
            self.ends.append(self._supervised(self._start()))
            end = self.ends[-1]
            assert end in (0, 2, 3, -signal.SIGKILL), f"exit status {end}: {self.said()}"
            assert end != 2 or self.struck[-1]["kind"] == "disk", f"halted: {self.said()}"
            if end == 3 and self.progress() < before + 0.01:
                self._clear()

    def progress(self) -> float:
        """Return the share of the questions that were asked."""
        return float(self.server.counts()["questions"] / self.whole)

    def said(self) -> str:
        """Return what the run said last."""
        return self.log.read_text()[-3_000:] if self.log.exists() else ""

    def _start(self, limit_bytes: int | None = None) -> BaseProcess:
        again = self.chance.random() < 0.5 and len(self.ends) > 0
        command = ["resume", "--store", str(self.store)] if again and self._known() else self.arguments(self.store)
        process = FORKS.Process(target=label, args=(command, self.log, self.clock, limit_bytes))
        process.start()
        return process

    def _known(self) -> bool:
        """Return whether a run was begun and published, so that `resume` finds it."""
        if not (self.store / "labels.duckdb").exists():
            return False
        with connect(self.store) as connection:
            return bool(connection.execute("FROM runs").fetchall())

    def _supervised(self, process: BaseProcess) -> int:
        """Strike the run whenever it is time, until it ends; return its exit status."""
        while process.is_alive():
            progress = self.progress()
            if progress >= self.plan.calm_at and not self.calm:
                self._clear()
            if self.pending and progress >= self.pending[0][0]:
                time.sleep(self.chance.uniform(0, 0.5))
                kind = self.pending[0][1]
                if process.is_alive() and self._strike(kind, process):
                    self.pending.pop(0)
            time.sleep(0.03)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def _clear(self) -> None:
        self.calm = True
        self.behave()

    def _strike(self, kind: Kind, process: BaseProcess) -> bool:
        """Strike; return whether it can be told to have happened. The sign of it is noted."""
        assert process.pid is not None
        noted: dict[str, Any] = {"kind": kind, "progress": round(self.progress(), 3), "start": len(self.ends) + 1}
        if kind == "kill":
            noted["sign"] = self._kill(process)
        elif kind == "stop":
            noted["sign"] = self._stop(process)
        elif kind == "disk":
            noted["sign"] = self._fill(process, noted)
        else:
            self.clock.set(CLOCKS[kind])
            waits(lambda: self.clock.asked.value > 0 or not process.is_alive(), 20)
            noted["sign"] = self.clock.asked.value > 0
        if noted["sign"]:
            self.struck.append(noted)
        return bool(noted["sign"])

    def _kill(self, process: BaseProcess) -> bool:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False  # It has just ended, or has no group yet.
        process.join()
        return process.exitcode == -signal.SIGKILL

    def _stop(self, process: BaseProcess) -> bool:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False
        try:
            stood_still = waits(lambda: state(process.pid) == "T", 10)
            time.sleep(self.plan.stop_s)
        finally:
            os.killpg(process.pid, signal.SIGCONT)
        return stood_still and waits(lambda: state(process.pid) != "T", 10)

    def _fill(self, process: BaseProcess, noted: dict[str, Any]) -> bool:
        """Take the room away until the run has ended, and for another start."""
        noted["how"] = "small file system" if self.room else "limit on files"
        limit = None if self.room else size(self.store)
        assert process.pid is not None
        if self.room:
            ballast(self.room, self.chance.randrange(200_000))
        else:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit or 0, resource.RLIM_INFINITY))
        try:
            assert waits(lambda: not process.is_alive(), 90), f"goes on without room: {self.said()}"
            process.join()
            noted["said"] = [self._last_words(process)]
            again = self._start(limit)
            assert waits(lambda: not again.is_alive(), 90), f"goes on without room: {self.said()}"
            again.join()
            noted["said"].append(self._last_words(again))
            noted["ends"] = [process.exitcode, again.exitcode]
        finally:
            if self.room:
                (self.room / "ballast").unlink()
        return process.exitcode == 2

    def _last_words(self, process: BaseProcess) -> str:
        """Return the one line that a run without room ends with."""
        said = self.said()
        found = [line for line in said.splitlines() if line.startswith("exegete: ")]
        if process.exitcode != 2 or len(found) != 1 or "space" not in found[0] or found[0] != said.splitlines()[-1]:
            self._wrong.append(f"without room: exit status {process.exitcode}: {said[-1_000:]}")
        return found[-1] if found else ""

    # ── the end ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def complaints(self, wanted: Mapping[str, Any], seen: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what is wrong at the end; nothing where all is well."""
        found = [*self._wrong]
        found += [f"never struck: {kind} at {at:.2f}" for at, kind in self.pending]
        ours = everything(self.store)
        for name, rows in wanted.items():
            if ours[name] != rows:
                found.append(f"{name}: {difference(rows, ours[name])}")
        figures = self.figures()
        if figures["asked_again"] or figures["answered_twice"]:
            found.append(f"what was answered was asked again: {figures}")
        if figures["server_asked_again"] > figures["unknown"] + self.usual:
            found.append(f"sent more often than is written down: {figures}")
        if not figures["usd"] <= figures["billed_usd"] + 1e-9 <= figures["usd"] + figures["unknown_worst_usd"] + 2e-9:
            found.append(f"the account: {figures}")
        # A run without room can write no answer down either.
        cut_short = sum(end < 0 for end in self.ends) + 2 * sum(one["kind"] == "disk" for one in self.struck)
        if figures["unknown_at_ends"] > cut_short * self.plan.in_flight:
            found.append(f"more calls unknown than were in flight: {figures}")
        if figures["in_flight"]:
            found.append(f"calls that never landed: {figures}")
        found += [f"readers: {reader['wrong'][:3]}" for reader in seen if reader["wrong"]]
        found += [f"a reader saw nothing: {reader}" for reader in seen if reader["queries"] < 3]
        return found + self._left_over()

    def figures(self) -> dict[str, Any]:
        """Return the account of the store, of its journal and of the server."""
        counts = self.server.counts()
        with connect(self.store) as connection:
            query = "SELECT sum(usd), sum(unknown_worst_usd), sum(answered), sum(unknown), sum(failed), sum(in_flight) FROM costs"
            ((usd, worst, answered, unknown, failed, in_flight),) = connection.execute(query).fetchall()
        return {
            "questions": counts["questions"], "requests": counts["requests"], "server_asked_again": counts["asked_again"],
            "by_fault": counts["by_fault"], "answered": answered, "unknown": unknown, "failed": failed,
            "in_flight": in_flight, "usd": usd, "unknown_worst_usd": worst,
            "billed_usd": counts["tokens"] * PRICE_USD * 1e-6, **journal_figures(self.store / "journal.sqlite"),
        }  # fmt: skip

    def _left_over(self) -> list[str]:
        """The same command once more asks nothing, changes nothing, and clears away what nobody knows; commands answer."""
        found, before, requests = [], everything(self.store), self.server.counts()["requests"]
        if (end := ended(self.arguments(self.store), self.log)) != 0 or self.server.counts()["requests"] != requests:
            found.append(f"once more: exit status {end}, {self.server.counts()['requests'] - requests} requests")
        if everything(self.store) != before:
            found.append("the same command once more changes the tables")
        for command in (["status"], ["sql", "FROM best_explanations"]):
            if ended([*command, "--store", str(self.store)], self.log) != 0:
                found.append(f"{command[0]}: {self.said()}")
        return found + [f"left over: {name}" for name in strangers(self.store)]


def undisturbed(night: Night) -> dict[str, Any]:
    """Label the same latents with nothing in the way, and return the tables; the night then knows how much there is to ask."""
    night.server.reset_log()
    night.behave()
    store = planted_store(night.folder / "planted.jsonl", night.folder / "undisturbed")
    end = ended(night.arguments(store), night.log, timeout_s=3_600)
    assert end == 0, f"exit status {end}: {night.said()}"
    counts = night.server.counts()
    night.whole, night.usual = counts["questions"], counts["asked_again"]
    night.server.reset_log()
    return everything(store)


@contextmanager
def falling(plan: Plan, folder: Path, server: Running) -> Iterator[Night]:
    """Make the evidence and the store, on a small file system where one can be mounted."""
    lines = [planted_line(latent, plan.windows_per_split, noise=latent % 4 == 3) for latent in range(plan.latents)]
    (folder / "planted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    room = folder / "room"
    room.mkdir()
    mounted = plan.disk == "any" and mounts(room, plan.room_mib)
    try:
        store = planted_store(folder / "planted.jsonl", room / "store")
        server.keep_bodies(False)
        yield Night(plan, folder, server, store, room if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(room)], check=True)


@contextmanager
def watched(night: Night) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Have readers watch the store; calling what is yielded ends that and returns what each has seen."""
    stop = night.folder / "stop"
    files = [night.folder / f"{target.__name__}.json" for target in READERS]
    readers = [
        FORKS.Process(target=watch, args=(target, night.store, stop, file))
        for target, file in zip(READERS, files, strict=True)
    ]
    for reader in readers:
        reader.start()

    def seen() -> list[dict[str, Any]]:
        stop.touch()
        for reader in readers:
            reader.join(60)
        return [{"reader": file.stem, **json.loads(file.read_text())} for file in files]

    try:
        yield seen
    finally:
        for reader in readers:
            reader.kill()
            reader.join()
