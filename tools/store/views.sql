-- The views that readers see, made anew at every publishing; {{…}} is filled by views.py with the store's files.
-- Random-weight controls (their evidence lies in controls/) are in random_controls, runs, calls and costs alone.
CREATE VIEW latents AS
SELECT l.dictionary, l.latent, l.status, r.outcome, r.typed, l.density, l.peak, l.mean, l.standard_deviation,
       l.firing_tokens, l.firing_windows, l.tokens, l.histogram, l.certified, l.hard_shortage, r.detail
FROM ({{latents}}) l
LEFT JOIN ({{outcomes}}) r USING (dictionary, latent);
COMMENT ON VIEW latents IS 'One row a latent of every dictionary whose evidence is finished: how it fires and what became of it.';
COMMENT ON COLUMN latents.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN latents.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN latents.status IS 'live; dead (never fires), rare (too few firing windows) or dense (too few non-firing ones).';
COMMENT ON COLUMN latents.outcome IS 'What labeling came to: labeled, no_explanation, failed, dead, rare or dense; null while not reached.';
COMMENT ON COLUMN latents.typed IS 'input, output, both, unexplained, rare, dense or dead (PROTOCOLS §12); null until the run has typed its latents.';
COMMENT ON COLUMN latents.density IS 'Share of the corpus tokens on which the latent fires; null for imported evidence.';
COMMENT ON COLUMN latents.peak IS 'Largest activation over the corpus.';
COMMENT ON COLUMN latents.mean IS 'Mean activation where it fires.';
COMMENT ON COLUMN latents.standard_deviation IS 'Standard deviation of the activation where it fires.';
COMMENT ON COLUMN latents.firing_tokens IS 'Corpus tokens on which it fires.';
COMMENT ON COLUMN latents.firing_windows IS 'Corpus windows on which it fires.';
COMMENT ON COLUMN latents.tokens IS 'Corpus tokens seen.';
COMMENT ON COLUMN latents.histogram IS 'Firings per factor of two of the activation.';
COMMENT ON COLUMN latents.certified IS 'Whether its uniform sample of firing windows is provably exact.';
COMMENT ON COLUMN latents.hard_shortage IS 'Hard negatives that could not be found.';
COMMENT ON COLUMN latents.detail IS 'Why labeling failed or found no explanation.';

CREATE VIEW explanations AS
SELECT explanation_id, dictionary, latent, text, predicate, explainer, model, prompt_digest, parameters, parent
FROM data.explanations
WHERE dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%');
COMMENT ON VIEW explanations IS 'One row an explanation of a latent; a latent may have several.';
COMMENT ON COLUMN explanations.explanation_id IS 'Digest of everything below: the same explanation has the same id.';
COMMENT ON COLUMN explanations.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN explanations.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN explanations.text IS 'What the latent responds to, in words.';
COMMENT ON COLUMN explanations.predicate IS 'The same as an executable predicate over tokens, where the explainer gives one.';
COMMENT ON COLUMN explanations.explainer IS 'Which explainer wrote it.';
COMMENT ON COLUMN explanations.model IS 'Language model that it used; null for the offline explainers.';
COMMENT ON COLUMN explanations.prompt_digest IS 'Digest of the prompt that was sent; null where none was.';
COMMENT ON COLUMN explanations.parameters IS 'Parameters of the explainer, as JSON.';
COMMENT ON COLUMN explanations.parent IS 'The explanation that this one refines.';

CREATE VIEW scores AS
SELECT dictionary, latent, explanation_id, evaluator, metric, value, low, high, n, failures, baseline, status, parameters, run
FROM data.scores
WHERE dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%');
COMMENT ON VIEW scores IS 'One row a figure of an explanation, or of a floor that stands beside it.';
COMMENT ON COLUMN scores.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN scores.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN scores.explanation_id IS 'The explanation; for a floor, the one that it stands beside.';
COMMENT ON COLUMN scores.evaluator IS 'detection, fuzzing, … (PROTOCOLS §3 and later).';
COMMENT ON COLUMN scores.metric IS 'balanced_accuracy, f1, auprc, auroc, …';
COMMENT ON COLUMN scores.value IS 'The figure on held-out windows; null where the metric has no answer.';
COMMENT ON COLUMN scores.low IS 'Lower end of the 95 % interval.';
COMMENT ON COLUMN scores.high IS 'Upper end of the 95 % interval.';
COMMENT ON COLUMN scores.n IS 'Judged items that the figure rests on.';
COMMENT ON COLUMN scores.failures IS 'Items whose verdict failed; they are in no metric.';
COMMENT ON COLUMN scores.baseline IS 'Null for the explanation itself, else the floor: shuffled, sibling, constant, token_list.';
COMMENT ON COLUMN scores.status IS 'ok, or why there is no figure.';
COMMENT ON COLUMN scores.parameters IS 'Judge and parameters of the evaluator, as JSON.';
COMMENT ON COLUMN scores.run IS 'The run that scored it.';

