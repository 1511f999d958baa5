"""The store: one folder that a run writes and everyone else reads.

    store.json                     format version
    run.duckdb                     what the run writes; one writer, no reader ever opens it
    labels.duckdb                  the published snapshot, replaced whole; every reader opens this one
    evidence/<16 hex digits>/      evidence of one dictionary (see `exegete.tools.evidence`)
    verdicts/*.parquet             judged items, append-only; a part counts once it is registered in run.duckdb
    journal.sqlite                 every call to a language model and its reply (see `journal`); of the writer alone, too
    calls/*.parquet                what readers see of calls, append-only, exported from the journal at publishing
    embeddings/*.parquet           sentence embeddings of explanations, append-only, registered like verdicts
    investigations/ID/record.json  what an investigation leaves when it ends (see `investigations`); taken into run.duckdb
    corpora/  passes/              token stores and the working files of activation passes

`Store` names the places, `Store.writer()` opens the one writer, `connect` the published results, and `safe_query` runs SQL
that a language model wrote.
"""

from exegete.tools.store.folder import Store
from exegete.tools.store.naming import id_of_run
from exegete.tools.store.reading import connect
from exegete.tools.store.records import DictionaryRecord, LatentRecord, Outcome, RunRecord, StepRecord, VerdictRecord
from exegete.tools.store.sandbox import QueryResult, safe_query
from exegete.tools.store.writer import Writer

__all__ = [
    "DictionaryRecord",
    "LatentRecord",
    "Outcome",
    "QueryResult",
    "RunRecord",
    "StepRecord",
    "Store",
    "VerdictRecord",
    "Writer",
    "connect",
    "id_of_run",
    "safe_query",
]
