-- How a run was last started: its configuration with what does not change the result (budget, concurrency, …), for resuming it.
CREATE TABLE data.settings (
    run VARCHAR PRIMARY KEY,
    settings JSON NOT NULL
);
