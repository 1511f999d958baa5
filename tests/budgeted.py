"""Whole labeling runs with a budget, against a provider in this process that bills at random and keeps its own account."""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_wire import SPEC, ScriptedWire

import exegete
from exegete.agent.cli import main
from exegete.tools.llm import Reply, Request, Usage, opening
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.prices import Price, most_input_tokens

CLOSE_USD = 1e-9
"""Sums of the same costs in another order differ by less."""


class BillingWire(ScriptedWire):
    """Bills what arrives, with usage drawn up to a request's worst case, also where the reply is lost on the way."""

    def __init__(self, seed: int, price: Price, interrupt_at: int | None = None) -> None:
        super().__init__(error=0.1)
        self.seed = seed
        self.price = price
        self.interrupt_at = interrupt_at
        """Number of the request at which the process is interrupted twice, so that calls in flight are given up."""
        self.usd = 0.0
        self.requests = 0
        self.answered: set[str] = set()
        self.asked_again = 0

    async def send(self, request: Request) -> Reply:
        """Return the reply; raises Transient where it was lost."""
        self.requests += 1
        if self.requests == self.interrupt_at:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        question = request.id(self.name)
        # By the question and how often it was asked: in which order questions come differs from run to run.
        chance = random.Random(f"{self.seed} {question} {self.questions[question]}")
        self.questions[question] += 1
        for _ in range(chance.randrange(5)):
            await asyncio.sleep(0)
        if chance.random() < 0.02:
            raise Transient("HTTP 500")
        share = chance.choice((0.2, 1.0)) * chance.random() if chance.random() < 0.9 else 1.0
        usage = Usage(round(share * most_input_tokens(request)), 0, 0, round(share * request.max_tokens))
        self.usd += self.price.usd(usage)
        self.asked_again += question in self.answered
        for _ in range(chance.randrange(5)):
            await asyncio.sleep(0)
        if chance.random() < 0.03:
            raise Transient("connection lost", sent=True)
        reply = await super().send(request)
        self.answered.add(question)
        return Reply("ok", reply.text, model="scripted", usage=usage)


@dataclass(frozen=True)
class Budgeted:
    """What became of one run with a budget, and of taking it up with twice as much."""

    usd: tuple[float, ...]
    """The provider's account after each command."""
    exits: tuple[int, ...]
    latents: tuple[int, ...]
    """Labeled after each command."""
    asked_again: int
    stored_usd: float
    """What the store says was spent at most."""
    interrupted: bool

    def complaints(self, budget_usd: float) -> list[str]:
        """Return what is wrong with it."""
        *first, last = self.usd
        found = []
        if max(first) > budget_usd + CLOSE_USD:
            found.append(f"billed {max(first)} of {budget_usd}")
        if last > 2 * budget_usd + CLOSE_USD:
            found.append(f"billed {last} of {2 * budget_usd} after it was raised")
        if last > self.stored_usd + CLOSE_USD:
            found.append(f"billed {last}, but the store says at most {self.stored_usd}")
        if self.exits[-2] not in (0, 2) or self.exits[-1] not in (0, 2):
            found.append(f"exit statuses {self.exits}")
        if self.exits[-2] == 2 and not (self.usd[-1] > self.usd[-2] and self.latents[-1] >= self.latents[-2]):
            found.append(f"not continued: {self.usd} USD, {self.latents} latents")
        if self.asked_again:
            found.append(f"{self.asked_again} answered questions asked again")
        return found


def budgeted(seed: int, template: Path, folder: Path, budget_usd: float = 1.0) -> Budgeted:
    """Label a copy of the store `template` by the command line with a budget, then resume with twice as much.

    Price, calls and latents in flight, and whether and when it is interrupted are drawn by `seed`; after an interruption the
    same command goes on before the budget is raised.
    """
    chance = random.Random(f"run {seed}")
    scale = chance.choice((3.0, 10.0, 30.0))
    price = Price(input=scale, output=4 * scale)
    interrupt_at = chance.randrange(1, 120) if chance.random() < 0.4 else None
    wire = BillingWire(seed, price, interrupt_at)
    store = folder / f"store-{seed}"
    shutil.copytree(template, store)
    prices = folder / f"prices-{seed}.toml"
    prices.write_text(f'["{SPEC}"]\ninput = {price.input}\noutput = {price.output}\n')
    settings = {
        "models.prices": f'"{prices}"',
        "models.concurrency": chance.choice((1, 4, 16, 64)),
        "label.concurrency": chance.choice((1, 8, 64)),
        "label.batch": 8,
        "label.floors": 3,
        "models.attempts": 4,
        "label.explainer_options.max_tokens": 200,
        "label.judge_options.max_tokens": 200,
    }
    label = ["label", "--store", str(store), "--model", SPEC, "--budget", str(budget_usd)]
    for key, value in settings.items():
        label += ["--set", f"{key}={value}"]
    commands = [
        label,
        *([label] if interrupt_at else []),
        ["resume", "--store", str(store), "--budget", str(2 * budget_usd)],
    ]
    steps = [(_run(wire, command), wire.usd, _labeled(store)) for command in commands]
    if steps[-1][0] == 130:  # So few requests came before that the interruption fell into the last command.
        steps[-1] = (_run(wire, commands[-1]), wire.usd, _labeled(store))
    with exegete.connect(store) as connection:
        query = "SELECT coalesce(sum(usd), 0) + coalesce(sum(unknown_worst_usd), 0) FROM costs"
        ((stored,),) = connection.execute(query).fetchall()
    shutil.rmtree(store)
    exits, usd, latents = zip(*steps, strict=True)
    return Budgeted(usd, exits, latents, wire.asked_again, float(stored), wire.requests >= (interrupt_at or math.inf))


def _run(wire: BillingWire, command: Sequence[str]) -> int:
    """Run a command of the command line in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "_wire", lambda spec, limits, device: wire)
        patch.setattr("exegete.tools.llm.retrying._MOST_WAIT_S", 1e-4)
        patch.setenv("EXEGETE_API_KEY", "none")
        patch.setattr(sys, "argv", ["exegete", *command])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
    return 0


def _labeled(store: Path) -> int:
    with exegete.connect(store) as connection:
        ((count,),) = connection.execute("SELECT count(outcome) FROM latents").fetchall()
    return int(count)
