"""The configuration of a labeling run: one TOML file, every field documented where it stands."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from exegete.agent.rungs import out_of_place, top_writer
from exegete.tools.errors import UserError, nearest

if TYPE_CHECKING:
    from exegete.tools.llm import BatchLimits, Limits
    from exegete.tools.pass_settings import PassSettings


class Section(BaseModel):
    """A table of the configuration: no unknown keys, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SubjectConfig(Section):
    """The language model under study."""

    name: str
    """Hugging Face name or local folder of a causal language model; `bundled` is the subject that ships with Exegete."""
    revision: str | None = None
    """Commit or tag on the hub; the newest where it is left out."""
    device: str = "cpu"
    """Torch device: `cpu`, `cuda`, `cuda:1`, `mps`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of weights and activations."""
    processing: tuple[str, ...] = ()
    """Weight processing that the dictionary was trained on: `fold_ln`, `center_writing_weights`, `center_unembed`, `fold_value_biases`."""


class DictionaryConfig(Section):
    """The sparse dictionary whose latents are labeled."""

    path: str
    """SAELens `release/id` or folder, sparsify folder, safetensors + JSON folder; `bundled:demo` and `bundled:tests` ship with Exegete."""


class CorpusConfig(Section):
    """The text that the subject reads."""

    source: str
    """`.txt`, `.json`, `.jsonl` (also `.gz`, `.zst`), `.parquet`, or `hf:NAME[:SPLIT]`; `bundled` generates requests from the grammar."""
    text_field: str = "text"
    """The field of a record that holds its text."""
    documents: int | None = Field(default=None, gt=0)
    """Read at most this many documents; all where it is left out."""
    tokens: int | None = Field(default=None, gt=0)
    """Stop after this many tokens; never where it is left out."""


class EvidenceConfig(Section):
    """What the activation pass keeps for each latent (PROTOCOLS §1). Triples are for the splits explain, refine, test."""

    firing: tuple[int, int, int] = (40, 40, 100)
    """Firing windows, spread evenly over ten quantiles of the peak."""
    top: tuple[int, int, int] = (20, 10, 10)
    """Windows of highest peak."""
    random: tuple[int, int, int] = (40, 40, 100)
    """Random windows on which the latent does not fire."""
    hard: tuple[int, int, int] = (16, 16, 16)
    """Non-firing windows with the latent's top tokens, or on which its nearest latents fire."""
    slices: int | None = Field(default=None, ge=1)
    """Pieces of the corpus; a restart redoes at most one. One per million tokens where it is left out. Does not change the result."""
    batch: int | None = Field(default=None, ge=1)
    """Contexts read at a time, a multiple of 4 (of 32 on a GPU). Does not change the result."""
    workers: str | None = None
    """Who does the slices: `ray`, `ray:2` (so many local workers) or `ray://HOST:PORT`, a worker for each GPU; this process where
    it is left out. The store must be on storage that all share. Does not change the result."""

    def settings(self, seed: int) -> PassSettings:
        """Return these settings as the activation pass takes them."""
        from exegete.tools.pass_settings import EvidenceCounts, PassSettings

        counts = EvidenceCounts(firing=self.firing, top=self.top, random=self.random, hard=self.hard)
        return PassSettings(seed=seed, counts=counts, slices=self.slices, batch=self.batch)


