"""How many latents of a random-weight dictionary come out as explained? Run `python -m benchmarks.random_dictionary`.

Dictionaries at one hook point of the bundled subject go through the same run (lexical explainer, predicate judge, detection and
fuzzing), each with its own control (`label.random_control`, `exegete.tools.random_control`): the bundled one; `tied`, Gaussian
directions of unit length, the encoder their transpose, biases zero, as a TopK dictionary stands before training; and
`independent`, whose encoder is drawn on its own. Random directions read text and nobody trained them: what is said of them is
true of any direction.

1. `scores`: per evaluator the mean over latents, the quartiles and the AUROC of the bundled latents' scores against those of
   `tied`; the mean of the control; and how long the explanations are.
2. `shares`: latents typed as explained (PROTOCOLS §12), with Wilson's interval over latents. `run` is what the run itself
   stored, by both bars. The others are the same arithmetic over its scores: `shuffled` by the shuffled explanations alone,
   for both evaluators and for either; `over_draws` the mean share, and the range that holds 95 % of the shares, where the
   control's latents are drawn again from all random ones of the controls, since a bar that rests on so many has an error
   of its own.
3. `by_token`: why. The share of the variance at the hook point that the token alone predicts, and the token with the one
   before it, on texts that the means were not taken from; and how well the token alone predicts where a latent fires
   (median AUROC over latents).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import exegete
from exegete.agent.config import load_config
from exegete.agent.run import run
from exegete.evaluators.statistics import auroc, mean_interval, wilson
from exegete.evaluators.typing import INPUT_EVALUATORS, Scored, types
from exegete.tools.bundled import dictionary_path, sample_texts, subject_path
from exegete.tools.dictionaries import PlainDictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.random_control import unit_rows, write_plain
from exegete.tools.seeds import generator
from exegete.tools.subject import Subject, load_subject

DRAWS = 200
FITTED_TEXTS, HELD_OUT_TEXTS = 1_500, 500
PREDICTED = 200
"""Latents of each dictionary of which it is seen how well the token predicts where they fire."""
LEAST_FIRINGS = 10
"""On the held-out texts, below which where a latent fires is too little to be predicted or not."""

Floors = dict[str, list[float]]
TYPES = ("input", "output", "both", "unexplained")
"""Of latents that were measured; dead, rare and dense ones were not."""


class Labelled(NamedTuple):
    """What a run came to: balanced accuracies by evaluator, those of its floors, types, and lengths of the texts."""

    scores: dict[str, list[Scored]]
    shuffled: Floors
    control: Floors
    typed: dict[int, str]
    characters: list[int]


DICTIONARIES = ("bundled", "tied", "independent")


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=300, help="of each dictionary, drawn by the seed")
    parser.add_argument("--documents", type=int, default=4_000, help="of the bundled grammar")
    parser.add_argument("--floors", type=int, default=100, help="latents with shuffled explanations")
    parser.add_argument("--control", type=int, default=150, help="latents of each control")
    parser.add_argument("--dictionaries", nargs="+", default=["bundled", "tied"], choices=DICTIONARIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for the stores; a temporary one where it is left out")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(chosen.work or Path(temporary), chosen)
    options = {name: value for name, value in vars(chosen).items() if name != "work"}
    print(json.dumps({"options": options, **figures, "cpu_s": round(time.process_time() - began)}, indent=1))


def measure(work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return every figure; stores and dictionaries are written to `work`."""
    subject = load_subject(str(subject_path()))
    bundled = load_dictionary(str(dictionary_path("demo")), subject)
    assert isinstance(bundled, PlainDictionary)
    folders = {"bundled": "bundled:demo"}
    for name, tied in (("tied", True), ("independent", False)):
        folders[name] = str(write_random(work / f"{name}-dictionary", bundled, tied, chosen.seed))
    wanted = [name for name in DICTIONARIES if name in chosen.dictionaries]
    found = {name: label(folders[name], work / f"{name}-store", chosen) for name in wanted}
    loaded = {"bundled": bundled} | {
        name: load_dictionary(folders[name], subject) for name in wanted if name != "bundled"
    }
    return {
        "scores": {name: summary(one, found.get("tied")) for name, one in found.items()},
        "shares": shares(found, chosen.seed),
        "by_token": by_token(subject, loaded, chosen.seed),
    }


