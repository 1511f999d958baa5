-- Searching in SQL, over the views: made anew at every publishing; {{…}} is filled by macros.py.
CREATE MACRO phrase_words(phrase) AS
CASE WHEN regexp_matches(phrase, '[{{letters}}]') THEN list_sort(list_distinct(regexp_extract_all(lower(phrase), '[{{letters}}]+')))
     ELSE [lower(trim(phrase))] END;
COMMENT ON MACRO phrase_words IS 'The words of a phrase as search_words looks for them: lower case, each once; a phrase without a letter or digit as it stands.';

CREATE MACRO phrase_pattern(phrase) AS
CASE WHEN regexp_matches(phrase, '{{unspaced}}') OR NOT regexp_matches(phrase, '[{{letters}}]')
     THEN '(' || array_to_string(list_transform(phrase_words(phrase), lambda word: regexp_escape(word)), '|') || ')'
     ELSE '(?:^|[^{{letters}}])((?:' || array_to_string(phrase_words(phrase), '|') || ')[{{letters}}]*)' END;
COMMENT ON MACRO phrase_pattern IS 'Regular expression for every word that begins like one of the phrase; for those themselves, anywhere, in scripts without spaces and for punctuation.';

CREATE MACRO longest_word(phrase) AS
list_reduce(phrase_words(phrase), lambda one, other: CASE WHEN length(other) > length(one) THEN other ELSE one END);
COMMENT ON MACRO longest_word IS 'The longest word of a phrase, likely to be the rarest.';

CREATE MACRO search_words(phrase, most := 20, of_dictionary := '') AS TABLE
WITH asked AS (
    SELECT CASE WHEN len(words) <= {{most_words}} THEN words
           ELSE error('search_words takes {{most_words}} different words, and this phrase has ' || len(words)) END AS words
    FROM (SELECT phrase_words(phrase) AS words)
), found AS (
    SELECT dictionary, latent, explanation_id, text, words, length(text) AS length,
           regexp_extract_all(lower(text), phrase_pattern(phrase), 1) AS begun
    FROM explanations, asked
    WHERE trim(phrase) <> '' AND starts_with(dictionary, of_dictionary) AND contains(lower(text), longest_word(phrase))
    AND list_bool_and(list_transform(words, lambda word: contains(lower(text), word)))
), counted AS (
    SELECT dictionary, latent, explanation_id, text, length,
           list_transform(words, lambda word: list_sum(list_transform(begun, lambda one:
               CASE WHEN one = word THEN 1.0 WHEN starts_with(one, word) THEN 0.5 ELSE 0.0 END))) AS times
    FROM found
), holding AS (
    SELECT *, 0.3 + 0.9 * length / avg(length) OVER () AS damping FROM counted WHERE coalesce(list_min(times), 0) > 0
)
SELECT dictionary, latent, explanation_id, text,
       (list_sum(list_transform(times, lambda n: 2.2 * n / (n + damping)))
        + CASE WHEN len(times) > 1 AND contains(lower(text), lower(trim(phrase))) THEN 1 ELSE 0 END)::DOUBLE AS word_score
FROM holding
ORDER BY word_score DESC, dictionary, latent, explanation_id LIMIT most;
COMMENT ON MACRO TABLE search_words IS 'Explanations that hold every word of the phrase, whole or as the beginning of a word, best first: BM25 among those that hold them all (a beginning counts half), and 1 more where the phrase stands verbatim; 20 rows unless most := N says otherwise.';

CREATE MACRO search_meaning(query, most := 20, of_model := NULL) AS TABLE
WITH scanned AS (
    SELECT avg(cosine) AS cosine_mean,
-- Compared in the order of their fields, so that which of several equal ones are kept depends on nothing else.
           max({'cosine': cosine, 'turned': -latent, 'dictionary': dictionary, 'explanation_id': explanation_id}, most) AS best
    FROM (
        SELECT dictionary, latent, explanation_id, list_inner_product(vector, query::FLOAT[]) AS cosine FROM embeddings
        WHERE len(vector) = len(query) AND model = coalesce(of_model, model)
    )
), found AS (SELECT unnest(best, recursive := true), cosine_mean FROM scanned)
SELECT f.dictionary, e.latent, f.explanation_id, e.text, f.cosine, f.cosine_mean
FROM found f JOIN explanations e ON e.latent = -f.turned AND e.dictionary = f.dictionary AND e.explanation_id = f.explanation_id
ORDER BY f.cosine DESC, f.dictionary, e.latent, f.explanation_id;
COMMENT ON MACRO TABLE search_meaning IS 'Explanations nearest to a vector of unit length by cosine, beside the mean cosine to all (what one at random has); 20 rows unless most := N says otherwise.';

