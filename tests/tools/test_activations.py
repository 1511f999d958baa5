from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.tools.activations import run_pass
from exegete.tools.dictionaries import OpaqueDictionary, PlainDictionary
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.merging import merge
from exegete.tools.pass_settings import EvidenceCounts, PassSettings
from exegete.tools.selecting import uncertified
from exegete.tools.windows import SPLITS

WIDTH, LATENTS, VOCABULARY = 16, 48, 40
COUNTS = EvidenceCounts(
    firing=(20, 10, 20), top=(5, 3, 3), random=(15, 10, 20), hard=(8, 6, 8), minimum_firing=5, minimum_non_firing=5
)


class FakeSubject:
    """Each token's vector, with a share of the token's before it."""

    name, fingerprint, device, dtype, bos = "fake", "sha256:subject", "cpu", "float32", 0
    pieces = [f" t{i}" for i in range(VOCABULARY)]  # noqa: RUF012
    runs = 0

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))

    def width(self, hook_point: str) -> int:
        return WIDTH

    def residual(self, tokens: Tensor, hook_point: str) -> Tensor:
        self.runs += 1
        vectors = self.table[tokens]
        before = torch.nn.functional.pad(vectors, (0, 0, 1, 0))[:, :-1]
        return vectors + 0.5 * before


