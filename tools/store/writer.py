"""The one writer of a store."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.store import forgetting, publishing, rows
from exegete.tools.store.compaction import compact
from exegete.tools.store.exported_calls import ExportedCalls
from exegete.tools.store.investigations import Investigations
from exegete.tools.store.journal_file import JOURNAL, SPENT_TOKENS, SPENT_USD
from exegete.tools.store.naming import evidence_path, id_of_run, json_text
from exegete.tools.store.parts import write_part
from exegete.tools.store.publisher import Publisher
from exegete.tools.store.recorded import Recorded
from exegete.tools.store.records import DictionaryRecord, LatentRecord, RunRecord, RunStatus
from exegete.tools.store.results import RunResults
from exegete.tools.store.schema import QUIET, utc_now

if TYPE_CHECKING:
    import pyarrow as pa

    from exegete.tools.store.embeddings import Embeddings
    from exegete.tools.store.journal import StoreJournal

_NO_ROOM = (duckdb.IOException, duckdb.FatalException, duckdb.TransactionException, duckdb.OutOfMemoryException)


class Writer:
    """Writes results in transactions and publishes them. Made by `Store.writer()`; safe to call from several threads."""

    def __init__(self, folder: Path, connection: duckdb.DuckDBPyConnection) -> None:
        self._folder = folder
        self._connection = connection
        self._lock = threading.RLock()
        self._recorded = Recorded(connection)
        self._calls = ExportedCalls(folder, connection, self._lock, self._transaction)
        self._investigations = Investigations(folder, connection, self._lock, self._transaction)
        self._removals = 0
        self._former: publishing.Former | None = None
        self._publisher = Publisher(self._publish)
        self._journal: StoreJournal | None = None
        self._reading: list[duckdb.DuckDBPyConnection] = []

    @property
    def journal(self) -> StoreJournal:
        """The journal of calls to language models, opened when it is first asked for.

        Raises:
            UserError: it is damaged, open in another program or from a newer version, or the disk is full.
        """
        from exegete.tools.store.journal import StoreJournal

        with self._lock:
            if self._journal is None:
                self._journal = StoreJournal(self._folder / JOURNAL, self._calls.last())
            return self._journal

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings of explanations, for whoever computes them."""
        from exegete.tools.store.embeddings import Embeddings

        return Embeddings(self._folder, self._connection, self._transaction, self._unwritten)

    def close(self) -> None:
        """Close what is open; `Store.writer()` does it."""
        self._publisher.close()
        with self._lock:
            try:
                if self._journal is not None:
                    self._journal.close()
            finally:
                for reading in self._reading:
                    reading.close()
                self._connection.close()

    def add_dictionary(self, dictionary: DictionaryRecord) -> None:
        """Register a dictionary; once its evidence is finished, the views show its latents. Adding it again changes nothing."""
        d = dictionary
        values = [
            d.dictionary,
            d.name,
            d.subject,
            d.hook_point,
            d.latents,
            evidence_path(d.dictionary, control=d.control_of is not None),
            json_text(d.provenance),
        ]
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO data.dictionaries VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", values
            )

    def dictionaries(self) -> list[DictionaryRecord]:
        """Return the registered dictionaries, ascending by fingerprint."""
        query = "SELECT dictionary, name, latents, subject, hook_point, provenance FROM data.dictionaries ORDER BY dictionary"
        with self._lock:
            found = self._connection.execute(query).fetchall()
        return [
            DictionaryRecord(dictionary, name, latents, subject, hook_point, json.loads(provenance))
            for dictionary, name, latents, subject, hook_point, provenance in found
        ]

    def begin_run(
        self,
        *,
        config: Mapping[str, Any],
        seed: int,
        code_version: str,
        dictionary: str,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Begin, or take up again, the run of this configuration; return its id.

        The same call finds the same run, since its id is made of these (`id_of_run`). `settings`, the configuration with what
        does not change the result (budget, concurrency, …), is stored beside it, the newest one.
        """
        run = id_of_run(config, seed, dictionary)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO data.runs VALUES (?, ?, ?, ?, ?, 'running', NULL, ?, NULL)"
                " ON CONFLICT DO UPDATE SET status = 'running', finished_at = NULL",
                [run, dictionary, json_text(config), seed, code_version, utc_now()],
            )
            connection.execute(
                "INSERT OR REPLACE INTO data.settings VALUES (?, ?)",
                [run, json_text(config if settings is None else settings)],
            )
        return run

    def spent_usd(self, run: str) -> float:
        """Return what the calls of a run have cost, with the worst case of those that are unknown: a budget begins here.

        What readers can see counts also where the journal was lost since.

        Raises:
            UserError: the journal cannot be opened, or a part of calls is damaged.
        """
        with self._lock:
            since = self.journal.spent_usd(run, after=self._calls.last())
            before = self._calls.aggregates(SPENT_USD, run)
        return since + (float(before[0]) if before else 0.0)

    def spent_tokens(self, run: str) -> int:
        """Return the tokens that the calls of a run have taken, input and output together; as `spent_usd`.

        What was sent without a reply being written down left no count: each such call is taken for the largest of the run.
        """
        with self._lock:
            found = [self.journal.spent_tokens(run, after=self._calls.last())]
            found += [before] if (before := self._calls.aggregates(SPENT_TOKENS, run)) else []
        taken, unknown, most = zip(*found, strict=True)
        return int(sum(taken) + sum(unknown) * max(most))

    def runs(self) -> list[RunRecord]:
        """Return all runs, the one begun last first."""
        query = (
            "SELECT run, dictionary, status, seed, code_version, config FROM data.runs ORDER BY started_at DESC, run"
        )
        with self._lock:
            found = self._connection.execute(query).fetchall()
        return [
            RunRecord(run, dictionary, status, seed, code_version, json.loads(config))
            for run, dictionary, status, seed, code_version, config in found
        ]

    def record(self, run: str, records: Sequence[LatentRecord], floors: bool = False) -> None:
        """Write records of latents in one transaction: all of them or none. 250–500 at a time.

        With `floors`, they hold the floors of latents that are recorded already. A latent that the run has recorded in
        this way already is left as it is.

        Raises:
            UserError: the disk is full; nothing of `records` was stored.
        """
        with self._lock:
            new = self._unrecorded(run, records, floors)
            if not new:
                return
            try:
                verdicts = rows.verdicts(run, new)
                part = write_part(self._folder / "verdicts", verdicts) if verdicts.num_rows else None
            except OSError as error:
                raise self._unwritten(error) from error
            with self._transaction() as connection:
                self._insert(
                    "floors" if floors else "results", rows.floors(run, new) if floors else rows.results(run, new)
                )
                self._insert_explanations(rows.explanations(new))
                self._insert("scores", rows.scores(run, new))
                self._insert("climbs", rows.climbs(run, new))
                if part is not None:
                    connection.execute("INSERT INTO data.verdict_parts VALUES (?, ?)", [part, verdicts.num_rows])
            for record in new:
                self._recorded.add(run, record.dictionary, floors, record.latent)

    def labeled(self, run: str, dictionary: str, floors: bool = False) -> NDArray[np.int64]:
        """Return the latents that `run` has recorded, whatever their outcome (or whose floors it has), ascending."""
        with self._lock:
            return self._recorded.latents(run, dictionary, floors)

    def forget_incomplete(self, run: str, dictionary: str, all_of_it: bool = False) -> int:
        """Remove what was recorded of latents about which calls are missing (or `all_of_it`); return how many there were.

        They count as not recorded then, and explanations that only this run had of them go with them: fewer answers may
        have led to another text. Where there are any, all floors go as well: a latent that gets its explanation later
        changes whose explanations are borrowed. What was answered is in the journal and not paid for again.

        Raises:
            UserError: the disk is full, or a part of verdicts is damaged; nothing was removed.
        """
        with self._lock:
            forgotten = forgetting.chosen(self._connection, run, dictionary, all_of_it)
            if forgotten.latents:
                replaced = forgetting.superseded_parts(self._connection, self._folder / "verdicts", forgotten)
                with self._transaction() as connection:
                    forgetting.forget(connection, forgotten, replaced)
                    self._removals += 1
                self._recorded.forget()
            return forgotten.latents

    def pilot(self, run: str, dictionary: str) -> dict[str, dict[str, Any]]:
        """Return evaluator → what the run's pilot has shown of it, as it was stored; empty where there was none yet."""
        query = "SELECT evaluator, clustering FROM data.pilots WHERE run = ? AND dictionary = ? ORDER BY evaluator"
        with self._lock:
            found = self._connection.execute(query, [run, dictionary]).fetchall()
        return {evaluator: json.loads(clustering) for evaluator, clustering in found}

    def set_pilot(self, run: str, dictionary: str, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Store what the run's pilot has shown."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM data.pilots WHERE run = ? AND dictionary = ?", [run, dictionary])
            for evaluator, clustering in found.items():
                connection.execute(
                    "INSERT INTO data.pilots VALUES (?, ?, ?, ?)", [run, dictionary, evaluator, json_text(clustering)]
                )

    def set_control(self, run: str, dictionary: str, records: Sequence[LatentRecord]) -> None:
        """Store how the control subset climbed every rung of the cascade, in place of what was stored of it before.

        Only the explanations and steps of `records` are taken: what the run says of these latents is recorded like that of
        all others.
        """
        with self._lock:
            forgetting.choose_control(self._connection, run, dictionary)
            with self._transaction() as connection:
                connection.execute(
                    "DELETE FROM data.climbs WHERE run = ? AND dictionary = ? AND control", [run, dictionary]
                )
                self._removals += 1
                self._insert_explanations(rows.explanations(records))
                self._insert("climbs", rows.climbs(run, records))
                # Where calls were missing, it had tried other explanations.
                forgetting.forget_unused(connection, dictionary)

    def results(self, run: str, dictionary: str) -> RunResults:
        """Return what `run` has found out about `dictionary` so far, for reading back."""
        # A connection of its own: one that another thread is just using, to publish or to record, refuses.
        with self._lock:
            self._reading.append(self._connection.cursor())
        return RunResults(self._reading[-1], run, dictionary)

    def set_types(self, run: str, dictionary: str, types: rows.Types) -> None:
        """Replace the types (PROTOCOLS §12) of a run's latents: `input`, `unexplained`, `rare`, …"""
        with self._transaction() as connection:
            connection.execute("DELETE FROM data.typing WHERE run = ? AND dictionary = ?", [run, dictionary])
            self._insert("typing", rows.typing(run, dictionary, types))

    def finish_run(self, run: str, status: RunStatus, figures: Mapping[str, Any] | None = None) -> None:
        """Store how the run ended, with its figures (shown in the `runs` view)."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE data.runs SET status = ?, figures = ?, finished_at = ? WHERE run = ?",
                [status, None if figures is None else json_text(figures), utc_now(), run],
            )

    def take_in_investigations(self) -> int:
        """Take in the records of investigations that are not in as they are now; return how many were.

        Opening the store and publishing do it.

        Raises:
            UserError: the disk is full.
        """
        return self._investigations.take_in()

    def publish(self) -> Path:
        """Replace the snapshot that readers open by the present state; return its path.

        A reader never sees a part of it, and one that holds the former snapshot open keeps it. Others may go on writing
        meanwhile; what they write may or may not be in it.

        Raises:
            UserError: the disk is full, or a file that the views read is damaged; the former snapshot stays.
        """
        self._publisher.now()
        return self._folder / publishing.SNAPSHOT

    def publish_soon(self, every_s: float) -> bool:
        """Publish in the background where the last time is `every_s` or longer ago; return whether that was begun.

        Publishing takes at most a tenth of the time: after one that took long, the next waits the longer. One that fails
        leaves the former snapshot, is logged, and is tried again the next time; a bug raises at the next `publish`.
        """
        return self._publisher.soon(every_s)

    def _publish(self) -> None:
        try:
            if self._journal is not None or (self._folder / JOURNAL).exists():
                self._calls.export(self.journal)
            self._investigations.take_in()
            compact(self._connection, self._lock, self._folder)
            with self._lock:
                cursor = self._connection.cursor()
                cursor.execute(QUIET)
                cursor.begin()
                # From the first reading on, the transaction sees the store as it is now.
                cursor.execute("SELECT count(*) FROM data.results").fetchall()
                removals = self._removals
            try:
                self._former = publishing.publish(cursor, self._folder, removals, self._former)
            finally:
                cursor.close()
        except duckdb.InvalidInputException as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"a file in the store {str(self._folder)!r} is damaged ({first}); remove the folder of that evidence, "
                "or restore the part of verdicts, and resume"
            ) from error
        except (OSError, *_NO_ROOM) as error:
            raise self._unwritten(error) from error

    def _unrecorded(self, run: str, records: Sequence[LatentRecord], floors: bool) -> list[LatentRecord]:
        new: dict[tuple[str, int], LatentRecord] = {}
        for record in sorted(records, key=lambda r: (r.dictionary, r.latent)):
            if not self._recorded.has(run, record.dictionary, floors, record.latent):
                new.setdefault((record.dictionary, record.latent), record)
        return list(new.values())

    def _insert(self, table: str, new: pa.Table) -> None:
        if new.num_rows:
            self._with_rows(new, f"INSERT INTO data.{table} BY NAME SELECT * FROM new_rows")

    def _insert_explanations(self, new: pa.Table) -> None:
        """Insert those explanations that no earlier run has stored: their id is their content."""
        if new.num_rows:
            self._with_rows(
                new,
                "INSERT INTO data.explanations BY NAME SELECT * FROM new_rows"
                " WHERE explanation_id NOT IN (SELECT explanation_id FROM data.explanations"
                " WHERE latent IN (SELECT latent FROM new_rows))",
            )

    def _with_rows(self, new: pa.Table, statement: str) -> None:
        self._connection.register("new_rows", new)
        try:
            self._connection.execute(statement)
        finally:
            self._connection.unregister("new_rows")

    @contextmanager
    def _transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._lock:
            self._connection.begin()
            try:
                yield self._connection
                self._connection.commit()
            except _NO_ROOM as error:
                self._roll_back()
                raise self._unwritten(error) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        try:
            self._connection.rollback()
        except duckdb.Error:
            # A commit that failed has ended its transaction itself; what it wrote is undone when the file is next opened.
            return

    def _unwritten(self, error: Exception) -> UserError:
        first = str(error).splitlines()[0]
        return UserError(f"cannot write to the store {str(self._folder)!r} ({first}); free some space and resume")
