"""A random-weight dictionary as control: what is said of directions that nobody trained (PROTOCOLS §11, §12).

1. `calibrate` reads some contexts of the corpus: the median of every coordinate at the hook point, and how many latents the
   dictionary has active on a token on average.
2. `random_control` draws one Gaussian row of unit length for each latent. The encoder is their transpose, the encoder's bias
   zero, and TopK keeps as many latents as the dictionary does: a TopK dictionary as it stands before training, its bias at the
   centre of what it reads (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A; Bricken et al. 2023).
   Without that bias the residual stream's common direction would decide which latents fire, the same ones on every token.
3. A ReLU or JumpReLU dictionary gets a TopK control of equal mean activity: random directions with biases of zero would fire
   on every other token, which no trained latent does.

Of its latents a run labels those that fire as often as the dictionary's do (`exegete.agent.workbench.control_latents`): rare
latents score higher than frequent ones, whoever drew their directions.

Random directions of a trained model read text: explanations of them can be true. The control asks more of an explanation than
to be true (Heap et al. 2025, "Sparse autoencoders can interpret randomly initialized transformers").
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary, PlainDictionary, dictionary_fingerprint
from exegete.tools.errors import UserError
from exegete.tools.seeds import digest, generator

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.subject import Subject

CONTEXTS = 128
"""Of the corpus, drawn by the seed, that `calibrate` reads."""
_CONTEXTS_AT_ONCE = 4
_ROWS_AT_ONCE = 1_024


@dataclass(frozen=True)
class Calibration:
    """What a control takes from the corpus."""

    centre: tuple[float, ...]
    """Median of every coordinate at the hook point, length width."""
    k: int
    """Latents of the dictionary that are active on a token, on average."""


def require_plain(dictionary: Dictionary) -> PlainDictionary:
    """Return `dictionary`.

    Raises:
        UserError: it is no plain matrices with TopK, ReLU or JumpReLU, so no random dictionary is as it is.
    """
    if isinstance(dictionary, PlainDictionary):
        return dictionary
    raise UserError(
        f"dictionary {dictionary.name!r} has no random-weight control: one is made for plain matrices with TopK, ReLU or "
        "JumpReLU; set label.random_control = 0"
    )


def calibrate(dictionary: PlainDictionary, subject: Subject, corpus: Corpus, seed: int) -> Calibration:
    """Return what a control of `dictionary` takes from `corpus`, over `CONTEXTS` contexts drawn by `seed`.

    Raises:
        UserError: the corpus has no token on which a latent may fire, or the dictionary fires on none.
    """
    drawn = sorted(generator(seed, "calibrate", corpus.fingerprint).permutation(corpus.contexts)[:CONTEXTS].tolist())
    found, active = [], 0
    for at in range(0, len(drawn), _CONTEXTS_AT_ONCE):
        some = drawn[at : at + _CONTEXTS_AT_ONCE]
        tokens = torch.cat([torch.from_numpy(corpus.tokens(one, one + 1)) for one in some]).long()
        shown = torch.cat([torch.from_numpy(corpus.mask(one, one + 1)) for one in some])
        vectors = subject.residual(tokens, dictionary.hook_point)[shown.to(subject.device)]
        active += len(dictionary.encode_sparse(vectors).rows)
        found.append(vectors.float().cpu())
    vectors = torch.cat(found)
    if not len(vectors) or not active:
        raise UserError(
            f"dictionary {dictionary.name!r} fires on no token of the corpus, so there is nothing to control"
        )
    centre = vectors.median(dim=0).values.tolist()
    return Calibration(tuple(centre), min(max(1, round(active / len(vectors))), dictionary.latents))


def stored_calibration(
    folder: Path, dictionary: PlainDictionary, subject: Subject, corpus: Corpus, seed: int
) -> Calibration:
    """Return the calibration, from `folder` where it is there, else made and kept there.

    Kept, because another number of threads changes its last bits, and a control with other bits would be another dictionary.

    Raises:
        UserError: as `calibrate`; or the file is damaged.
    """
    name = digest(dictionary.fingerprint, corpus.fingerprint, str(seed)).removeprefix("sha256:")[:16]
    path = folder / f"calibration-{name}.json"
    try:
        held = json.loads(path.read_text())
        return Calibration(tuple(held["centre"]), int(held["k"]))
    except FileNotFoundError:
        found = calibrate(dictionary, subject, corpus, seed)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); remove it and resume") from error
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(asdict(found), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    return found


def random_control(
    dictionary: PlainDictionary, subject: Subject, calibration: Calibration, seed: int
) -> PlainDictionary:
    """Return the random-weight control of `dictionary`: its hook points and number of latents, directions drawn by `seed`.

    The seed stands with the dictionary's fingerprint, so that each dictionary has directions of its own.
    """
    latents, out = dictionary.decoder.shape
    decoder = unit_rows(latents, out, seed, dictionary.fingerprint, "decoder")
    tied = out == dictionary.width
    encoder = decoder if tied else unit_rows(latents, dictionary.width, seed, dictionary.fingerprint, "encoder")
    centre = torch.tensor(calibration.centre)
    writes_back = dictionary.hook_point_out == dictionary.hook_point
    facts = {"random control of": dictionary.fingerprint, "seed": seed, "k": calibration.k}
    weights = {"encoder": encoder, "decoder": decoder, "centre": centre}
    return PlainDictionary(
        name=f"random control of {dictionary.name}",
        fingerprint=dictionary_fingerprint(weights, facts, dictionary.hook_point, subject),
        hook_point=dictionary.hook_point,
        encoder=encoder.T.contiguous(),
        encoder_bias=torch.zeros(latents),
        decoder=decoder,
        decoder_bias=centre if writes_back else torch.zeros(out),
        activation="topk",
        k=calibration.k,
        input_shift=centre,
        output=dictionary.output,
    ).to(subject.device, subject.dtype)


def unit_rows(rows: int, width: int, seed: int, *names: str | int) -> Tensor:
    """Return Gaussian rows of unit length, shape (rows, width), in float32 on the CPU; `names` tell one draw from another."""
    rng, drawn = generator(seed, "random dictionary", *names), torch.empty(rows, width)
    for at in range(0, rows, _ROWS_AT_ONCE):  # The whole in float64 would take as much memory again, twice.
        part = torch.from_numpy(rng.standard_normal((min(_ROWS_AT_ONCE, rows - at), width)))
        drawn[at : at + len(part)] = torch.nn.functional.normalize(part).float()
    return drawn


def write_plain(folder: Path, dictionary: PlainDictionary) -> Path:
    """Write a dictionary that `load_dictionary` reads, as safetensors and JSON; return `folder`.

    Raises:
        ValueError: it shifts its input by something that is not its decoder's bias, which the format cannot say.
    """
    from safetensors.torch import save_file

    d = dictionary
    if d.input_shift is not None and not torch.equal(d.input_shift, d.decoder_bias):
        raise ValueError(f"dictionary {d.name!r} shifts its input by something other than its decoder's bias")
    weights = {
        "encoder": d.encoder,
        "encoder_bias": d.encoder_bias,
        "decoder": d.decoder,
        "decoder_bias": d.decoder_bias,
    }
    weights |= {} if d.threshold is None else {"threshold": d.threshold}
    configuration = {"hook_point": d.hook_point, "activation": d.activation, "k": d.k, "output_hook_point": d.output}
    configuration = {key: value for key, value in configuration.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in weights.items()}, folder / "dictionary.safetensors")
    shifted = {"subtract_decoder_bias": True} if d.input_shift is not None else {}
    (folder / "dictionary.json").write_text(json.dumps(configuration | shifted))
    return folder
