-- Which explanation a run has chosen for a latent, and the steps by which it came there: one row an explanation that was tried.
ALTER TABLE data.results ADD COLUMN explanation_id VARCHAR;

CREATE TABLE data.climbs (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL,
    control BOOLEAN NOT NULL,
    step INTEGER NOT NULL,
    rung VARCHAR NOT NULL,
    explanation_id VARCHAR,
    refine DOUBLE,
    refine_low DOUBLE,
    refine_high DOUBLE,
    refine_n INTEGER NOT NULL,
    test DOUBLE,
    test_n INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    tokens BIGINT NOT NULL,
    usd DOUBLE NOT NULL,
    decision VARCHAR NOT NULL
);
