-- Sentence embeddings of explanations lie in Parquet parts, written as the run goes on.
CREATE TABLE data.embedding_parts (
    part VARCHAR PRIMARY KEY,
    rows BIGINT NOT NULL,
    model VARCHAR NOT NULL
);