CREATE VIEW climbs AS
SELECT dictionary, latent, step, rung, explanation_id, refine, refine_low, refine_high, refine_n, decision, test, test_n, calls, tokens,
       usd, control, run
FROM data.climbs
WHERE dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%');
COMMENT ON VIEW climbs IS 'One row an explanation that a latent tried on its way up the cascade, with what decided and what it cost.';
COMMENT ON COLUMN climbs.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN climbs.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN climbs.step IS 'Position on the way up, from 0.';
COMMENT ON COLUMN climbs.rung IS 'The explainer that wrote it, or what the control subset drew: best-of at the cost of the climb, best-of beside test-and-refine for the tokens of that rung.';
COMMENT ON COLUMN climbs.explanation_id IS 'The explanation; null where the explainer gave none.';
COMMENT ON COLUMN climbs.refine IS 'Mean balanced accuracy of detection and fuzzing on the refine split: the figure that decides, not one to report.';
COMMENT ON COLUMN climbs.refine_low IS 'Lower end of its 95 % interval.';
COMMENT ON COLUMN climbs.refine_high IS 'Upper end of its 95 % interval: below the target, the latent may climb.';
COMMENT ON COLUMN climbs.refine_n IS 'Judged items that it rests on.';
COMMENT ON COLUMN climbs.decision IS 'What followed: good_enough, not_worth_it, climbs, plateau, rounds_used_up, top, no_score or control.';
COMMENT ON COLUMN climbs.test IS 'The same figure on the test split, on the control subset alone; it decides nothing.';
COMMENT ON COLUMN climbs.test_n IS 'Judged items that it rests on.';
COMMENT ON COLUMN climbs.calls IS 'Calls to language models that writing it and scoring it on the refine split took.';
COMMENT ON COLUMN climbs.tokens IS 'Their tokens, input and output.';
COMMENT ON COLUMN climbs.usd IS 'Their cost in US dollars, whether paid by this run or before.';
COMMENT ON COLUMN climbs.control IS 'Whether the latent climbed whatever its scores said, so that routing can be measured.';
COMMENT ON COLUMN climbs.run IS 'The run.';

CREATE VIEW best_explanations AS
SELECT b.dictionary, b.latent, b.explanation_id, b.text, b.predicate, b.explainer, b.model, b.mean_score,
       b.detection, b.detection_low, b.detection_high, f.detection_shuffled, f.detection_constant,
       b.fuzzing, b.fuzzing_low, b.fuzzing_high, f.fuzzing_shuffled, f.fuzzing_constant, b.run
FROM ({{best_explanations}}) b LEFT JOIN ({{floor_means}}) f ON f.run = b.run AND f.dictionary = b.dictionary;
COMMENT ON VIEW best_explanations IS 'Per latent the explanation with the best held-out score, beside the floors of its run. All scores are balanced accuracies.';
COMMENT ON COLUMN best_explanations.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN best_explanations.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN best_explanations.explanation_id IS 'The explanation.';
COMMENT ON COLUMN best_explanations.text IS 'What the latent responds to, in words.';
COMMENT ON COLUMN best_explanations.predicate IS 'The same as an executable predicate, where there is one.';
COMMENT ON COLUMN best_explanations.explainer IS 'Which explainer wrote it.';
COMMENT ON COLUMN best_explanations.model IS 'Language model that it used; null for the offline explainers.';
COMMENT ON COLUMN best_explanations.mean_score IS 'Mean of detection and fuzzing; the best explanation has the highest.';
COMMENT ON COLUMN best_explanations.detection IS 'Balanced accuracy of detection.';
COMMENT ON COLUMN best_explanations.detection_low IS 'Lower end of its 95 % interval.';
COMMENT ON COLUMN best_explanations.detection_high IS 'Upper end of its 95 % interval.';
COMMENT ON COLUMN best_explanations.detection_shuffled IS 'Mean detection of other latents'' explanations in the run (floor).';
COMMENT ON COLUMN best_explanations.detection_constant IS 'Mean detection of the constant explanation in the run (floor).';
COMMENT ON COLUMN best_explanations.fuzzing IS 'Balanced accuracy of fuzzing.';
COMMENT ON COLUMN best_explanations.fuzzing_low IS 'Lower end of its 95 % interval.';
COMMENT ON COLUMN best_explanations.fuzzing_high IS 'Upper end of its 95 % interval.';
COMMENT ON COLUMN best_explanations.fuzzing_shuffled IS 'Mean fuzzing of other latents'' explanations in the run (floor).';
COMMENT ON COLUMN best_explanations.fuzzing_constant IS 'Mean fuzzing of the constant explanation in the run (floor).';
COMMENT ON COLUMN best_explanations.run IS 'The run that scored it.';

