-- What a publishing works out once, as tables of the snapshot (data.NAME): the views of that name read those, and aggregate on
-- every query only in snapshots of versions that had no such tables.
-- best_explanations: of a run the explanation that it stands by, whatever another one of its own scores; among runs, and in runs
-- that have none, the one with the highest mean.
WITH balanced AS (
    SELECT run, dictionary, latent, explanation_id, baseline, evaluator, avg(value) AS value, avg(low) AS low, avg(high) AS high
    FROM data.scores WHERE metric = 'balanced_accuracy' AND evaluator IN ('detection', 'fuzzing')
    AND dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%') GROUP BY ALL
), own AS (
    SELECT b.run, b.dictionary, b.latent, b.explanation_id, avg(value) AS mean_score,
           any_value(value) FILTER (evaluator = 'detection') AS detection,
           any_value(low) FILTER (evaluator = 'detection') AS detection_low,
           any_value(high) FILTER (evaluator = 'detection') AS detection_high,
           any_value(value) FILTER (evaluator = 'fuzzing') AS fuzzing,
           any_value(low) FILTER (evaluator = 'fuzzing') AS fuzzing_low,
           any_value(high) FILTER (evaluator = 'fuzzing') AS fuzzing_high
    FROM balanced b
    LEFT JOIN data.results r ON r.latent = b.latent AND r.run = b.run AND r.dictionary = b.dictionary
    WHERE baseline IS NULL AND coalesce(r.explanation_id, b.explanation_id) = b.explanation_id GROUP BY ALL
), best AS (
    SELECT * FROM own QUALIFY row_number() OVER (
        PARTITION BY dictionary, latent ORDER BY mean_score DESC NULLS LAST, explanation_id, run) = 1
), floors AS (
-- In the order of the values: a sum in another order differs in its last bits from query to query.
    SELECT run, dictionary,
           avg(value ORDER BY value) FILTER (evaluator = 'detection' AND baseline = 'shuffled') AS detection_shuffled,
           avg(value ORDER BY value) FILTER (evaluator = 'detection' AND baseline = 'constant') AS detection_constant,
           avg(value ORDER BY value) FILTER (evaluator = 'fuzzing' AND baseline = 'shuffled') AS fuzzing_shuffled,
           avg(value ORDER BY value) FILTER (evaluator = 'fuzzing' AND baseline = 'constant') AS fuzzing_constant
    FROM balanced WHERE baseline IS NOT NULL GROUP BY ALL
)
SELECT b.dictionary, b.latent, b.explanation_id, e.text, e.predicate, e.explainer, e.model, b.mean_score,
       b.detection, b.detection_low, b.detection_high, f.detection_shuffled, f.detection_constant,
       b.fuzzing, b.fuzzing_low, b.fuzzing_high, f.fuzzing_shuffled, f.fuzzing_constant, b.run
FROM best b
JOIN data.explanations e ON e.dictionary = b.dictionary AND e.latent = b.latent AND e.explanation_id = b.explanation_id
LEFT JOIN floors f ON f.run = b.run AND f.dictionary = b.dictionary
ORDER BY b.dictionary, b.latent;

-- outcomes: what became of each latent that a run has reached.
SELECT dictionary, latent, arg_min(status, (status <> 'labeled', status, run)) AS outcome,
       arg_min(detail, (status <> 'labeled', status, run)) AS detail, any_value(typed) AS typed
FROM data.results
FULL JOIN (SELECT dictionary, latent, arg_min(typed, run) AS typed FROM data.typing GROUP BY ALL) USING (dictionary, latent)
GROUP BY ALL;
