"""The subject: hook points, stopping early, pieces of every kind of tokenizer, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest
from exegete.tools.subject import Subject, load_subject, subject_from_model
from exegete.tools.tokenizers import token_pieces

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/hf"


@pytest.fixture(scope="module")
def stories() -> Subject:
    if not STORIES.exists():
        pytest.skip("../shared/data/models/stories260K is absent")
    return load_subject(str(STORIES))


def words_tokenizer(*words: str, **special: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=special.get("unk_token")))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def gpt2(tokenizer: Any, seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()


@pytest.fixture(scope="module")
def words() -> Any:
    return words_tokenizer(*(f"w{i}" for i in range(40)), unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_the_residual_is_the_hidden_state_of_transformers(words: Any, point: str) -> None:
    model = gpt2(words)
    tokens = torch.randint(0, 40, (3, 20))
    with torch.inference_mode():
        expected = model(tokens, output_hidden_states=True)
    subject = subject_from_model(model, words, "tiny")
    layer = {"blocks.1.hook_resid_post": 2, "blocks.1.hook_resid_pre": 1}.get(point)
    if layer is None:  # transformers gives the last layer's only after the final norm
        normed = subject.bridge.original_model.transformer.ln_f(subject.residual(tokens, point))
        torch.testing.assert_close(normed, expected.hidden_states[3], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(subject.residual(tokens, point), expected.hidden_states[layer], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subject.logits(tokens), expected.logits, atol=1e-5, rtol=1e-5)


def test_it_runs_only_to_the_hook_point_and_leaves_no_hook_behind(words: Any) -> None:
    subject = subject_from_model(gpt2(words), words, "tiny")
    assert subject.hook_points  # found by one run of the whole model, once
    ran: list[int] = []
    for layer in range(3):
        module = subject.bridge.original_model.transformer.h[layer]
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    tokens = torch.zeros((1, 4), dtype=torch.long)
    subject.residual(tokens, "blocks.1.hook_resid_pre")
    assert ran == [0]
    ran.clear()
    subject.logits(tokens)
    assert ran == [0, 1, 2]


def test_every_hook_point_has_the_width_it_claims(words: Any) -> None:
    subject = subject_from_model(gpt2(words), words, "tiny")
    tokens = torch.zeros((2, 5), dtype=torch.long)
    assert subject.width("blocks.1.attn.hook_z") == 32  # the four heads concatenated
    assert subject.width("blocks.1.mlp.hook_post") == 128
    for point, width in subject.hook_points.items():
        assert subject.residual(tokens, point).shape == (2, 5, width), point
        assert subject.residual(tokens, point).is_inference()


def test_centred_weights_leave_the_predictions_and_centre_the_residual(words: Any) -> None:
    tokens = torch.randint(0, 40, (2, 10))
    plain = subject_from_model(gpt2(words), words, "tiny")
    centred = subject_from_model(gpt2(words), words, "tiny", processing=["center_writing_weights"])
    residual = centred.residual(tokens, "blocks.1.hook_resid_post")
    assert residual.mean(-1).abs().max() < 1e-5
    expected = plain.residual(tokens, "blocks.1.hook_resid_post")
    torch.testing.assert_close(residual, expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(centred.logits(tokens), plain.logits(tokens), atol=1e-4, rtol=1e-4)
    assert centred.fingerprint != plain.fingerprint and centred.processing == ("center_writing_weights",)


def test_the_fingerprint_follows_the_weights(words: Any) -> None:
    one, same, other = (subject_from_model(gpt2(words, seed), words, "tiny").fingerprint for seed in (0, 0, 1))
    assert one == same != other


def test_special_tokens_are_no_words(words: Any) -> None:
    subject = subject_from_model(gpt2(words), words, "tiny")
    assert subject.bos == 1 and subject.special_tokens == {1}  # and not the unknown word
    assert subject.encode(["w1 w2", "w39"]) == [[3, 4], [41]]
    assert subject.encode([]) == []


def test_pieces_of_whole_words_are_separated(words: Any) -> None:
    pieces = token_pieces(words, 44)
    assert "".join(pieces[i] for i in (2, 3)) == " w0 w1"
    assert pieces[:2] == ["<unk>", "<s>"] and pieces[42:] == ["<|42|>", "<|43|>"]


@pytest.mark.parametrize("text", ["The cat’s 3 naïve\n\n  cafés cost €2.", " 日本 <0x0A> ▁"])
def test_pieces_of_byte_level_tokens_join_into_the_text(text: str) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model.train_from_iterator([text] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")
    pieces = token_pieces(tokenizer)
    assert "".join(pieces[i] for i in tokenizer(text)["input_ids"]) == text
    half = tokenizer.convert_tokens_to_ids("Ã")  # 0xC3, the first byte of "é"
    assert pieces[half] == "<0xC3>" and pieces[0] == "<|endoftext|>"


def test_pieces_of_sentencepiece_tokens_join_into_the_text(stories: Subject) -> None:
    text = "Once upon a time, there was\n\na €uro."
    tokens = stories.encode([text])[0]
    joined = "".join(stories.pieces[token] for token in tokens)
    assert joined == " " + text.replace("€", "<0xE2><0x82><0xAC>") or joined == " " + text
    assert stories.pieces[13] == "\n" and stories.pieces[1] == "<s>"
    assert stories.pieces[0xE2 + 3] == "<0xE2>"


def test_a_folder_is_identified_by_its_content(stories: Subject, tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "copy")
    assert load_subject(str(tmp_path / "copy")).fingerprint == stories.fingerprint
    assert stories.revision is None and stories.bos == 1 and stories.max_context == 512


def test_damaged_weights_are_refused(tmp_path: Path, stories: Subject) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(STORIES, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name][0, 0] = float("nan")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite"):
        load_subject(str(folder))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_subject(str(folder))


def test_a_hub_model_is_identified_by_name_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not STORIES.exists():
        pytest.skip("../shared/data/models/stories260K is absent")
    cached, commit = tmp_path / "models--someone--stories", "a" * 40
    shutil.copytree(STORIES, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    subject = load_subject("someone/stories")
    assert subject.revision == commit
    assert subject.fingerprint == digest("hub", "someone/stories", commit)
    (cached / "snapshots" / commit / "model.safetensors").rename(cached / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors on the hub"):
        load_subject("someone/stories")


def test_encoders_are_refused(words: Any) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), **shape)).eval()
    with pytest.raises(UserError, match="'bert' is not causal"):
        subject_from_model(model, words, "bert")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "/nowhere/model"}, "no model folder '/nowhere/model'"),
        ({"name_or_path": "./nowhere"}, "no model folder './nowhere'"),
        ({"name_or_path": "x", "device": "gpuu"}, "no device is named 'gpuu'"),
        ({"name_or_path": "x", "dtype": "float12"}, "dtype 'float12'"),
        ({"name_or_path": "x", "processing": ["fold_nl"]}, "Did you mean 'fold_ln'"),
    ],
)
def test_bad_arguments_are_quoted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_subject(**arguments)


def test_a_hub_model_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load model 'nobody/no-such-model'") as caught:
        load_subject("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_unknown_hook_point_names_the_nearest(words: Any) -> None:
    subject = subject_from_model(gpt2(words), words, "tiny")
    with pytest.raises(UserError, match=r"'blocks.1.hook_resid_pots'.*3 layers.*mean 'blocks.1.hook_resid_post'"):
        subject.width("blocks.1.hook_resid_pots")
    with pytest.raises(UserError, match="no hook point"):
        subject.residual(torch.zeros((1, 4), dtype=torch.long), "blocks.7.hook_resid_post")


@pytest.mark.parametrize("point", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_the_fused_way_is_taken_and_equals_the_bridge(words: Any, point: str) -> None:
    subject = subject_from_model(gpt2(words), words, "tiny")
    tokens = torch.arange(40).reshape(2, 20) % 40
    assert subject._fused is not None and subject._fused.fits(point, subject._probe)
    assert (subject.residual(tokens, point) - subject._through_bridge(tokens, point)).abs().max() < 1e-4


def test_a_loaded_model_takes_the_fused_way(stories: Subject) -> None:
    assert stories._fused is not None and stories._fused.fits("blocks.2.hook_resid_post", stories._probe)
    assert not stories._fused.fits("blocks.2.mlp.hook_out", stories._probe)