CREATE VIEW verdicts AS
SELECT dictionary, latent, explanation_id, evaluator, baseline, window_id, marks, truth, applies, probability, status, prompt, run
FROM ({{verdicts}})
WHERE dictionary NOT IN (SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%');
COMMENT ON VIEW verdicts IS 'One row a judged item: what the judge said of one window, beside the truth.';
COMMENT ON COLUMN verdicts.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN verdicts.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN verdicts.explanation_id IS 'The explanation; for a floor, the one that it stands beside.';
COMMENT ON COLUMN verdicts.evaluator IS 'detection, fuzzing, …';
COMMENT ON COLUMN verdicts.baseline IS 'Null for the explanation itself, else the floor that was judged in its place.';
COMMENT ON COLUMN verdicts.window_id IS 'The window, as in examples.';
COMMENT ON COLUMN verdicts.marks IS 'Token positions that the judge saw marked; null in detection.';
COMMENT ON COLUMN verdicts.truth IS 'Whether the explanation ought to apply.';
COMMENT ON COLUMN verdicts.applies IS 'What the judge said; null where it failed.';
COMMENT ON COLUMN verdicts.probability IS 'The judge''s probability; null for yes/no judges.';
COMMENT ON COLUMN verdicts.status IS 'ok, or how it failed.';
COMMENT ON COLUMN verdicts.prompt IS 'Items of one latent and evaluator with the same number shared a prompt.';
COMMENT ON COLUMN verdicts.run IS 'The run that judged it.';

CREATE VIEW examples AS {{examples}};
COMMENT ON VIEW examples IS 'One row a latent and window of its evidence, as text with the firing tokens inside << >>.';
COMMENT ON COLUMN examples.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN examples.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN examples.split IS 'explain, refine or test (PROTOCOLS §1); explainers never see test.';
COMMENT ON COLUMN examples.kind IS 'firing, random (does not fire) or hard (does not fire although it looks as if).';
COMMENT ON COLUMN examples.rank IS 'Position within latent, split and kind.';
COMMENT ON COLUMN examples.text IS 'The window; tokens at 0.3 of the peak or more, or imported marks, inside << >>; look-alikes in the text are replaced.';
COMMENT ON COLUMN examples.peak IS 'Largest activation in the window.';
COMMENT ON COLUMN examples.fires IS 'Whether the latent fires on the window.';
COMMENT ON COLUMN examples.top IS 'Whether the window is among the latent''s highest by peak.';
COMMENT ON COLUMN examples.stratum IS 'Quantile of the peak within the uniform sample; null outside it.';
COMMENT ON COLUMN examples.marks_correct IS 'For imported fuzzing items: whether the marks are where the latent fires.';
COMMENT ON COLUMN examples.window_id IS 'The window; the same text has the same id for every latent of a dictionary.';
COMMENT ON COLUMN examples.document IS 'The document that it comes from.';

CREATE VIEW neighbours AS
SELECT dictionary, latent, neighbour, cosine, rank FROM ({{neighbours}});
COMMENT ON VIEW neighbours IS 'The nearest latents by cosine of the decoder; empty for dictionaries without one.';
COMMENT ON COLUMN neighbours.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN neighbours.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN neighbours.neighbour IS 'Index of the neighbour in the same dictionary.';
COMMENT ON COLUMN neighbours.cosine IS 'Cosine of the two decoder directions.';
COMMENT ON COLUMN neighbours.rank IS '0 is the nearest.';

CREATE VIEW dictionaries AS
SELECT dictionary, name, subject, hook_point, latents, provenance FROM data.dictionaries
WHERE evidence NOT LIKE 'controls/%';
COMMENT ON VIEW dictionaries IS 'The dictionaries whose results this store holds, without random-weight controls (random_controls).';
COMMENT ON COLUMN dictionaries.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN dictionaries.name IS 'Its name as given.';
COMMENT ON COLUMN dictionaries.subject IS 'The language model under study; null for imported evidence.';
COMMENT ON COLUMN dictionaries.hook_point IS 'Where in the subject it reads; null for imported evidence.';
COMMENT ON COLUMN dictionaries.latents IS 'Number of its latents.';
COMMENT ON COLUMN dictionaries.provenance IS 'Where it comes from, as JSON.';

CREATE VIEW runs AS
SELECT r.run, r.dictionary, r.status, r.seed, r.code_version, r.config, r.figures, r.started_at, r.finished_at,
       json_extract_string(d.provenance, '$.control_of') AS control_of
FROM data.runs r LEFT JOIN data.dictionaries d USING (dictionary);
COMMENT ON VIEW runs IS 'One row a run: a resolved configuration over the latents of a dictionary.';
COMMENT ON COLUMN runs.run IS 'Digest of configuration, seed and dictionary.';
COMMENT ON COLUMN runs.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN runs.status IS 'running, interrupted (resume it) or finished.';
COMMENT ON COLUMN runs.seed IS 'The seed that every random choice of the run derives from.';
COMMENT ON COLUMN runs.code_version IS 'Version of exegete.';
COMMENT ON COLUMN runs.config IS 'The resolved configuration, as JSON.';
COMMENT ON COLUMN runs.figures IS 'Its headline figures, as JSON.';
COMMENT ON COLUMN runs.started_at IS 'When it first began.';
COMMENT ON COLUMN runs.finished_at IS 'When it last ended.';
COMMENT ON COLUMN runs.control_of IS 'For the run of a random-weight control the fingerprint of the dictionary that it is the control of; null for all others.';

CREATE VIEW random_controls AS
SELECT json_extract_string(d.provenance, '$.control_of') AS dictionary, d.dictionary AS control, s.latent, e.text, s.evaluator,
       s.metric, s.value, s.low, s.high, s.n, s.failures, s.status, s.run
FROM data.dictionaries d
JOIN data.scores s USING (dictionary)
JOIN data.explanations e ON e.dictionary = s.dictionary AND e.latent = s.latent AND e.explanation_id = s.explanation_id
WHERE d.evidence LIKE 'controls/%';
COMMENT ON VIEW random_controls IS 'One row a figure of a latent of a random-weight dictionary (label.random_control): what explanations of directions that nobody trained reach. No other view of results shows them.';
COMMENT ON COLUMN random_controls.dictionary IS 'Fingerprint of the dictionary that it is the control of.';
COMMENT ON COLUMN random_controls.control IS 'Fingerprint of the random-weight dictionary.';
COMMENT ON COLUMN random_controls.latent IS 'Index of the latent in the random-weight dictionary.';
COMMENT ON COLUMN random_controls.text IS 'Its explanation.';
COMMENT ON COLUMN random_controls.evaluator IS 'detection, fuzzing, … (PROTOCOLS §3 and later).';
COMMENT ON COLUMN random_controls.metric IS 'balanced_accuracy, f1, auprc, auroc, …';
COMMENT ON COLUMN random_controls.value IS 'The figure on held-out windows; null where the metric has no answer.';
COMMENT ON COLUMN random_controls.low IS 'Lower end of the 95 % interval.';
COMMENT ON COLUMN random_controls.high IS 'Upper end of the 95 % interval.';
COMMENT ON COLUMN random_controls.n IS 'Judged items that the figure rests on.';
COMMENT ON COLUMN random_controls.failures IS 'Items whose verdict failed; they are in no metric.';
COMMENT ON COLUMN random_controls.status IS 'ok, or why there is no figure.';
COMMENT ON COLUMN random_controls.run IS 'The run that scored it.';

CREATE VIEW calls AS
SELECT call_id, run, provider, model, answered_by, status, input_tokens, cached_tokens, cache_write_tokens, output_tokens, usd,
       worst_usd, seconds, attempts, detail, noted_at
FROM ({{calls}});
COMMENT ON VIEW calls IS 'One row a call to a language model; empty for the offline path, which makes none.';
COMMENT ON COLUMN calls.call_id IS 'Content address of the question to the model; what can happen to it several times has a number behind it (…/failed-7, …/unknown-8).';
COMMENT ON COLUMN calls.run IS 'The run that made it; a later run that asks the same gets the reply without a call.';
COMMENT ON COLUMN calls.provider IS 'openai, anthropic, openai-batch, anthropic-batch or hf.';
COMMENT ON COLUMN calls.model IS 'The model as it was asked for, with the URL of the server where one was given.';
COMMENT ON COLUMN calls.answered_by IS 'The model as the server names it.';
COMMENT ON COLUMN calls.status IS 'ok, unparsed, refused, truncated, filtered, empty, rejected (this request, for ever), error (the provider failed), unknown (sent, and no reply seen) or in_flight (when this was published).';
COMMENT ON COLUMN calls.input_tokens IS 'Tokens sent, cached ones included, as the provider counted them.';
COMMENT ON COLUMN calls.cached_tokens IS 'Tokens sent that the provider had cached.';
COMMENT ON COLUMN calls.cache_write_tokens IS 'Tokens sent that the provider put into its cache.';
COMMENT ON COLUMN calls.output_tokens IS 'Tokens received.';
COMMENT ON COLUMN calls.usd IS 'Cost in US dollars; null where no reply was seen.';
COMMENT ON COLUMN calls.worst_usd IS 'What it could cost at most, reckoned before it was sent.';
COMMENT ON COLUMN calls.seconds IS 'From its turn to the reply, waiting and repeats included.';
COMMENT ON COLUMN calls.attempts IS 'Times that it was sent.';
COMMENT ON COLUMN calls.detail IS 'Why it failed, as far as that quotes nothing of what was sent.';
COMMENT ON COLUMN calls.noted_at IS 'When the reply was written down; for a call without one, when it was about to be sent.';

CREATE VIEW costs AS
SELECT coalesce(r.run, c.run) AS run, c.model, count(c.call_id) AS calls,
       count(*) FILTER (c.status NOT IN ('rejected', 'error', 'unknown', 'in_flight')) AS answered,
       count(*) FILTER (c.status IN ('rejected', 'error')) AS failed,
       count(*) FILTER (c.status = 'unknown') AS unknown,
       count(*) FILTER (c.status = 'in_flight') AS in_flight,
       coalesce(sum(c.input_tokens), 0)::BIGINT AS input_tokens,
       coalesce(sum(c.cached_tokens), 0)::BIGINT AS cached_tokens,
       coalesce(sum(c.output_tokens), 0)::BIGINT AS output_tokens,
-- In the order of the values: a sum in another order differs in its last bits from query to query.
       coalesce(sum(c.usd ORDER BY c.usd), 0)::DOUBLE AS usd,
       coalesce(sum(c.worst_usd ORDER BY c.worst_usd) FILTER (c.status = 'unknown'), 0)::DOUBLE AS unknown_worst_usd
FROM data.runs r FULL JOIN ({{calls}}) c ON c.run = r.run GROUP BY ALL;
COMMENT ON VIEW costs IS 'What each run has cost, per model: the provider''s account lies between usd and usd + unknown_worst_usd, once nothing is in flight. A run without calls has one row of zeros.';
COMMENT ON COLUMN costs.run IS 'The run.';
COMMENT ON COLUMN costs.model IS 'The model as it was asked for; null for a run without calls.';
COMMENT ON COLUMN costs.calls IS 'Number of calls, the sum of the next four.';
COMMENT ON COLUMN costs.answered IS 'Calls with a reply, usable or not.';
COMMENT ON COLUMN costs.failed IS 'Calls that the provider did not answer.';
COMMENT ON COLUMN costs.unknown IS 'Calls that may have been billed, and whose reply was never seen.';
COMMENT ON COLUMN costs.in_flight IS 'Calls without a reply when this was published.';
COMMENT ON COLUMN costs.input_tokens IS 'Tokens sent, cached ones included.';
COMMENT ON COLUMN costs.cached_tokens IS 'Tokens sent that the provider had cached.';
COMMENT ON COLUMN costs.output_tokens IS 'Tokens received.';
COMMENT ON COLUMN costs.usd IS 'Cost in US dollars of what was answered.';
COMMENT ON COLUMN costs.unknown_worst_usd IS 'What the unknown calls cost at most.';

CREATE VIEW embeddings AS
SELECT dictionary, latent, explanation_id, model, vector, code FROM ({{embeddings}});
COMMENT ON VIEW embeddings IS 'One row an explanation and embedding model: what the text means, as a vector of unit length. Empty where no model embeds (models.embedder).';
COMMENT ON COLUMN embeddings.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN embeddings.latent IS 'Index of the latent in its dictionary.';
COMMENT ON COLUMN embeddings.explanation_id IS 'The explanation.';
COMMENT ON COLUMN embeddings.model IS 'The sentence-transformers model, by name or folder; vectors of different models cannot be compared.';
COMMENT ON COLUMN embeddings.vector IS 'The vector: list_inner_product of two is their cosine.';
COMMENT ON COLUMN embeddings.code IS 'The vector with a byte a component, scaled to the largest: what a search reads.';

CREATE VIEW investigations AS
SELECT i.investigation_id, i.question, i.suggested, i.investigator, i.subject, i.dictionary, i.hook_point, i.metric, i.search_prompts,
       i.held_out_prompts, i.status, i.answer, coalesce(e.experiments, 0) AS experiments, coalesce(e.predictions, 0) AS predictions,
       coalesce(e.hits, 0) AS hits, coalesce(c.claims, 0) AS claims, coalesce(c.verified, 0) AS verified, coalesce(c.failed, 0) AS failed,
       i.steps, i.passes, i.calls, i.tokens, i.usd, i.seed, i.code_version, i.parameters, i.started_at, i.finished_at
FROM data.investigations i
LEFT JOIN (
    SELECT investigation_id, count(*) AS experiments, count(hit) AS predictions, count(*) FILTER (hit) AS hits
    FROM data.experiments GROUP BY ALL
) e USING (investigation_id)
LEFT JOIN (
    SELECT investigation_id, count(*) AS claims, count(*) FILTER (verdict = 'verified') AS verified,
           count(*) FILTER (verdict = 'failed') AS failed
    FROM data.claims GROUP BY ALL
) c USING (investigation_id);
COMMENT ON VIEW investigations IS 'One row a question that was investigated, once it has ended.';
COMMENT ON COLUMN investigations.investigation_id IS 'Id of the investigation.';
COMMENT ON COLUMN investigations.question IS 'The question as it was asked.';
COMMENT ON COLUMN investigations.suggested IS 'The cause that the question suggests; empty where it suggests none.';
COMMENT ON COLUMN investigations.investigator IS 'Who investigated: recipe (a fixed protocol, no language model), or the model''s name.';
COMMENT ON COLUMN investigations.subject IS 'The language model under study.';
COMMENT ON COLUMN investigations.dictionary IS 'Fingerprint of the dictionary that was used.';
COMMENT ON COLUMN investigations.hook_point IS 'Where in the subject the dictionary reads and writes.';
COMMENT ON COLUMN investigations.metric IS 'How the behaviour was measured, as JSON; null where that was never settled.';
COMMENT ON COLUMN investigations.search_prompts IS 'Prompts that the investigator saw and experimented on.';
COMMENT ON COLUMN investigations.held_out_prompts IS 'Prompts that claims were checked on, and nothing else.';
COMMENT ON COLUMN investigations.status IS 'finished, interrupted, or budget (what it may use was used up).';
COMMENT ON COLUMN investigations.answer IS 'What the investigator answered; what it is worth stands in claims.';
COMMENT ON COLUMN investigations.experiments IS 'Experiments that it predicted.';
COMMENT ON COLUMN investigations.predictions IS 'Those of them that gave a figure to hold the prediction against.';
COMMENT ON COLUMN investigations.hits IS 'Those of them whose figure was as predicted.';
COMMENT ON COLUMN investigations.claims IS 'Claims that it made.';
COMMENT ON COLUMN investigations.verified IS 'Those of them that held on the held-out prompts.';
COMMENT ON COLUMN investigations.failed IS 'Those of them that did not.';
COMMENT ON COLUMN investigations.steps IS 'Decisions of the investigator.';
COMMENT ON COLUMN investigations.passes IS 'Prompts run through the subject.';
COMMENT ON COLUMN investigations.calls IS 'Calls to language models.';
COMMENT ON COLUMN investigations.tokens IS 'Tokens of those calls, input and output together.';
COMMENT ON COLUMN investigations.usd IS 'Cost of those calls in US dollars.';
COMMENT ON COLUMN investigations.seed IS 'The seed that every random choice derives from.';
COMMENT ON COLUMN investigations.code_version IS 'Version of exegete.';
COMMENT ON COLUMN investigations.parameters IS 'Budget and settings, as JSON.';
COMMENT ON COLUMN investigations.started_at IS 'When it began.';
COMMENT ON COLUMN investigations.finished_at IS 'When it ended.';

CREATE VIEW experiments AS
SELECT e.investigation_id || '/' || e.experiment AS experiment_id, e.investigation_id, i.investigator, i.dictionary, e.place, e.tool,
       e.parameters, e.hypothesis, e.hypothesis_status,
       CASE WHEN e.predicted_low IS NULL THEN 'at most ' || e.predicted_high WHEN e.predicted_high IS NULL THEN 'at least ' || e.predicted_low
            ELSE 'from ' || e.predicted_low || ' to ' || e.predicted_high END AS prediction,
       e.predicted_low, e.predicted_high, e.because, e.status, e.headline, e.value, e.low, e.high, e.n, e.control, e.control_value,
       e.control_low, e.control_high, e.control_n, e.hit,
       CASE WHEN e.hit IS NULL THEN 'undecided' WHEN e.hit THEN 'confirmed' ELSE 'refuted' END AS outcome,
       e.facts, e.passes, e.seconds, e.predicted_at, e.finished_at
FROM data.experiments e JOIN data.investigations i USING (investigation_id);
COMMENT ON VIEW experiments IS 'One row an experiment of an investigation, with the prediction written down before it. Hit rates: avg(hit::INTEGER), count(hit) … GROUP BY investigator.';
COMMENT ON COLUMN experiments.experiment_id IS 'Id of the experiment, INVESTIGATION/E3: exegete rerun does it again.';
COMMENT ON COLUMN experiments.investigation_id IS 'The investigation that it belongs to.';
COMMENT ON COLUMN experiments.investigator IS 'Who asked for it: recipe, or a model''s name.';
COMMENT ON COLUMN experiments.dictionary IS 'Fingerprint of the dictionary.';
COMMENT ON COLUMN experiments.place IS 'Its place among the predictions of its investigation, from 1.';
COMMENT ON COLUMN experiments.tool IS 'The instrument that was used.';
COMMENT ON COLUMN experiments.parameters IS 'Its arguments, as JSON.';
COMMENT ON COLUMN experiments.hypothesis IS 'The hypothesis that it tests.';
COMMENT ON COLUMN experiments.hypothesis_status IS 'What became of that in the end: open, supported, not shown or rejected.';
COMMENT ON COLUMN experiments.prediction IS 'Where the headline figure was predicted to lie.';
COMMENT ON COLUMN experiments.predicted_low IS 'The predicted lower bound; null for none.';
COMMENT ON COLUMN experiments.predicted_high IS 'The predicted upper bound; null for none.';
COMMENT ON COLUMN experiments.because IS 'Why that was predicted, in the investigator''s words.';
COMMENT ON COLUMN experiments.status IS 'ok; error (the tool could not do it); refused (it may not be done); begun (it never ended).';
COMMENT ON COLUMN experiments.headline IS 'What the headline figure is.';
COMMENT ON COLUMN experiments.value IS 'The headline figure, mostly an effect; null where there is none.';
COMMENT ON COLUMN experiments.low IS 'Lower end of its interval.';
COMMENT ON COLUMN experiments.high IS 'Upper end of its interval.';
COMMENT ON COLUMN experiments.n IS 'Prompts (or other units) that it rests on.';
COMMENT ON COLUMN experiments.control IS 'The control that it stands beside, in words; null where the tool has none.';
COMMENT ON COLUMN experiments.control_value IS 'The same figure under the control.';
COMMENT ON COLUMN experiments.control_low IS 'Lower end of the control''s interval.';
COMMENT ON COLUMN experiments.control_high IS 'Upper end of the control''s interval.';
COMMENT ON COLUMN experiments.control_n IS 'Draws (or other units) that the control rests on.';
COMMENT ON COLUMN experiments.hit IS 'Whether the figure was as predicted; null where there is no figure.';
COMMENT ON COLUMN experiments.outcome IS 'The same in words: confirmed, refuted or undecided.';
COMMENT ON COLUMN experiments.facts IS 'What the tool found, as JSON: all of it up to 20,000 characters. Of more, the smaller parts: left_out has the others with their characters, and record the file in the folder of the store that has everything.';
COMMENT ON COLUMN experiments.passes IS 'Prompts that it ran through the subject.';
COMMENT ON COLUMN experiments.seconds IS 'How long it took.';
COMMENT ON COLUMN experiments.predicted_at IS 'When the prediction was on the disk.';
COMMENT ON COLUMN experiments.finished_at IS 'When the result came.';

CREATE VIEW claims AS
SELECT c.investigation_id || '/C' || c.place AS claim_id, c.investigation_id, i.investigator, i.dictionary, c.statement, c.kind, c.latents,
       c.intervention, c.expects, c.flips, c.experiments, c.hypothesis, c.verdict, c.why, c.value, c.low, c.high, c.n, c.control,
       c.control_value, c.control_low, c.control_high, c.control_n, c.flipped, c.flipped_low, c.flipped_high, c.flipped_n,
       c.flipped_control, c.flipped_control_low, c.flipped_control_high, c.direction_control, c.direction_control_low,
       c.direction_control_high, c.direction_control_n, c.p, c.p_adjusted
FROM data.claims c JOIN data.investigations i USING (investigation_id);
COMMENT ON VIEW claims IS 'One row a claim of an investigation, with what checking it by code on held-out prompts found. All verified ones about a latent: verdict = ''verified'' AND list_contains(latents, 17).';
COMMENT ON COLUMN claims.claim_id IS 'Id of the claim, INVESTIGATION/C1.';
COMMENT ON COLUMN claims.investigation_id IS 'The investigation that made it.';
COMMENT ON COLUMN claims.investigator IS 'Who made it: recipe, or a model''s name.';
COMMENT ON COLUMN claims.dictionary IS 'Fingerprint of the dictionary that its latents are of.';
COMMENT ON COLUMN claims.statement IS 'What is claimed, in the investigator''s words.';
COMMENT ON COLUMN claims.kind IS 'causal or correlational.';
COMMENT ON COLUMN claims.latents IS 'The latents that it is about.';
COMMENT ON COLUMN claims.intervention IS 'What was done to them to check it: ablate, interchange or steer.';
COMMENT ON COLUMN claims.expects IS 'What that does to the metric by the claim: falls or rises.';
COMMENT ON COLUMN claims.flips IS 'Whether it also says that most prompts change what they show.';
COMMENT ON COLUMN claims.experiments IS 'Ids of the experiments that it rests on.';
COMMENT ON COLUMN claims.hypothesis IS 'The hypothesis that it comes from.';
COMMENT ON COLUMN claims.verdict IS 'verified, failed, unverified (it could not be checked), correlational (nothing causal was claimed), or withdrawn (taken back, not checked).';
COMMENT ON COLUMN claims.why IS 'Why that is the verdict.';
COMMENT ON COLUMN claims.value IS 'Mean change of the metric on the held-out prompts.';
COMMENT ON COLUMN claims.low IS 'Lower end of its interval, which holds for all claims of the investigation together.';
COMMENT ON COLUMN claims.high IS 'Upper end of that interval.';
COMMENT ON COLUMN claims.n IS 'Held-out prompts that it rests on.';
COMMENT ON COLUMN claims.control IS 'The control that it stands beside, in words.';
COMMENT ON COLUMN claims.control_value IS 'The change under the control.';
COMMENT ON COLUMN claims.control_low IS 'Lower end of the control''s interval.';
COMMENT ON COLUMN claims.control_high IS 'Upper end of the control''s interval.';
COMMENT ON COLUMN claims.control_n IS 'Draws that the control rests on.';
COMMENT ON COLUMN claims.flipped IS 'Share of the held-out prompts whose behaviour is gone (or came).';
COMMENT ON COLUMN claims.flipped_low IS 'Lower end of its interval.';
COMMENT ON COLUMN claims.flipped_high IS 'Upper end of its interval.';
COMMENT ON COLUMN claims.flipped_n IS 'Prompts that it is a share of.';
COMMENT ON COLUMN claims.flipped_control IS 'The same share under the control.';
COMMENT ON COLUMN claims.flipped_control_low IS 'Lower end of its interval.';
COMMENT ON COLUMN claims.flipped_control_high IS 'Upper end of its interval.';
COMMENT ON COLUMN claims.direction_control IS 'Change of the metric under random directions at the same KL, where the claim steers.';
COMMENT ON COLUMN claims.direction_control_low IS 'Lower end of its interval.';
COMMENT ON COLUMN claims.direction_control_high IS 'Upper end of its interval.';
COMMENT ON COLUMN claims.direction_control_n IS 'Directions that were drawn.';
COMMENT ON COLUMN claims.p IS 'P-value of the effect against the control.';
COMMENT ON COLUMN claims.p_adjusted IS 'The same, adjusted by Holm (1979) over the causal claims of the investigation.';

CREATE VIEW snapshot AS
SELECT published_at, schema_version, code_version, store FROM data.snapshot;
COMMENT ON VIEW snapshot IS 'One row: when these results were published, and by what.';
COMMENT ON COLUMN snapshot.published_at IS 'When.';
COMMENT ON COLUMN snapshot.schema_version IS 'Version of the store''s schema.';
COMMENT ON COLUMN snapshot.code_version IS 'Version of exegete.';
COMMENT ON COLUMN snapshot.store IS 'Where the store lay.';