CREATE MACRO nearest_explanations(of_dictionary, of_latent, most := 20) AS TABLE
WITH own AS MATERIALIZED (
    SELECT m.vector, m.model, m.explanation_id FROM embeddings m
    LEFT JOIN best_explanations b USING (dictionary, latent, explanation_id)
    WHERE starts_with(m.dictionary, of_dictionary) AND m.latent = of_latent
    ORDER BY b.explanation_id IS NULL, m.explanation_id, m.model LIMIT 1
), scanned AS (
    SELECT avg(cosine) AS cosine_mean,
           max({'cosine': cosine, 'turned': -latent, 'dictionary': dictionary, 'explanation_id': explanation_id}, most) AS best
    FROM (
        SELECT m.dictionary, m.latent, m.explanation_id, list_inner_product(m.vector, own.vector) AS cosine
        FROM embeddings m, own
        WHERE m.model = own.model AND NOT (m.latent = of_latent AND starts_with(m.dictionary, of_dictionary))
    )
), found AS (SELECT unnest(best, recursive := true), cosine_mean FROM scanned)
SELECT f.dictionary, e.latent, f.explanation_id, e.text, f.cosine, f.cosine_mean
FROM found f JOIN explanations e ON e.latent = -f.turned AND e.dictionary = f.dictionary AND e.explanation_id = f.explanation_id
ORDER BY f.cosine DESC, f.dictionary, e.latent, f.explanation_id;
COMMENT ON MACRO TABLE nearest_explanations IS 'Explanations nearest in meaning to the best one of a latent, of every dictionary, beside the mean cosine to all. The dictionary by fingerprint or its start; 20 rows unless most := N says otherwise.';

CREATE MACRO explanation_agreement(dictionary_a, dictionary_b) AS TABLE
WITH one AS (
    SELECT m.dictionary, m.latent, m.model, m.explanation_id, m.vector FROM embeddings m
    LEFT JOIN best_explanations b USING (dictionary, latent, explanation_id)
    WHERE starts_with(m.dictionary, dictionary_a) OR starts_with(m.dictionary, dictionary_b)
    QUALIFY row_number() OVER (
        PARTITION BY m.dictionary, m.latent, m.model ORDER BY b.explanation_id IS NULL, m.explanation_id) = 1
), of_b AS MATERIALIZED (SELECT * FROM one WHERE starts_with(dictionary, dictionary_b)
), of_a AS MATERIALIZED (
    SELECT *, row_number() OVER (PARTITION BY model ORDER BY hash(explanation_id), latent) AS place, count(*) OVER (PARTITION BY model) AS n
    FROM one WHERE starts_with(dictionary, dictionary_a)
), paired AS MATERIALIZED (
    SELECT a.model, a.place, max(list_inner_product(a.vector, b.vector)) AS cosine,
           arg_max({'latent': b.latent, 'explanation_id': b.explanation_id, 'vector': b.vector},
                   list_inner_product(a.vector, b.vector)) AS nearest
    FROM of_a a JOIN of_b b ON a.model = b.model AND (a.dictionary <> b.dictionary OR a.latent <> b.latent) GROUP BY ALL
)
SELECT a.latent, p.nearest.latent AS nearest_latent, p.cosine, list_inner_product(a.vector, other.nearest.vector) AS floor,
       a.explanation_id, p.nearest.explanation_id AS nearest_explanation_id, a.model
FROM of_a a JOIN paired p USING (model, place)
LEFT JOIN paired other ON other.model = a.model AND other.place = a.place % a.n + 1 AND a.n > 1
ORDER BY a.model, a.latent;
COMMENT ON MACRO TABLE explanation_agreement IS 'For each latent of the first the explanation of the second that is nearest to its own in meaning, with the cosine; floor is the cosine to the nearest of another latent, drawn by hash. Compares every pair: for two dictionaries of some 20,000 latents; for more, and for a floor by chance, exegete search --agree.';