class LabelConfig(Section):
    """How explanations are written and scored."""

    explainer: str = "lexical"
    """Who writes the explanations. Where `models.explainer` names a language model, the default is `combined`, or `one-shot`
    where there is no subject to run."""
    judge: str = "predicate"
    """Who judges them: `predicate` runs the explanation's predicate, `model` asks the language model `models.judge`, and is the
    default where that names one."""
    evaluators: tuple[str, ...] = ("detection", "fuzzing")
    """Which scores are computed."""
    explainer_options: dict[str, Any] = {}
    """Options of the explainer, for example `windows = 20`."""
    judge_options: dict[str, Any] = {}
    """Options of the judge, for example `temperature = 0.0`."""
    evaluator_options: dict[str, dict[str, Any]] = {}
    """Options of evaluators by their names, for example `fuzzing = { items_per_class = 10 }`."""
    stop_at: float | None = Field(default=None, gt=0, lt=1)
    """Balanced accuracy at which detection and fuzzing stop asking about a latent: as soon as a confidence sequence lies wholly
    above or below it (PROTOCOLS §13). Every window is asked about where it is left out."""
    profile: Literal["full", "night"] = "full"
    """`full`: detection and fuzzing judge every window that the evidence holds (PROTOCOLS §1). `night`: 10 firing and 10
    other windows each, and all of them on the latents that come first (`label.first`)."""
    first: float = Field(default=0.01, ge=0, le=1)
    """Share of the latents that are labeled first, 100 at least: a random subset stratified by firing rate, so that a run that
    ends early leaves an unbiased picture. The others follow in the order of the evidence."""
    limit: int | None = Field(default=None, gt=0)
    """Label only this many latents, drawn by the seed; all where it is left out."""
    concurrency: int = Field(default=64, ge=1)
    """Latents in flight at once; 2,000 where a `-batch` model is asked. Does not change the result."""
    batch: int = Field(default=250, ge=1)
    """Latents written in one transaction; a crash costs at most these, or five seconds of them. Does not change the result."""
    publish_seconds: float = Field(default=120.0, gt=0)
    """Readers see new results so often. Does not change the result."""
    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """After so many hours no latent enters any more; what is in flight is finished, and the run can be taken up again, with as
    many hours anew. Does not change the result."""
    until: str | None = Field(default=None, pattern=r"^([01]?\d|2[0-3]):[0-5]\d$")
    """The same at a time of day, for example `08:00`, the next one by the local clock when the run starts. Does not change the
    result."""
    confirm_hours: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    """Ask before going on where labeling may take longer, by the upper limit of the estimate. Does not change the result."""
    embed: bool = True
    """Where `models.embedder` is given, explanations are embedded as they are written, so that `exegete search` finds them by
    meaning. Does not change the result."""
    floors: int = Field(default=100, ge=0)
    """Latents on which the floors are scored as well (PROTOCOLS §11)."""
    random_control: int = Field(default=0, ge=0)
    """So many latents of a random-weight dictionary, at the same hook point, with as many latents active on a token, and chosen
    to fire as often as the dictionary's, are explained and scored as well, by the same explainer, judge and evaluators: a
    latent is typed as explained only where its lower bound exceeds the 95th percentile of their scores too (over all evaluators
    that decide; PROTOCOLS §12). Costs a second pass over the corpus and as much as so many more latents. 100 or more; 0:
    without."""


