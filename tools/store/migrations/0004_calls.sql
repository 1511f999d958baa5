-- Calls to language models are kept in the journal (journal.sqlite). Readers get those that are settled in Parquet parts, and those
-- in flight in a table that every publishing replaces. `settled` numbers the last call in a part: what follows is not exported yet.
DROP TABLE data.calls;

CREATE TABLE data.call_parts (
    part VARCHAR PRIMARY KEY,
    rows BIGINT NOT NULL,
    settled BIGINT NOT NULL
);

CREATE TABLE data.open_calls (
    call_id VARCHAR NOT NULL,
    run VARCHAR NOT NULL,
    provider VARCHAR,
    model VARCHAR NOT NULL,
    answered_by VARCHAR,
    status VARCHAR NOT NULL,
    input_tokens BIGINT,
    cached_tokens BIGINT,
    cache_write_tokens BIGINT,
    output_tokens BIGINT,
    usd DOUBLE,
    worst_usd DOUBLE NOT NULL,
    seconds DOUBLE,
    attempts INTEGER,
    detail VARCHAR,
    noted_at TIMESTAMP NOT NULL
);