def write_random(folder: Path, like: PlainDictionary, tied: bool, seed: int) -> Path:
    """Write a dictionary of the shape, hook point and TopK of `like`, with Gaussian rows of unit length; return `folder`."""
    decoder = unit_rows(like.latents, like.width, seed, "decoder")
    encoder = decoder if tied else unit_rows(like.latents, like.width, seed, "encoder")
    drawn = replace(
        like,
        name=folder.name,
        encoder=encoder.T,
        encoder_bias=torch.zeros(like.latents),
        decoder=decoder,
        decoder_bias=torch.zeros(like.width),
        input_shift=None,
    )
    return write_plain(folder, drawn)


def label(dictionary: str, store: Path, chosen: argparse.Namespace) -> Labelled:
    """Label a dictionary in a run of its own and return what came out."""
    settings = ["subject.name=bundled", f"dictionary.path={dictionary}", "corpus.source=bundled", f"seed={chosen.seed}"]
    settings += [f"corpus.documents={chosen.documents}", f"label.limit={chosen.latents}"]
    settings += [f"label.floors={chosen.floors}", f"label.random_control={chosen.control}"]
    settings += ["label.explainer=lexical", "label.judge=predicate"]
    run(load_config(None, settings, {"store": str(store)}))
    connection = exegete.connect(store)
    rows = connection.execute(
        "SELECT latent, evaluator, baseline, value, low FROM scores WHERE metric = 'balanced_accuracy'"
        " AND (baseline IS NULL OR baseline = 'shuffled') AND value IS NOT NULL ORDER BY ALL"
    ).fetchall()
    typed = dict(connection.execute(f"SELECT latent, typed FROM latents WHERE typed IN {TYPES}").fetchall())
    lengths = [length for (length,) in connection.execute("SELECT length(text) FROM explanations").fetchall()]
    found = Labelled({}, {}, {}, typed, lengths)
    for latent, evaluator, baseline, value, low in rows:
        if baseline is None:
            found.scores.setdefault(evaluator, []).append(Scored(latent, value, low))
        else:
            found.shuffled.setdefault(evaluator, []).append(value)
    query = "SELECT evaluator, value FROM random_controls WHERE metric = 'balanced_accuracy' AND value IS NOT NULL"
    for evaluator, value in connection.execute(f"{query} ORDER BY evaluator, latent").fetchall():
        found.control.setdefault(evaluator, []).append(value)
    return found


def summary(found: Labelled, random: Labelled | None) -> dict[str, Any]:
    """Return the scores of one dictionary by evaluator, beside shuffled explanations and the `random` latents."""
    figures: dict[str, Any] = {"median_characters": float(np.median(found.characters))}
    for evaluator, rows in found.scores.items():
        values = _values(rows)
        figures[evaluator] = {
            "mean": _round(mean_interval(values, np.random.default_rng(0))),
            "n": len(values),
            "quartiles": _round(np.quantile(values, [0.25, 0.5, 0.75])),
            "shuffled_mean": _round([np.mean(found.shuffled[evaluator])])[0],
            "control_mean": _round(mean_interval(np.array(found.control[evaluator]), np.random.default_rng(0))),
            "control_n": len(found.control[evaluator]),
        }
        if random is not None:
            others = _values(random.scores[evaluator])
            truth = np.repeat([True, False], [len(values), len(others)])
            area = auroc(truth, np.concatenate([values, others]))
            figures[evaluator]["auroc_against_tied"] = _round([area])[0]
    return figures


def shares(found: Mapping[str, Labelled], seed: int) -> list[dict[str, Any]]:
    """Return the share of latents typed as explained for each dictionary, set of evaluators and bar."""
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        computed = types(one.scores, one.shuffled, controls=[one.control])
        if computed != one.typed:
            raise RuntimeError(f"{name}: the run typed other latents than its scores say")
        over = [_explained(_redrawn(found, one, seed, draw)) / len(one.typed) for draw in range(DRAWS)]
        spread = _round([np.mean(over), *np.quantile(over, [0.025, 0.975])])
        rows.append({"dictionary": name, "bar": "run", **_figures(one.typed), "over_draws": spread})
        for side in (INPUT_EVALUATORS, *((evaluator,) for evaluator in INPUT_EVALUATORS)):
            shuffled = types(one.scores, one.shuffled, input_side=side)
            rows.append({"dictionary": name, "bar": "shuffled", "evaluators": " or ".join(side), **_figures(shuffled)})
    return rows


