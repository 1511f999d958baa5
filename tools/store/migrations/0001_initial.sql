-- The tables of a run. Everything that a reader sees goes through the views of views.sql, made at publishing.
-- Times are UTC. Result tables (results, explanations, scores, typing) hold no time and no order of arrival: the same run gives the same rows.
CREATE SCHEMA data;

CREATE TABLE data.dictionaries (
    dictionary VARCHAR PRIMARY KEY,
    name VARCHAR NOT NULL,
    subject VARCHAR,
    hook_point VARCHAR,
    latents BIGINT NOT NULL,
    evidence VARCHAR NOT NULL,
    provenance JSON NOT NULL
);

CREATE TABLE data.runs (
    run VARCHAR PRIMARY KEY,
    dictionary VARCHAR NOT NULL,
    config JSON NOT NULL,
    seed BIGINT NOT NULL,
    code_version VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    figures JSON,
    started_at TIMESTAMP NOT NULL,
    finished_at TIMESTAMP
);

-- No keys on the tables below: an index over a million digests costs more than the rows. The writer keeps them unique.
CREATE TABLE data.results (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL,
    status VARCHAR NOT NULL,
    detail VARCHAR
);

CREATE TABLE data.explanations (
    explanation_id VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL,
    text VARCHAR NOT NULL,
    predicate VARCHAR,
    explainer VARCHAR NOT NULL,
    model VARCHAR,
    prompt_digest VARCHAR,
    parameters JSON NOT NULL,
    parent VARCHAR
);

CREATE TABLE data.scores (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL,
    explanation_id VARCHAR NOT NULL,
    evaluator VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    value DOUBLE,
    low DOUBLE,
    high DOUBLE,
    n INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    baseline VARCHAR,
    status VARCHAR NOT NULL,
    parameters JSON NOT NULL
);

CREATE TABLE data.typing (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL,
    typed VARCHAR NOT NULL
);

CREATE TABLE data.verdict_parts (
    part VARCHAR PRIMARY KEY,
    rows BIGINT NOT NULL
);

CREATE TABLE data.calls (
    call_id VARCHAR NOT NULL,
    run VARCHAR NOT NULL,
    provider VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    input_tokens BIGINT,
    output_tokens BIGINT,
    cached_tokens BIGINT,
    usd DOUBLE,
    started_at TIMESTAMP,
    finished_at TIMESTAMP
);

CREATE TABLE data.investigations (
    investigation_id VARCHAR PRIMARY KEY,
    question VARCHAR NOT NULL,
    subject VARCHAR,
    dictionary VARCHAR,
    status VARCHAR NOT NULL,
    answer VARCHAR,
    parameters JSON NOT NULL,
    started_at TIMESTAMP NOT NULL,
    finished_at TIMESTAMP
);

CREATE TABLE data.experiments (
    experiment_id VARCHAR PRIMARY KEY,
    investigation_id VARCHAR NOT NULL,
    hypothesis VARCHAR NOT NULL,
    prediction VARCHAR NOT NULL,
    tool VARCHAR NOT NULL,
    parameters JSON NOT NULL,
    control VARCHAR,
    value DOUBLE,
    low DOUBLE,
    high DOUBLE,
    outcome VARCHAR,
    predicted_at TIMESTAMP NOT NULL,
    finished_at TIMESTAMP
);
