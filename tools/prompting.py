"""Prompts: the Jinja2 files of `exegete.prompts` as messages for a language model (PROTOCOLS §2).

1. Each top-level block of a file is one message, its role the first part of the block's name. The structure comes from
   the file alone: no value can add a message, whatever it contains.
2. All blocks before the last are rendered without any value, once: instructions and examples are byte for byte the same
   in every request, and a provider can cache them. `Rendered.shared` counts them.
3. Untrusted text (corpus, explanations, tokens) enters as a `Line` only: one line, escaped, so that it cannot hold a
   line break, a tag, a mark or a chat model's control token. A plain string in a template is a TypeError, a name that
   the template does not know or that is missing is one too.
4. A file is known by the digest of its text and of the files that it includes.

For example `render("detection", explanation=line("Cats."), windows=[window_line((" a", " cat"))])` ends with the message

    <explanation>Cats.</explanation>
    <window 1> a cat</window>
    Give 1 verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast, get_args

from jinja2 import BaseLoader, Environment, StrictUndefined, Template, TemplateNotFound, Undefined, nodes
from jinja2.meta import find_referenced_templates, find_undeclared_variables

from exegete.tools.llm.contract import Message, Request, Role
from exegete.tools.rendering import escape, render_window, visible
from exegete.tools.seeds import digest

SUFFIX = ".j2"
_CONTROL_TOKEN = re.compile(r"[\[［](?=/?[A-Z_]{3,}[\]］])")
"""The beginning of what some chat models read as a control token, for example `[INST]` or `[/INST]`."""
_BRACKET = "⁅"
"""In its place; unlike the wide bracket, no normalisation makes an ordinary one of it."""
_TAG = re.compile(r"[<＜﹤](?![\s\d=<＜﹤])")
"""The beginning of a tag or control token; not of a comparison, nor the first half of a mark."""


class Line(str):
    """Untrusted text made safe for a prompt: one line, no tags, no marks but our own. Made by `line` and its like."""

    __slots__ = ()


def line(text: str) -> Line:
    """Return free text (an explanation) as one line: white space runs become one space, the rest is escaped."""
    return Line(_defused(escape(" ".join(text.split()))))


def window_line(tokens: Sequence[str], marks: Collection[int] = ()) -> Line:
    """Return a window as one line, its white space kept and its marked runs inside `<<` `>>`."""
    return Line(_defused(render_window(tokens, marks)))


def spoken(text: str) -> str:
    """Return a model's own answer as it goes back into a conversation: its words and lines, but no control token.

    Providers keep messages apart by themselves; a local model reads the conversation as one text, where an answer that
    holds `<|im_end|>` would end its own message. A comparison such as `position < 2` stays.
    """
    return _defused(_TAG.sub("‹", "\n".join(map(_shown, text.split("\n")))))


def _shown(text: str) -> str:
    return visible(text.replace("\t", " "))


def _defused(text: str) -> str:
    return _CONTROL_TOKEN.sub(_BRACKET, text) if "[" in text or "［" in text else text


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: its messages, the digest of its file, and how many messages at the beginning never change."""

    messages: tuple[Message, ...]
    digest: str
    shared: int

    def request(self, schema: str | None = None, **options: Any) -> Request:
        """Return the request for this prompt; `options` are further fields of `Request`."""
        return Request(self.messages, schema, shared=self.shared, prompt_digest=self.digest, **options)


def render(name: str, **values: Any) -> Rendered:
    """Return the prompt `name` with `values` in its last message.

    Values are `Line`s, numbers, and lists or other objects made of them.

    Raises:
        TypeError: a value is missing or unknown to the template, or a string in it is not a `Line`.
        KeyError: there is no such prompt.
    """
    prompt = _prompt(name)
    if set(values) != prompt.values:
        raise TypeError(f"prompt {name!r} takes {sorted(prompt.values)}, not {sorted(values)}")
    last = Message("user", _block(prompt.template, "user", values))
    return Rendered((*prompt.shared, last), prompt.digest, len(prompt.shared))


def prompt_digest(name: str) -> str:
    """Return `sha256:…` of the prompt's text, included files with it. Raises KeyError where there is no such prompt."""
    return _prompt(name).digest


def prompt_names() -> list[str]:
    """Return the names of all prompts, sorted; files that only others include are not among them."""
    found = (entry.name for entry in files("exegete.prompts").iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX) and not name.startswith("_"))


@dataclass(frozen=True, slots=True)
class _Prompt:
    template: Template
    shared: tuple[Message, ...]
    values: frozenset[str]
    digest: str


class _Files(BaseLoader):
    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Any]:
        try:
            return (files("exegete.prompts") / template).read_text(encoding="utf-8"), template, lambda: True
        except FileNotFoundError:
            raise TemplateNotFound(template) from None


def _only_lines(value: Any) -> Any:
    # An undefined value passes: turning it into text raises.
    if not isinstance(value, Line | int | Undefined):
        raise TypeError(f"{str(value)[:40]!r} is not escaped: a prompt takes text as a Line only")
    return value


_ENVIRONMENT = Environment(
    loader=_Files(), undefined=StrictUndefined, finalize=_only_lines, trim_blocks=True, lstrip_blocks=True
)


@cache
def _prompt(name: str) -> _Prompt:
    source = _source(name)
    tree = _ENVIRONMENT.parse(source)
    blocks = [node.name for node in tree.body if isinstance(node, nodes.Block)]
    if not blocks or blocks[-1] != "user":
        raise ValueError(f"prompt {name!r}: the last block must be `user`")
    template = _ENVIRONMENT.get_template(name + SUFFIX)
    shared = tuple(Message(_role(block), _block(template, block, {})) for block in blocks[:-1])
    values = frozenset(find_undeclared_variables(tree))
    return _Prompt(template, shared, values, digest(*_sources(name + SUFFIX)))


def _source(name: str) -> str:
    try:
        return _Files().get_source(_ENVIRONMENT, name + SUFFIX)[0]
    except TemplateNotFound:
        raise KeyError(f"no prompt is named {name!r}; there are: {', '.join(prompt_names())}") from None


def _sources(file: str) -> Iterator[str]:
    text = _Files().get_source(_ENVIRONMENT, file)[0]
    yield text
    for included in find_referenced_templates(_ENVIRONMENT.parse(text)):
        yield from _sources(str(included))


def _role(block: str) -> Role:
    role = block.split("_")[0]
    if role not in get_args(Role):
        raise ValueError(f"block {block!r}: its name must begin with one of {', '.join(get_args(Role))}")
    return cast(Role, role)


def _block(template: Template, block: str, values: dict[str, Any]) -> str:
    return "".join(template.blocks[block](template.new_context(values))).strip("\n")