def _redrawn(found: Mapping[str, Labelled], one: Labelled, seed: int, draw: int) -> dict[int, str]:
    """Return the types of `one` by a control of the same size, drawn with replacement from the latents of all controls."""
    pooled = {name: np.concatenate([each.control[name] for each in found.values()]) for name in one.control}
    size, total = len(one.control[INPUT_EVALUATORS[0]]), len(pooled[INPUT_EVALUATORS[0]])
    latents = generator(seed, "draws", draw).integers(total, size=size)
    return types(
        one.scores, one.shuffled, controls=[{name: values[latents].tolist() for name, values in pooled.items()}]
    )


def _figures(typed: Mapping[int, str]) -> dict[str, Any]:
    explained, n = _explained(typed), len(typed)
    return {"explained": explained, "n": n, "share": _round([explained / n, *wilson(explained, n)])}


def _explained(typed: Mapping[int, str]) -> int:
    return sum(one != "unexplained" for one in typed.values())


def by_token(subject: Subject, dictionaries: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return how much of the vectors, and of each dictionary's firing, the token (and the one before it) predicts."""
    hook_point = dictionaries["bundled"].hook_point
    vectors, tokens, before = _read(subject, hook_point, list(sample_texts(seed + 1, FITTED_TEXTS + HELD_OUT_TEXTS)))
    fitted = torch.arange(len(tokens)) < int(len(tokens) * FITTED_TEXTS / (FITTED_TEXTS + HELD_OUT_TEXTS))
    pairs = torch.unique(tokens * len(subject.pieces) + before, return_inverse=True)[1]
    token_mean, seen = _means(tokens, vectors, fitted)
    pair_mean, pair_seen = _means(pairs, vectors, fitted)
    total = (vectors[~fitted] - vectors[fitted].mean(0)).square().sum()
    guess = torch.where(seen[tokens, None], token_mean[tokens], vectors[fitted].mean(0))
    closer = torch.where(pair_seen[pairs, None], pair_mean[pairs], guess)
    left = [float((vectors - one)[~fitted].square().sum() / total) for one in (guess, closer)]
    token_share, both_share = _round([1 - one for one in left])
    figures: dict[str, Any] = {"variance_token": token_share, "variance_token_and_before": both_share}
    for name, dictionary in dictionaries.items():
        firing = torch.cat([(dictionary.encode(part) > 0).float() for part in torch.split(vectors, 4_096)])
        rates, _ = _means(tokens, firing, fitted)
        truth, guessed = firing[~fitted].bool().numpy(), rates[tokens[~fitted]].double().numpy()
        live = [latent for latent in range(truth.shape[1]) if truth[:, latent].sum() >= LEAST_FIRINGS]
        areas = [auroc(truth[:, latent], guessed[:, latent]) for latent in live[:PREDICTED]]
        known = [area for area in areas if area is not None]
        figures[f"firing_auroc_{name}"] = {"median": _round([np.median(known)])[0], "n": len(known)}
    return figures


def _read(subject: Subject, hook_point: str, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors, shape (token, width), tokens and the tokens before them (the first before itself), shape (token,)."""
    model = LiveModel(subject, batch_tokens=8_192)

    def read(reading: Reading) -> list[tuple[Tensor, Tensor, Tensor]]:
        batch, found = reading.batch, []
        for row in range(len(batch.trials)):
            shown = batch.mask[row]
            tokens = batch.tokens[row][shown]
            vectors = reading.vectors[hook_point][row][shown].float().cpu()
            found.append((vectors, tokens.cpu(), torch.cat([tokens[:1], tokens[:-1]]).cpu()))
        return found

    parts = model.run([Trial(model.tokens(text)) for text in texts], read, keep="none", points=[hook_point])
    vectors, tokens, before = (torch.cat(some) for some in zip(*parts, strict=True))
    return vectors, tokens, before


def _means(keys: Tensor, values: Tensor, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the fitted `values` of each key, shape (key, …), and whether there is any, shape (key,)."""
    size = int(keys.max()) + 1
    counts = torch.bincount(keys[fitted], minlength=size)
    sums = torch.zeros(size, values.shape[1]).index_add_(0, keys[fitted], values[fitted])
    return sums / counts.clamp(min=1)[:, None], counts > 0


def _values(rows: Sequence[Scored]) -> np.ndarray:
    return np.array([row.value for row in rows], dtype=np.float64)


def _round(values: Any) -> list[float | None]:
    return [None if value is None else round(float(value), 3) for value in values]


if __name__ == "__main__":
    main()
