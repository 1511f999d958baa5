"""How many latents of a random-weight dictionary come out as explained? Run `python -m benchmarks.random_dictionary`.

Three dictionaries at one hook point of the bundled subject go through the same run (lexical explainer, predicate judge,
detection and fuzzing): the bundled one; `tied`, Gaussian directions of unit length, the encoder their transpose, biases zero,
as a TopK dictionary stands before training; and `independent`, whose encoder is drawn on its own. Random directions read text
and nobody trained them: what is said of them is true of any direction.

1. `scores`: per evaluator the mean over latents, the quartiles and the AUROC of the bundled latents' scores against those of
   `tied`; and how long the explanations are.
2. `shares`: latents typed as explained (PROTOCOLS §12), with Wilson's interval over latents, by two bars. `shuffled`: the
   shuffled explanations of the dictionary's own run. `random`: beside it the scores of half of the `tied` latents, drawn by
   seed, for explanations of their own; the other half is what `tied` is typed on. `over_splits` is the mean share over other
   halves, and the range that holds 95 % of them, since a bar drawn from so many latents has an error of its own.
3. `by_token`: why. The share of the variance at the hook point that the token alone predicts, and the token with the one
   before it, on texts that the means were not taken from; and how well the token alone predicts where a latent fires
   (median AUROC over latents).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from exegete.tools.seeds import generator
from exegete.tools.subject import Subject, load_subject

SPLITS = 200
FITTED_TEXTS, HELD_OUT_TEXTS = 1_500, 500
PREDICTED = 200
"""Latents of each dictionary of which it is seen how well the token predicts where they fire."""
LEAST_FIRINGS = 10
"""On the held-out texts, below which where a latent fires is too little to be predicted or not."""

Floors = dict[str, list[float]]


class Labelled(NamedTuple):
    """What a run came to: balanced accuracies by evaluator, those of shuffled explanations, and lengths of the texts."""

    scores: dict[str, list[Scored]]
    shuffled: Floors
    characters: list[int]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=300, help="of each dictionary, drawn by the seed")
    parser.add_argument("--documents", type=int, default=4_000, help="of the bundled grammar")
    parser.add_argument("--floors", type=int, default=100, help="latents with shuffled explanations")
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
    found = {name: label(folder, work / f"{name}-store", chosen) for name, folder in folders.items()}
    loaded = {"bundled": bundled} | {name: load_dictionary(folders[name], subject) for name in ("tied", "independent")}
    return {
        "scores": {name: summary(one, found["tied"]) for name, one in found.items()},
        "shares": shares(found, chosen.seed),
        "by_token": by_token(subject, loaded, chosen.seed),
    }


def write_random(folder: Path, like: PlainDictionary, tied: bool, seed: int) -> Path:
    """Write a dictionary of the shape, hook point and TopK of `like`, with Gaussian rows of unit length; return `folder`."""
    from safetensors.torch import save_file

    def drawn(name: str) -> Tensor:
        rows = torch.from_numpy(generator(seed, "random dictionary", name).standard_normal((like.latents, like.width)))
        return torch.nn.functional.normalize(rows).float()

    decoder = drawn("decoder")
    encoder = decoder if tied else drawn("encoder")
    weights = {"encoder": encoder.T.contiguous(), "encoder_bias": torch.zeros(like.latents)}
    weights |= {"decoder": decoder.clone(), "decoder_bias": torch.zeros(like.width)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "dictionary.safetensors")
    configuration = {"hook_point": like.hook_point, "activation": "topk", "k": like.k, "subtract_decoder_bias": True}
    (folder / "dictionary.json").write_text(json.dumps(configuration))
    return folder


def label(dictionary: str, store: Path, chosen: argparse.Namespace) -> Labelled:
    """Label a dictionary in a run of its own and return what came out."""
    settings = ["subject.name=bundled", f"dictionary.path={dictionary}", "corpus.source=bundled", f"seed={chosen.seed}"]
    settings += [f"corpus.documents={chosen.documents}", f"label.limit={chosen.latents}"]
    settings += [f"label.floors={chosen.floors}", "label.explainer=lexical", "label.judge=predicate"]
    run(load_config(None, settings, {"store": str(store)}))
    connection = exegete.connect(store)
    rows = connection.execute(
        "SELECT latent, evaluator, baseline, value, low FROM scores WHERE metric = 'balanced_accuracy'"
        " AND (baseline IS NULL OR baseline = 'shuffled') AND value IS NOT NULL ORDER BY ALL"
    ).fetchall()
    found = Labelled({}, {}, [len(text) for (text,) in connection.execute("SELECT text FROM explanations").fetchall()])
    for latent, evaluator, baseline, value, low in rows:
        if baseline is None:
            found.scores.setdefault(evaluator, []).append(Scored(latent, value, low))
        else:
            found.shuffled.setdefault(evaluator, []).append(value)
    return found


def summary(found: Labelled, random: Labelled) -> dict[str, Any]:
    """Return the scores of one dictionary by evaluator, beside shuffled explanations and the `random` latents."""
    figures: dict[str, Any] = {"median_characters": float(np.median(found.characters))}
    for evaluator, rows in found.scores.items():
        values, others = _values(rows), _values(random.scores[evaluator])
        mean = mean_interval(values, np.random.default_rng(0))
        truth = np.repeat([True, False], [len(values), len(others)])
        figures[evaluator] = {
            "mean": _round(mean),
            "n": len(values),
            "quartiles": _round(np.quantile(values, [0.25, 0.5, 0.75])),
            "shuffled_mean": _round([np.mean(found.shuffled[evaluator])])[0],
            "auroc_against_tied": _round([auroc(truth, np.concatenate([values, others]))])[0],
        }
    return figures


def shares(found: Mapping[str, Labelled], seed: int) -> list[dict[str, Any]]:
    """Return the share of latents typed as explained for each dictionary, set of evaluators and bar."""
    rows = []
    for evaluators in (INPUT_EVALUATORS, *((name,) for name in INPUT_EVALUATORS)):
        for name, one in found.items():
            for kind in ("shuffled", "random"):
                rows.append({"dictionary": name, "evaluators": " or ".join(evaluators), "bar": kind})
                rows[-1] |= _share(found["tied"], one, evaluators, kind == "random", seed)
    return rows


def _share(random: Labelled, one: Labelled, evaluators: Sequence[str], controlled: bool, seed: int) -> dict[str, Any]:
    if not controlled:
        return _figures(types(one.scores, one.shuffled, input_side=evaluators))
    drawn = [_typed_on_half(random, one, evaluators, seed, split) for split in range(SPLITS + 1)]
    over = [_explained(each) / len(each) for each in drawn[1:]]
    spread = _round([np.mean(over), *np.quantile(over, [0.025, 0.975])])
    return {**_figures(drawn[0]), "over_splits": spread}


def _typed_on_half(random: Labelled, one: Labelled, evaluators: Sequence[str], seed: int, split: int) -> dict[int, str]:
    latents = sorted({row.latent for rows in random.scores.values() for row in rows})
    order = generator(seed, "halves", split).permutation(latents)
    half = set(order[: len(order) // 2].tolist())
    control = _kept(random, lambda latent: latent in half)
    typed = _kept(one, lambda latent: latent not in half) if one is random else one.scores
    bars = {name: [row.value for row in rows if row.value is not None] for name, rows in control.items()}
    return types(typed, one.shuffled, controls=[bars], input_side=evaluators)


def _kept(found: Labelled, wanted: Callable[[int], bool]) -> dict[str, list[Scored]]:
    return {name: [row for row in rows if wanted(row.latent)] for name, rows in found.scores.items()}


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
