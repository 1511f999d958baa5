-- What a publishing works out once, as tables of the snapshot (data.NAME): the views read those, and aggregate on every query only
-- in snapshots of versions that had no such tables.
-- best_explanations: of a run the explanation that it stands by, whatever another one of its own scores; among runs, and in runs
-- that stand by none, the one with the highest mean. {{scores}}: all of them, or those of some latents.
WITH own AS (
    SELECT s.run, s.dictionary, s.latent, s.explanation_id,
           avg(value) FILTER (evaluator = 'detection') AS detection,
           avg(low) FILTER (evaluator = 'detection') AS detection_low,
           avg(high) FILTER (evaluator = 'detection') AS detection_high,
           avg(value) FILTER (evaluator = 'fuzzing') AS fuzzing,
           avg(low) FILTER (evaluator = 'fuzzing') AS fuzzing_low,
           avg(high) FILTER (evaluator = 'fuzzing') AS fuzzing_high
    FROM {{scores}} s
    LEFT JOIN data.results r ON r.latent = s.latent AND r.run = s.run AND r.dictionary = s.dictionary
    WHERE metric = 'balanced_accuracy' AND evaluator IN ('detection', 'fuzzing') AND baseline IS NULL
    AND coalesce(r.explanation_id, s.explanation_id) = s.explanation_id
    AND s.dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%')
    GROUP BY ALL
), means AS (
    SELECT *, coalesce((detection + fuzzing) / 2, detection, fuzzing) AS mean_score FROM own
), best AS (
    SELECT * FROM means QUALIFY row_number() OVER (
        PARTITION BY dictionary, latent ORDER BY mean_score DESC NULLS LAST, explanation_id, run) = 1
)
SELECT b.*, e.text, e.predicate, e.explainer, e.model
FROM best b
JOIN data.explanations e ON e.dictionary = b.dictionary AND e.latent = b.latent AND e.explanation_id = b.explanation_id
ORDER BY b.dictionary, b.latent;

-- floor_means: of each run, what other explanations reach.
WITH floors AS (
    SELECT run, dictionary, latent, explanation_id, baseline, evaluator, avg(value) AS value
    FROM data.scores WHERE metric = 'balanced_accuracy' AND baseline IN ('shuffled', 'constant') GROUP BY ALL
)
-- In the order of the values: a sum in another order differs in its last bits from query to query.
SELECT run, dictionary,
       avg(value ORDER BY value) FILTER (evaluator = 'detection' AND baseline = 'shuffled') AS detection_shuffled,
       avg(value ORDER BY value) FILTER (evaluator = 'detection' AND baseline = 'constant') AS detection_constant,
       avg(value ORDER BY value) FILTER (evaluator = 'fuzzing' AND baseline = 'shuffled') AS fuzzing_shuffled,
       avg(value ORDER BY value) FILTER (evaluator = 'fuzzing' AND baseline = 'constant') AS fuzzing_constant
FROM floors GROUP BY ALL;

-- outcomes: what became of each latent that a run has reached.
WITH reached AS (
    SELECT dictionary, latent, arg_min(status, (status <> 'labeled', status, run)) AS outcome,
           arg_min(detail, (status <> 'labeled', status, run)) AS detail
    FROM data.results GROUP BY ALL
), types AS (SELECT dictionary, latent, arg_min(typed, run) AS typed FROM data.typing GROUP BY ALL)
SELECT dictionary, latent, outcome, detail, typed FROM reached FULL JOIN types USING (dictionary, latent);