class CascadeConfig(Section):
    """Explainers from cheap to dear: a latent climbs to the next only while its score on the refine split says that it pays."""

    rungs: tuple[str, ...] = ()
    """Explainers, cheapest first, for example `["lexical", "one-shot", "refine"]`; none: `label.explainer` alone. `refine`
    shows a language model the explanation's mistakes on the refine split and asks for a better one. `test-and-refine`, which may
    stand above it, is an agent that runs texts of its own on the subject; a latent may take `tokens` (60,000) and `steps` (12)."""
    target: float = Field(default=0.9, gt=0, le=1)
    """A latent climbs only while the upper 95 % limit of its refine-split score (mean balanced accuracy of detection and
    fuzzing) stays below this."""
    worth_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What it is worth, in USD, that the score of one latent rises by 1: a latent climbs only where the gain to be expected, by
    the control subset, is worth the price of the next rung. Any price where it is left out."""
    rounds: int = Field(default=3, ge=1)
    """Revisions of one explanation, at most."""
    patience: int = Field(default=1, ge=1)
    """Revisions in a row that may bring nothing before refining stops."""
    items_per_class: int = Field(default=10, ge=1)
    """Firing and other windows of the refine split that detection and fuzzing judge, each, for one refine-split score."""
    control: int = Field(default=64, ge=0)
    """So many random latents climb every rung, whatever their scores, and draw best-of-N at the cost of that: they show what a
    rung gains and costs before any other latent is routed, and whether routing pays. 0: neither is known."""
    screen: bool = True
    """Explanations of the `lexical` rung are weighed by running their predicate, without a call; what a judge would say of them
    is reckoned from the control subset."""
    models: dict[str, str] = {}
    """Rung → language model, where it is another than `models.explainer`: `{ refine = "anthropic:claude-opus-4-5" }`."""
    options: dict[str, dict[str, Any]] = {}
    """Rung → options of its explainer, for example `{ one-shot = { windows = 20 } }`."""

    @model_validator(mode="after")
    def _check_rungs(self) -> CascadeConfig:
        if len(set(self.rungs)) < len(self.rungs):
            raise ValueError(f"cascade.rungs = {list(self.rungs)} names a rung twice")
        if misplaced := out_of_place(self.rungs):
            raise ValueError(f"cascade.rungs = {list(self.rungs)}: {misplaced}")
        for name in (*self.models, *self.options):
            if name not in self.rungs:
                raise ValueError(f"{name!r} is none of cascade.rungs = {list(self.rungs)}")
        return self


class ModelsConfig(Section):
    """The language models that explain and judge, and what they may cost. Keys come from the environment, never from here."""

    explainer: str | None = None
    """Writes the explanations: `openai:MODEL`, `openai:MODEL@URL`, `anthropic:MODEL`, `openai-batch:MODEL`,
    `anthropic-batch:MODEL` or `hf:PATH`."""
    judge: str | None = None
    """Judges them, and answers whatever else evaluators ask."""
    scorer: str | None = None
    """Local model for log-probabilities of given text, as surprisal needs them: `hf:PATH`."""
    embedder: str | None = None
    """Sentence-transformers model, by name or folder, for the evaluator `embedding` and the explainer `clusters`."""
    device: str = "cpu"
    """Torch device of `hf:` models and of the embedder."""
    budget_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """What the calls of this run may cost, in USD. Models that cost money are not called without one. Does not change the result."""
    no_budget: bool = False
    """Spend USD without a limit, whatever the budget, also on models whose price is unknown. Does not change the result."""
    budget_tokens: int | None = Field(default=None, ge=0)
    """What the calls of this run may take in tokens, input and output together; beside a budget in USD, or for models that
    cost none. Does not change the result."""
    confirm_usd: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """Ask before going on where the calls still to be paid for may cost more, by the upper limit of the estimate. Does not change
    the result."""
    prices: str | None = None
    """Price table (TOML) laid over the one that ships with Exegete. Does not change the result."""
    concurrency: int = Field(default=256, ge=1)
    """Calls in flight, at most. Does not change the result."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """At most; the server's own limits are found out anyway. Does not change the result."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Input and output together, at most. Does not change the result."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds for one attempt at a call."""
    patience_s: float = Field(default=600.0, gt=0)
    """Seconds for a call with all its attempts; after that it counts as missing, and `exegete resume` asks again."""
    attempts: int = Field(default=6, ge=1)
    """How often a call is sent while the server fails."""
    batch_linger_s: float = Field(default=5.0, gt=0)
    """For `-batch` models: a batch is sent when so many seconds brought no new question. Does not change the result."""
    batch_poll_s: float = Field(default=60.0, gt=0)
    """Seconds between two looks at a batch, at most. Does not change the result."""
    forsake_batches: bool = False
    """Ask anew what was in a batch that the provider no longer knows, although it may have been billed. Does not change the result."""

    def batch_limits(self) -> BatchLimits:
        """Return how a client of batches works."""
        from exegete.tools.llm import BatchLimits

        return BatchLimits(
            linger_s=self.batch_linger_s,
            poll_s=min(5.0, self.batch_poll_s),
            poll_max_s=self.batch_poll_s,
            forsake=self.forsake_batches,
        )

    def limits(self) -> Limits:
        """Return how a client may call."""
        from exegete.tools.llm import Limits

        unlimited = float("inf")
        return Limits(
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute or unlimited,
            tokens_per_minute=self.tokens_per_minute or unlimited,
            total_s=self.timeout_s,
            patience_s=self.patience_s,
            attempts=self.attempts,
        )


