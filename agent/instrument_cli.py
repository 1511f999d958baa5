"""The commands that run the live model: steer, ablate, attribute, lens, compare, probe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from exegete.agent.findings import Findings
    from exegete.agent.live import Live

    OpenModel = Callable[[], Live]

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
Config = Annotated[Path | None, typer.Option("--config", help="TOML file that names subject and dictionary.")]
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


def open_model(
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> Live:
    """Load what the options that all these commands share name."""
    from exegete.agent.live import Wanted, open_live

    return open_live(Wanted(store, config, subject, dictionary, device, dtype.value if dtype else None, batch_tokens))


def on_live_model(command: Callable[..., Findings]) -> Callable[..., None]:
    """Register a command whose first argument loads the model, with the options that say which, and how to write."""

    @wraps(command)
    def run(*, format: Shown, **given: Any) -> None:
        wanted = {option.name: given.pop(option.name) for option in shared}
        typer.echo(command(lambda: open_model(**wanted), **given).render(format.value))

    shared = _options(open_model)
    written = inspect.Parameter("format", inspect.Parameter.KEYWORD_ONLY, default=Shown.table, annotation=Format)
    options = [*_options(command)[1:], written, *shared]
    # Typer reads the command line off the signature.
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    app.command()(run)
    return run


def _options(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function as keywords, their annotations resolved."""
    later = dict.fromkeys(("Findings", "Live", "OpenModel"), Any)  # Imported for type checkers alone.
    hints = get_type_hints(function, localns=later, include_extras=True)
    named = inspect.signature(function).parameters.values()
    return [one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]) for one in named]


@on_live_model
def steer(
    model: OpenModel,
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
) -> Findings:
    """Turn latents up while the model writes, at a fixed KL, beside random latents and directions at the same KL."""
    from exegete.agent.experiments import Request, steering

    read = _texts(prompts, prompt_file), _texts(None, texts)
    live = model()
    request = Request(read[0], latent or (), read[1], positions.value, tokens, temperature, controls, top, seed)
    return steering(live, request, kl=0.5 if kl is None and strength is None else kl, strength=strength)


@on_live_model
def ablate(
    model: OpenModel,
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
) -> Findings:
    """Take latents out and see what the model loses, beside random latents of the same firing rates."""
    from exegete.agent.experiments import Request, ablating

    read = _texts(prompts, prompt_file), _texts(None, texts)
    live = model()
    request = Request(read[0], latent or (), read[1], positions.value, tokens, temperature, controls, top, seed)
    return ablating(live, request, mode=mode, answer=answer, other=other)


@on_live_model
def attribute(
    model: OpenModel,
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
) -> Findings:
    """Say which latents hold a token up, by gradients, with the exact effect of ablating the leaders beside them."""
    from exegete.agent.attributing import attributing
    from exegete.agent.experiments import Request

    read = _texts(prompts, prompt_file)
    live = model()
    request = Request(read, top=top, seed=seed)
    return attributing(live, request, answer=answer, other=other, steps=steps, groups=groups)


@on_live_model
def lens(
    model: OpenModel,
    latents: Annotated[list[int], typer.Argument(help="Latents.")],
    prompt_file: PromptFile = None,
    kl: Annotated[float, typer.Option("--kl", help="Of the clamp on the prompts.")] = 0.5,
    top: Top = 10,
    seed: Seed = 0,
) -> Findings:
    """Show the tokens that a latent's direction promotes, and on --prompts what clamping it changes."""
    from exegete.agent.readings import looking

    read = _texts(None, prompt_file)
    live = model()
    return looking(live, latents, read, kl=kl, top=top, seed=seed)


@on_live_model
def compare(
    model: OpenModel,
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
) -> Findings:
    """Find the latents that differ between two sets of texts, with false discoveries controlled by permutation."""
    from exegete.agent.readings import comparing

    read = _texts(None, first), _texts(None, second)
    live = model()
    return comparing(
        live, *read, names=(str(first), str(second)), paired=paired, method=method, fdr=fdr, permutations=permutations,
        pooling=pooling, top=top, seed=seed,
    )  # fmt: skip


@on_live_model
def probe(
    model: OpenModel,
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
) -> Findings:
    """Say how well few latents tell two kinds of texts apart, always beside probes on the residual stream."""
    from exegete.agent.live import read_records
    from exegete.agent.readings import probing

    records = read_records(file)
    live = model()
    return probing(live, records, ks=k or (1, 5, 16), pooling=pooling, folds=folds, label_field=label_field, seed=seed)


def _texts(given: list[str] | None, file: Path | None) -> list[str]:
    from exegete.agent.live import read_texts

    return [*(given or []), *(read_texts(file) if file else [])]