@dataclass(frozen=True)
class FakeCorpus:
    """A ragged corpus: the last context is mostly padding, some windows recur, token 0 never counts."""

    contexts: int = 103
    context_tokens: int = 64
    fingerprint: str = "sha256:corpus"
    counts: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        # Zipfian tokens: the last of the vocabulary are rare.
        u = np.random.Generator(np.random.PCG64(5)).random((self.contexts, self.context_tokens))
        return (VOCABULARY * u**3).astype(np.int32)[start:stop]

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        mask = self.tokens(0, self.contexts) > 0
        mask[-1, 5:] = False
        return mask[start:stop]

    def split_of(self, contexts: NDArray[np.int64]) -> NDArray[np.uint8]:
        return (contexts % 3).astype(np.uint8)

    def document_of(self, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(positions < 40, contexts, contexts + 1000)

    def usable(self, start: int, stop: int) -> NDArray[np.bool_]:
        usable = np.ones((self.contexts, 2), bool)
        usable[7, 1] = usable[-1, 1] = False
        return usable[start:stop]


def plain(activation: str = "topk", **changes: Any) -> PlainDictionary:
    noise = torch.Generator().manual_seed(2)
    encoder = torch.randn(WIDTH, LATENTS, generator=noise)
    bias = torch.full((LATENTS,), -1.0)
    encoder[:, 3], bias[3] = 0, -50  # never fires
    encoder[:, 4], bias[4] = 0, 50  # always fires
    given = {"k": 6} if activation == "topk" else {"threshold": torch.full((LATENTS,), 2.0)}
    options: dict[str, Any] = {
        "name": "plain",
        "fingerprint": "sha256:dictionary",
        "hook_point": "h",
        "encoder": encoder,
        "encoder_bias": bias,
        "decoder": encoder.T.contiguous(),
        "decoder_bias": torch.zeros(WIDTH),
        "activation": activation,
        **(given if activation != "relu" else {}),
    }
    return PlainDictionary(**(options | changes))


def settings(**changes: Any) -> PassSettings:
    options: dict[str, Any] = {"counts": COUNTS, "micro_batch": 4, "pool_floor": 12, "pool_share": 0.2}
    return PassSettings(**(options | changes))


def evidence_of(
    folder: Path, chosen: PassSettings, dictionary: Any = None, subject: Any = None, corpus: Any = None
) -> Evidence:
    subject, corpus = subject or FakeSubject(), corpus or FakeCorpus()
    dictionary = dictionary or plain()
    assert run_pass(subject, dictionary, corpus, folder / "pass", chosen)
    return merge(folder / "pass", folder / "evidence", subject, dictionary, corpus, chosen)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def verified_micro_batches(folder: Path) -> int:
    """How many micro-batches the second pass ran: all, with so small a corpus, that held a candidate."""
    calls: list[int] = []
    (folder / "verified.parquet").unlink()
    run_pass(  # type: ignore[call-overload,unused-ignore]
        FakeSubject(),  # type: ignore[arg-type]
        plain(),
        FakeCorpus(),  # type: ignore[arg-type]
        folder,
        settings(slices=5),
        progress=lambda stage, done, total: calls.append(total if stage == "verification" else 0),
    )
    return max(calls)


def dense_truth(dictionary: Any) -> NDArray[np.float32]:
    """The code of the whole corpus, shape (window, position, latent), zero where nothing counts."""
    corpus, subject = FakeCorpus(), FakeSubject()
    x = subject.residual(torch.from_numpy(corpus.tokens(0, 103).astype(np.int64)), "h")
    code = dictionary.encode(x).clamp(min=0).numpy()
    counts = corpus.mask(0, 103) & np.repeat(corpus.usable(0, 103), 32, axis=1)
    truth: NDArray[np.float32] = (code * counts[..., None]).reshape(206, 32, LATENTS)
    return truth


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_statistics_and_windows_are_those_of_the_dense_code(tmp_path: Path, activation: str) -> None:
    dictionary = plain(activation)
    evidence = evidence_of(tmp_path, settings(slices=3), dictionary)
    truth = dense_truth(dictionary)
    for found in evidence.read(range(LATENTS), "score"):
        own = truth[:, :, found.latent]
        assert found.statistics["firing_tokens"] == (own > 0).sum()
        assert found.statistics["firing_windows"] == (own > 0).any(axis=1).sum()
        if (own > 0).any():
            assert found.statistics["mean"] == pytest.approx(own[own > 0].mean(), rel=1e-5)
            assert found.statistics["standard_deviation"] == pytest.approx(own[own > 0].std(), rel=1e-3, abs=1e-4)
        for window in found.windows:
            assert window.activations is not None
            np.testing.assert_allclose(window.activations, own[window.id], rtol=1e-4, atol=1e-5)
            assert window.fires == (own[window.id] > 0).any()
            assert SPLITS.index(window.split) == window.id // 2 % 3
            assert window.document == str(window.id // 2 + (1000 if window.id % 2 else 0))


def test_the_top_windows_are_the_highest(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, settings())
    truth = dense_truth(plain())
    for found in evidence.read(range(LATENTS), "score"):
        for number, split in enumerate(SPLITS):
            peaks = truth[:, :, found.latent].max(axis=1)[np.arange(206) // 2 % 3 == number]
            expected = np.sort(peaks[peaks > 0])[::-1][: COUNTS.top[number]]
            shown = sorted((w.peak or 0 for w in found.select(split, kind="firing") if w.top), reverse=True)
            np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_the_sample_is_full_spread_over_strata_and_any_prefix_is(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, settings())
    full = 0
    for found in evidence.read(range(LATENTS), "score"):
        sampled = [w for w in found.select("test", kind="firing") if w.stratum is not None]
        if len(sampled) < 20:
            continue
        full += 1
        assert sorted(w.stratum for w in sampled if w.stratum is not None) == [i // 2 for i in range(20)]
        assert {w.stratum for w in sampled[:10]} == set(range(10))
        low, high = ([w.peak or 0 for w in sampled if w.stratum == s] for s in (0, 9))
        assert max(low) <= min(high)
    assert full > 20


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_slices_and_batches_change_no_byte(tmp_path: Path, activation: str) -> None:
    found = []
    for slices, batch in ((1, 4), (2, 12), (5, 16), (1, 16), (5, 4)):
        folder = tmp_path / f"{slices}-{batch}"
        evidence_of(folder, settings(slices=slices, batch=batch), plain(activation))
        found.append(digests(folder / "evidence"))
    assert all(digest == found[0] for digest in found)


def test_a_sample_without_certificate_is_drawn_again_exactly(tmp_path: Path) -> None:
    generous = evidence_of(tmp_path / "a", settings(emission_factor=50.0))
    starved = evidence_of(tmp_path / "b", settings(emission_factor=0.2, slices=3))
    assert len(uncertified(tmp_path / "a" / "pass")) == 0
    assert len(uncertified(tmp_path / "b" / "pass")) > 10
    left, right = digests(generous.folder), digests(starved.folder)
    del left["evidence.json"], right["evidence.json"]
    assert left == right


def test_negatives_hold_top_tokens_or_neighbours_and_are_not_repeated(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, settings())
    truth = dense_truth(plain()).max(axis=1) > 0
    neighbours = pq.read_table(tmp_path / "evidence" / "neighbours.parquet").to_pydict()
    near: dict[int, set[int]] = {}
    for latent, rank, neighbour in zip(neighbours["latent"], neighbours["rank"], neighbours["neighbour"], strict=True):
        near.setdefault(latent, set()).update([neighbour] if rank < 4 else [])
    tops = np.load(tmp_path / "pass" / "top_tokens.npy")
    seen = 0
    for found in evidence.read(range(LATENTS), "score"):
        for split in SPLITS:
            silent = [w.id for w in found.select(split) if w.kind != "firing"]
            assert len(set(silent)) == len(silent)
        for window in found.select(*SPLITS, kind="hard"):
            seen += 1
            with_token = {f" t{t}" for t in tops[found.latent]} & set(window.tokens)
            assert with_token or any(truth[window.id, n] for n in near[found.latent])
    assert seen > 300


def test_status_says_dead_and_dense(tmp_path: Path) -> None:
    sparse = plain("jumprelu", threshold=torch.full((LATENTS,), 8.0))
    statuses = evidence_of(tmp_path, settings(), sparse).statuses
    assert statuses[3] == "dead"
    assert statuses[4] == "dense"
    assert sum(status == "live" for status in statuses.values()) > 20


def test_an_opaque_signed_dictionary_counts_only_what_is_above_zero(tmp_path: Path) -> None:
    inner = plain("relu")
    opaque = OpaqueDictionary(
        "opaque", "sha256:opaque", "h", WIDTH, LATENTS, "cpu", "float32", inner.preactivations, lambda z, given: z
    )
    evidence = evidence_of(tmp_path, settings(), opaque)
    truth = dense_truth(inner)
    for found in evidence.read(range(LATENTS), "score"):
        assert found.statistics["firing_tokens"] == (truth[:, :, found.latent] > 0).sum()
    assert evidence.provenance["neighbours"] == "cofiring"


def test_topk_ties_go_to_the_lower_latent(tmp_path: Path) -> None:
    dictionary = plain(encoder=torch.zeros(WIDTH, LATENTS), encoder_bias=torch.ones(LATENTS), k=5)
    statuses = evidence_of(tmp_path, settings(), dictionary).statuses
    assert [latent for latent, status in statuses.items() if status != "dead"] == [0, 1, 2, 3, 4]


def test_a_stopped_pass_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed = evidence_of(tmp_path / "a", settings(slices=5))
    subject = FakeSubject()
    stops = iter([False] * 13 + [True])
    arguments = (subject, plain(), FakeCorpus(), tmp_path / "b" / "pass", settings(slices=5))
    assert run_pass(*arguments, stop=lambda: next(stops)) is False  # type: ignore[arg-type]
    assert subject.runs == 14
    again = evidence_of(tmp_path / "b", settings(slices=5), subject=subject)
    undisturbed_runs = 26 + verified_micro_batches(tmp_path / "b" / "pass")
    # 10 of the 14 were of finished slices.
    assert subject.runs == 4 + undisturbed_runs
    assert digests(undisturbed.folder) == digests(again.folder)


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    evidence_of(tmp_path, settings(slices=2))
    part = tmp_path / "pass" / "slice-00001-of-00002"
    (part / "events.parquet").write_bytes((part / "events.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"slice-00001-of-00002' is damaged .*remove it"):
        evidence_of(tmp_path, settings(slices=2))


def test_a_truncated_selection_is_named(tmp_path: Path) -> None:
    arguments = (FakeSubject(), plain(), FakeCorpus(), tmp_path / "pass", settings())
    assert run_pass(*arguments)  # type: ignore[arg-type]
    path = tmp_path / "pass" / "selected.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"selected.parquet' is damaged"):
        merge(tmp_path / "pass", tmp_path / "evidence", *arguments[:3], settings())  # type: ignore[arg-type]
    assert not (tmp_path / "evidence").exists()


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exegete.tools.activations.save_statistics", full)
    with pytest.raises(UserError, match="No space left on device"):
        run_pass(FakeSubject(), plain(), FakeCorpus(), tmp_path / "pass", settings())  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "pass").iterdir()] == ["manifest.json"]
    monkeypatch.undo()
    evidence_of(tmp_path, settings())


def test_a_killed_pass_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = evidence_of(tmp_path / "a", settings(slices=4))
    for runs in (1, 9, 20, 27, 30):
        folder = tmp_path / f"killed-{runs}"
        child = os.fork()
        if not child:
            _die_after(runs, folder)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert digests(evidence_of(folder, settings(slices=4)).folder) == digests(undisturbed.folder)


def _die_after(runs: int, folder: Path) -> None:
    """SIGKILL this process in its pass's forward pass number `runs`."""

    class Dying(FakeSubject):
        def residual(self, tokens: Tensor, hook_point: str) -> Tensor:
            if self.runs == runs:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().residual(tokens, hook_point)

    evidence_of(folder, settings(slices=4), subject=Dying())


def test_a_flipped_bit_in_a_part_is_noticed(tmp_path: Path) -> None:
    arguments = (FakeSubject(), plain(), FakeCorpus(), tmp_path / "pass", settings(slices=1))
    assert run_pass(*arguments)  # type: ignore[arg-type]
    path = tmp_path / "pass" / "slice-00000-of-00001" / "pool.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        merge(tmp_path / "pass", tmp_path / "evidence", *arguments[:3], settings(slices=1))  # type: ignore[arg-type]


def test_parts_of_another_dictionary_are_refused(tmp_path: Path) -> None:
    evidence_of(tmp_path, settings())
    with pytest.raises(UserError, match="dictionary was 'sha256:dictionary', now 'sha256:other'"):
        evidence_of(tmp_path, settings(), plain(fingerprint="sha256:other"))


def test_a_dictionary_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = plain(encoder=torch.zeros(WIDTH + 1, LATENTS))
    with pytest.raises(UserError, match="takes vectors of 17, but 'fake' gives 16"):
        run_pass(FakeSubject(), wide, FakeCorpus(), tmp_path / "pass", settings())  # type: ignore[arg-type]


def test_an_unfinished_pass_is_not_merged(tmp_path: Path) -> None:
    arguments = (FakeSubject(), plain(), FakeCorpus(), tmp_path / "pass", settings(slices=2))
    assert not run_pass(*arguments, stop=lambda: True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unfinished"):
        merge(tmp_path / "pass", tmp_path / "evidence", *arguments[:3], settings(slices=2))  # type: ignore[arg-type]


def test_a_batch_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UserError, match="batch 6 is not a multiple of the micro-batch of 4"):
        settings(batch=6).shape("cpu")


def test_provenance_names_what_the_evidence_is_from(tmp_path: Path) -> None:
    evidence_of(tmp_path, settings(seed=3))
    stored = json.loads((tmp_path / "evidence" / "evidence.json").read_text())
    assert stored["dictionary"] == "sha256:dictionary" and stored["source"] == "pass" and stored["seed"] == 3
    assert stored["settings"]["micro_batch"] == 4 and stored["device"] == "cpu"