BATCHED_LATENTS = 2_000
"""Latents in flight where questions wait for a batch to fill: enough for some 80,000 questions."""


class RunConfig(Section):
    """One run. `subject`, `dictionary` and `corpus` may be left out where the store already holds evidence."""

    subject: SubjectConfig | None = None
    dictionary: DictionaryConfig | None = None
    corpus: CorpusConfig | None = None
    evidence: EvidenceConfig = EvidenceConfig()
    label: LabelConfig = LabelConfig()
    cascade: CascadeConfig = CascadeConfig()
    models: ModelsConfig = ModelsConfig()
    seed: int = Field(default=0, ge=0)
    """Every random choice derives from it."""
    store: str = "store"
    """Folder of the store, relative to the working directory."""

    @model_validator(mode="before")
    @classmethod
    def _ask_the_models(cls, tree: Any) -> Any:
        """Have language models that are named explain and judge, where nothing else is said."""
        if not isinstance(tree, dict):
            return tree
        models, label, cascade = (tree.get(name, {}) for name in ("models", "label", "cascade"))
        if not all(isinstance(table, dict) for table in (models, label, cascade)):
            return tree
        defaults: dict[str, Any] = {}
        if models.get("explainer"):
            defaults["explainer"] = "combined" if tree.get("subject") else "one-shot"
        if models.get("judge"):
            defaults["judge"] = "model"
        rungs, others = cascade.get("rungs"), cascade.get("models")  # Of whatever type: they are checked later.
        if isinstance(rungs, list | tuple) and (writer := top_writer(rungs)):
            defaults["explainer"] = writer
        asked = [models.get("explainer"), models.get("judge"), *(others.values() if isinstance(others, dict) else ())]
        if any("-batch:" in str(spec) for spec in asked):
            defaults["concurrency"] = BATCHED_LATENTS
        return {**tree, "label": {**defaults, **label}}


def load_config(
    file: Path | None, assignments: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the configuration in `file` with `section.key=value` assignments, then `overrides`, laid over it.

    `overrides` maps dotted keys to values; None values are skipped.

    Raises:
        UserError: the file is missing or no TOML, a key is unknown (the nearest is named), or a value does not fit.
    """
    tree = _read(file) if file else {}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        if not found:
            raise UserError(f"--set {assignment!r}: expected key=value, for example --set label.limit=100")
        _assign(tree, key.strip(), _value(text.strip()))
    return _settled(tree, overrides or {}, str(file) if file else "the options")


def restored_config(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that a run was begun with, `overrides` laid over it; keys that it does not know get defaults.

    Raises:
        UserError: a value does not fit, or the run was begun by a version with other keys.
    """
    return _settled(copy.deepcopy(dict(stored)), overrides, "the run's configuration")


def dotted_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Return every configuration key as `section.key` → what it means."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            keys[prefix + name] = field.description or ""
        else:
            keys.update(dotted_keys(inner, f"{prefix}{name}."))
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _settled(tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> RunConfig:
    for key, value in overrides.items():
        if value is not None:
            _assign(tree, key, value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file {str(file)!r}; `examples/` has some to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not TOML: {error}") from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key!r}: {section!r} is a value, not a table")
    tree[last] = value


_EXPECTED = {
    "tuple_type": 'expected a list, for example ["…", "…"]',
    "string_pattern_mismatch": "expected a time of day, for example 08:00",  # Nothing else has a pattern.
}
"""Type of a validation error → what to say of it in place of what pydantic says."""


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = nearest(key, dotted_keys()) or nearest(
            key.rsplit(".", 1)[-1], {k.rsplit(".", 1)[-1] for k in dotted_keys()}
        )
        return f"{source}: unknown key {key!r}.{near}"
    told = _EXPECTED.get(first["type"], first["msg"])
    return f"{source}: {key} = {first.get('input')!r}: {told}"
