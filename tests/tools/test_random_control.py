from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.dictionaries import PlainDictionary, opaque_dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.errors import UserError
from exegete.tools.random_control import (
    Calibration,
    calibrate,
    random_control,
    require_plain,
    stored_calibration,
    unit_rows,
    write_plain,
)
from exegete.tools.subject import Subject, load_subject

WIDTH, LATENTS = 4, 6
VECTORS = torch.tensor([[9.0, 9, 9, 9], [1, 0, 0, 0], [2, 5, 0, -1], [3, 1, 0, -7]])
"""Of the tokens 0 (which is special), 1, 2 and 3."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(str(subject_path()))


@pytest.fixture(scope="module")
def bundled(subject: Subject) -> PlainDictionary:
    return require_plain(load_dictionary(str(dictionary_path("tests")), subject))


class Reader:
    """A subject whose vector of a token depends on the token alone."""

    device, dtype, fingerprint, tokenizer_digest = "cpu", "float32", "sha256:toy", "sha256:tokenizer"

    def residual(self, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
        assert hook_point == "here"
        return VECTORS[tokens]


class Corpus:
    """Two contexts of three tokens; the special token 0 counts for nothing."""

    contexts, fingerprint = 2, "sha256:corpus"

    def __init__(self, rows: Any = ((0, 1, 2), (3, 1, 0))) -> None:
        self.rows = np.array(rows, dtype=np.int32)

    def tokens(self, start: int, stop: int) -> Any:
        return self.rows[start:stop]

    def mask(self, start: int, stop: int) -> Any:
        return self.rows[start:stop] != 0


def plain(**changes: Any) -> PlainDictionary:
    encoder = torch.zeros(WIDTH, LATENTS)
    encoder[0, :3] = 1.0  # Three latents fire wherever the first coordinate is above 1.5 …
    options: dict[str, Any] = {
        "name": "toy",
        "fingerprint": "sha256:toy-dictionary",
        "hook_point": "here",
        "encoder": encoder,
        "encoder_bias": torch.full((LATENTS,), -1.5),
        "decoder": torch.eye(LATENTS, WIDTH),
        "decoder_bias": torch.ones(WIDTH),
        "activation": "relu",
    }
    return PlainDictionary(**(options | changes))


def test_the_centre_is_the_median_of_what_counts_and_k_the_mean_activity() -> None:
    """Of 1, 2, 3, 1 the lower middle is 1 in the first coordinate; six firings on four tokens are 1.5, which rounds to 2."""
    found = calibrate(plain(), Reader(), Corpus(), seed=0)  # type: ignore[arg-type]
    assert found == Calibration(centre=(1.0, 0.0, 0.0, -1.0), k=2)


def test_a_dictionary_that_never_fires_has_nothing_to_control() -> None:
    silent = plain(encoder_bias=torch.full((LATENTS,), -99.0))
    with pytest.raises(UserError, match="'toy' fires on no token"):
        calibrate(silent, Reader(), Corpus(), seed=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'toy' fires on no token"):
        calibrate(plain(), Reader(), Corpus(((0, 0, 0), (0, 0, 0))), seed=0)  # type: ignore[arg-type]


def test_a_calibration_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stored_calibration(tmp_path / "controls", plain(), Reader(), Corpus(), seed=0)  # type: ignore[arg-type]
    monkeypatch.setattr(Reader, "residual", lambda *_: pytest.fail("read again"))
    assert stored_calibration(tmp_path / "controls", plain(), Reader(), Corpus(), seed=0) == made  # type: ignore[arg-type]
    [file] = (tmp_path / "controls").iterdir()
    file.write_text(file.read_text()[:9])
    with pytest.raises(UserError, match=r"is damaged.*remove it"):
        stored_calibration(tmp_path / "controls", plain(), Reader(), Corpus(), seed=0)  # type: ignore[arg-type]


def test_a_control_is_as_the_dictionary_but_for_its_directions(bundled: PlainDictionary, subject: Subject) -> None:
    calibration = Calibration(tuple(float(i) for i in range(bundled.width)), 16)
    control = random_control(bundled, subject, calibration, seed=0)
    assert (control.latents, control.width, control.k) == (bundled.latents, bundled.width, 16)
    assert (control.hook_point, control.hook_point_out) == (bundled.hook_point, bundled.hook_point_out)
    assert control.name == f"random control of {bundled.name}"
    assert torch.allclose(control.decoder.norm(dim=1), torch.ones(control.latents))
    assert torch.equal(control.encoder, control.decoder.T) and not control.encoder_bias.any()
    assert control.input_shift is not None and torch.equal(control.input_shift, control.decoder_bias)
    x = torch.randn(50, bundled.width)
    assert torch.equal(control.encode(x + control.input_shift).count_nonzero(-1), torch.full((50,), 16))
    # Random directions in 128 dimensions: cosines of mean 0 and standard deviation 1/√128.
    cosines = (control.decoder @ control.decoder.T)[~torch.eye(control.latents, dtype=torch.bool)]
    assert abs(float(cosines.mean())) < 0.001 and float(cosines.std()) == pytest.approx(128**-0.5, rel=0.02)


def test_each_dictionary_and_seed_has_directions_of_its_own(bundled: PlainDictionary, subject: Subject) -> None:
    calibration = Calibration((0.0,) * bundled.width, 16)
    one, same = (random_control(bundled, subject, calibration, seed=0) for _ in range(2))
    other_seed = random_control(bundled, subject, calibration, seed=1)
    other_dictionary = random_control(require_plain(one), subject, calibration, seed=0)
    other_k = random_control(bundled, subject, Calibration(calibration.centre, 8), seed=0)
    assert one.fingerprint == same.fingerprint and torch.equal(one.decoder, same.decoder)
    assert len({one.fingerprint, bundled.fingerprint, other_k.fingerprint, other_seed.fingerprint}) == 4
    assert not torch.isclose(one.decoder, other_seed.decoder).all(dim=1).any()
    assert not torch.isclose(one.decoder, other_dictionary.decoder).all(dim=1).any()


def test_a_transcoder_gets_directions_of_both_widths() -> None:
    wider = plain(decoder=torch.ones(LATENTS, 7), decoder_bias=torch.ones(7), output="there")
    control = random_control(wider, Reader(), Calibration((1.0,) * WIDTH, 2), seed=0)  # type: ignore[arg-type]
    assert (control.encoder.shape, control.decoder.shape) == ((WIDTH, LATENTS), (LATENTS, 7))
    assert control.hook_point_out == "there" and not control.decoder_bias.any()
    assert torch.equal(control.input_shift, torch.ones(WIDTH))  # type: ignore[arg-type]


def test_what_is_no_plain_matrices_has_no_control(subject: Subject) -> None:
    coder = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)
    opaque = opaque_dictionary(
        coder, subject, name="own", hook_point="blocks.1.hook_resid_post", latents=128, identity="1"
    )
    with pytest.raises(
        UserError, match=r"'own' has no random-weight control.*TopK, ReLU or JumpReLU.*random_control = 0"
    ):
        require_plain(opaque)


def test_what_is_written_is_read_again(bundled: PlainDictionary, subject: Subject, tmp_path: Path) -> None:
    control = random_control(bundled, subject, Calibration((0.5,) * bundled.width, 16), seed=0)
    read = require_plain(load_dictionary(str(write_plain(tmp_path / "control", control)), subject))
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "input_shift"):
        assert torch.equal(getattr(read, name), getattr(control, name)), name
    assert (read.activation, read.k, read.hook_point) == ("topk", 16, control.hook_point)
    assert json.loads((tmp_path / "control" / "dictionary.json").read_text())["subtract_decoder_bias"] is True
    with pytest.raises(ValueError, match="shifts its input"):
        write_plain(tmp_path / "no", plain(input_shift=torch.zeros(WIDTH)))


def test_unit_rows_depend_on_their_names_alone() -> None:
    assert torch.equal(unit_rows(3, 5, 1, "a"), unit_rows(3, 5, 1, "a"))
    assert not torch.equal(unit_rows(3, 5, 1, "a"), unit_rows(3, 5, 1, "b"))
    many = unit_rows(2_500, 5, 1, "a")  # drawn in three pieces
    assert torch.equal(many[:3], unit_rows(3, 5, 1, "a")) and not torch.equal(many[:1_024], many[1_024:2_048])
    assert torch.allclose(many.norm(dim=1), torch.ones(2_500))
