"""The commands that run the live model: steer, ablate, attribute, lens, compare, probe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from exegete.agent.findings import Findings
    from exegete.agent.live import Live

app = typer.Typer()
"""Its commands are registered with the main application."""


class Shown(StrEnum):
    """How findings are written."""

    table = "table"
    json = "json"


class Where(StrEnum):
    """Positions of an intervention."""

    last = "last"
    all = "all"


class Precision(StrEnum):
    """Number formats."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Store = Annotated[
    Path | None,
    typer.Option("--store", help="Store whose newest run names subject and dictionary, and whose labels are shown."),
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with [subject] and [dictionary].")]
Subject = Annotated[str | None, typer.Option("--subject", help="Hugging Face name or folder; with --dictionary.")]
Dictionary = Annotated[
    str | None, typer.Option("--dictionary", help="As in a configuration; `bundled:demo` by default.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Precision | None, typer.Option("--dtype", help="Precision of the subject.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", help="Padded tokens in one forward pass, at most.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Format = Annotated[Shown, typer.Option("--format", help="How findings are written.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts, taken as they are.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="More prompts: .txt, a line each, or .jsonl with `text`.")
]
Texts = Annotated[
    Path | None,
    typer.Option("--texts", help="Other texts, to match strengths and take firing rates, means and draws on."),
]
Latents = Annotated[list[int] | None, typer.Option("--latent", help="Latent; several times for several.")]
Tokens = Annotated[int, typer.Option("--tokens", help="To write for each prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the writing; 0 takes the most probable token.")]
Controls = Annotated[
    int, typer.Option("--controls", min=0, help="Random latents, and random directions, of each kind.")
]
Top = Annotated[int, typer.Option("--top", min=1, help="Rows to show.")]
Positions = Annotated[Where, typer.Option("--positions", help="From the prompt's last token on, or everywhere.")]


@app.command()
def steer(
    prompts: Prompts = None,
    latent: Latents = None,
    kl: Annotated[
        float | None, typer.Option("--kl", help="Mean KL from the clean run to reach; 0.5 unless --strength.")
    ] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="To add, in units of activation.")] = None,
    prompt_file: PromptFile = None,
    texts: Texts = None,
    positions: Positions = Where.last,
    tokens: Tokens = 16,
    temperature: Temperature = 0.0,
    controls: Controls = 3,
    top: Top = 8,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Turn latents up while the model writes, at a fixed KL, beside random latents and directions at the same KL."""
    from exegete.agent.experiments import Request, steering

    read = _texts(prompts, prompt_file), _texts(None, texts)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    request = Request(read[0], latent or (), read[1], positions.value, tokens, temperature, controls, top, seed)
    _say(steering(live, request, kl=0.5 if kl is None and strength is None else kl, strength=strength), format)


@app.command()
def ablate(
    prompts: Prompts = None,
    latent: Latents = None,
    mode: Annotated[str, typer.Option("--mode", help="zero; mean, or resample from --texts.")] = "zero",
    answer: Annotated[
        str | None, typer.Option("--answer", help="A token, with --other: their log-odds are shown.")
    ] = None,
    other: Annotated[str | None, typer.Option("--other", help="The token that it is held against.")] = None,
    prompt_file: PromptFile = None,
    texts: Texts = None,
    positions: Positions = Where.all,
    tokens: Tokens = 16,
    temperature: Temperature = 0.0,
    controls: Controls = 20,
    top: Top = 8,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Take latents out and see what the model loses, beside random latents of the same firing rates."""
    from exegete.agent.experiments import Request, ablating

    read = _texts(prompts, prompt_file), _texts(None, texts)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    request = Request(read[0], latent or (), read[1], positions.value, tokens, temperature, controls, top, seed)
    _say(ablating(live, request, mode=mode, answer=answer, other=other), format)


@app.command()
def attribute(
    answer: Annotated[str, typer.Option("--answer", help="The token whose log-probability is attributed.")],
    prompts: Prompts = None,
    other: Annotated[
        str | None, typer.Option("--other", help="Attribute the log-odds against this token instead.")
    ] = None,
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Of integrated gradients; 0 takes one gradient.")] = 0,
    groups: Annotated[
        int, typer.Option("--groups", min=1, help="Of latents, each with integrated gradients of its own.")
    ] = 1,
    top: Top = 10,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Say which latents hold a token up, by gradients, with the exact effect of ablating the leaders beside them."""
    from exegete.agent.experiments import Request, attributing

    read = _texts(prompts, prompt_file)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    request = Request(read, top=top, seed=seed)
    _say(attributing(live, request, answer=answer, other=other, steps=steps, groups=groups), format)


@app.command()
def lens(
    latents: Annotated[list[int], typer.Argument(help="Latents.")],
    prompt_file: PromptFile = None,
    kl: Annotated[float, typer.Option("--kl", help="Of the clamp on the prompts.")] = 0.5,
    top: Top = 10,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Show the tokens that a latent's direction promotes, and on --prompts what clamping it changes."""
    from exegete.agent.readings import looking

    read = _texts(None, prompt_file)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    _say(looking(live, latents, read, kl=kl, top=top, seed=seed), format)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Texts: .txt, a line each, or .jsonl with `text`.")],
    second: Annotated[Path, typer.Argument(help="The texts that they are held against.")],
    paired: Annotated[bool, typer.Option("--paired", help="Line by line the same texts, but for a change.")] = False,
    method: Annotated[str, typer.Option("--method", help="maxt (family-wise) or bh (false discovery rate).")] = "maxt",
    fdr: Annotated[float, typer.Option("--fdr", help="False discovery rate.")] = 0.05,
    permutations: Annotated[
        int | None, typer.Option("--permutations", help="Arrangements; as many as needed if left out.")
    ] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="Over a text's tokens: max or mean.")] = "max",
    top: Top = 20,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Find the latents that differ between two sets of texts, with false discoveries controlled by permutation."""
    from exegete.agent.readings import comparing

    read = _texts(None, first), _texts(None, second)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    found = comparing(
        live, *read, names=(str(first), str(second)), paired=paired, method=method, fdr=fdr, permutations=permutations,
        pooling=pooling, top=top, seed=seed,
    )  # fmt: skip
    _say(found, format)


@app.command()
def probe(
    file: Annotated[
        Path, typer.Argument(help='JSON lines: {"text": …, "label": 0 or 1}, and "group" where texts belong together.')
    ],
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Latents that a probe may use, for example --k 1 --k 5.")
    ] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="Over a text's tokens: max or mean.")] = "max",
    folds: Annotated[int, typer.Option("--folds", min=2, help="Of the cross-validation.")] = 5,
    label_field: Annotated[str, typer.Option("--label", help="Field of the label.")] = "label",
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Say how well few latents tell two kinds of texts apart, always beside probes on the residual stream."""
    from exegete.agent.live import read_records
    from exegete.agent.readings import probing

    records = read_records(file)
    live = _live(store, config, subject, dictionary, device, dtype, batch_tokens)
    _say(
        probing(live, records, ks=k or (1, 5, 16), pooling=pooling, folds=folds, label_field=label_field, seed=seed),
        format,
    )


def _texts(given: list[str] | None, file: Path | None) -> list[str]:
    from exegete.agent.live import read_texts

    return [*(given or []), *(read_texts(file) if file else [])]


def _live(
    store: Path | None,
    config: Path | None,
    subject: str | None,
    dictionary: str | None,
    device: str | None,
    dtype: Precision | None,
    batch_tokens: int,
) -> Live:
    from exegete.agent.live import Wanted, open_live

    return open_live(Wanted(store, config, subject, dictionary, device, dtype.value if dtype else None, batch_tokens))


def _say(findings: Findings, format: Any) -> None:
    typer.echo(findings.render(format.value))
