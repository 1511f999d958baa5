"""Which model: `openai:MODEL`, `openai:MODEL@URL`, `anthropic:MODEL`, `anthropic:MODEL@URL`, `hf:PATH`.

A key is sent to no server but its own: `OPENAI_API_KEY` to OpenAI, `ANTHROPIC_API_KEY` to Anthropic, `OPENROUTER_API_KEY`
to OpenRouter, `EXEGETE_API_KEY` (where there is one) to any other URL.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from exegete.tools.errors import UserError, nearest

PROVIDERS = ("openai", "anthropic", "openai-batch", "anthropic-batch", "hf")
_FORMS = "openai:MODEL, openai:MODEL@URL, anthropic:MODEL, anthropic:MODEL@URL, openai-batch:MODEL, anthropic-batch:MODEL, hf:PATH"
_HOSTS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
_KEY_VARIABLES = {
    "api.openai.com": "OPENAI_API_KEY",
    "api.anthropic.com": "ANTHROPIC_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
}
_ANY_KEY = "EXEGETE_API_KEY"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Spec:
    """A model and where it is served."""

    provider: str
    """One of `PROVIDERS`."""
    model: str
    """Name at the provider, or for `hf` a folder or a name on the hub."""
    url: str | None = None
    """Base URL as the provider's SDK takes it, where the user gave one."""

    @property
    def name(self) -> str:
        """As the user would write it."""
        return f"{self.provider}:{self.model}" + (f"@{self.url}" if self.url else "")

    @property
    def base_url(self) -> str:
        """Where requests go."""
        return self.url or _HOSTS[self.provider.removesuffix("-batch")]

    @property
    def host(self) -> str:
        """Host of `base_url`."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def local(self) -> bool:
        """Whether it runs on this machine, where a call costs nothing."""
        return self.provider == "hf" or self.host in _LOOPBACK

    @property
    def key_variable(self) -> str:
        """Environment variable of the key for this server."""
        return _KEY_VARIABLES.get(self.host, _ANY_KEY)

    def key(self) -> str | None:
        """Return the key from the environment; None where the server may do without one.

        Raises:
            UserError: the server needs a key and its variable is not set (the message names it), or the environment names
                another server than the model does, to which the key may belong.
        """
        self._check_environment()
        key = os.environ.get(self.key_variable, "").strip()
        if key:
            return key
        if self.key_variable == _ANY_KEY:
            return None
        raise UserError(f"{self.name}: no key; set the environment variable {self.key_variable}")

    def _check_environment(self) -> None:
        variable = f"{self.provider.removesuffix('-batch').upper()}_BASE_URL"
        elsewhere = urlsplit(os.environ.get(variable, "")).hostname
        if self.url is None and elsewhere and elsewhere != self.host:
            raise UserError(
                f"{self.name}: {variable} is set to a server at {elsewhere}; name it in the model, as in "
                f"{self.provider}:{self.model}@https://{elsewhere}/…, or unset {variable}"
            )


def parse_spec(text: str) -> Spec:
    """Return the model that `text` names, for example `openai:llama-3@http://localhost:8000/v1`.

    A URL without a path gets the provider's own (`/v1` for OpenAI's protocol).

    Raises:
        UserError: unknown provider (the nearest is named), no model, or a URL that is none or holds a password.
    """
    provider, colon, rest = text.strip().partition(":")
    if not colon or provider not in PROVIDERS:
        shown = provider if colon else text
        near = nearest(shown.lower(), PROVIDERS)
        raise UserError(f"{_quoted(text)}: no provider {_quoted(shown)}; expected one of {_FORMS}.{near}")
    if provider == "hf":
        return Spec(provider, _model(text, rest))
    model, at, url = _cut(rest)
    return Spec(provider, _model(text, model), _url(provider, url) if at else None)


def _quoted(text: str) -> str:
    # What follows an @ may hold a password.
    return repr(text.partition("://")[0] if "://" in text else text)


def _cut(rest: str) -> tuple[str, bool, str]:
    for scheme in ("@http://", "@https://"):
        if scheme in rest:
            model, _, url = rest.partition(scheme)
            return model, True, scheme[1:] + url
    model, at, url = rest.partition("@")
    return model, bool(at), url


def _model(text: str, model: str) -> str:
    if not model.strip():
        raise UserError(f"{_quoted(text)}: no model is named; expected one of {_FORMS}")
    return model.strip()


def _url(provider: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(f"the URL after @ in {provider}:MODEL@URL cannot be read") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{provider}:…@{parts.scheme}://{parts.hostname}: the URL holds a password or a query; "
            f"put the key into the environment variable {_ANY_KEY}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r}: expected a URL after @ that begins with http:// or https://")
    return _with_path(provider, parts, port)


def _with_path(provider: str, parts: SplitResult, port: int | None) -> str:
    # OpenAI's SDK wants the /v1 in its base URL, Anthropic's adds it.
    path = parts.path.rstrip("/")
    if provider.startswith("anthropic"):
        path = path.removesuffix("/v1")
    elif not path:
        path = "/v1"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "") + path
