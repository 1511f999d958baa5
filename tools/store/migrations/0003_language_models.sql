-- Calls to language models about a latent that failed for good; a resumed run asks them again and records the latent anew.
ALTER TABLE data.results ADD COLUMN missing_calls INTEGER DEFAULT 0;
ALTER TABLE data.floors ADD COLUMN missing_calls INTEGER DEFAULT 0;
-- What a run's pilot has shown of how its judge's errors cluster in prompts (PROTOCOLS §13): the intervals of all scores rest on it.
CREATE TABLE data.pilots (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    evaluator VARCHAR NOT NULL,
    clustering JSON NOT NULL
);
