"""What can go wrong with one call, sorted by what to do about it.

1. `Transient`: the same request may succeed later. `pushback` says that the server asked for fewer requests; `sent` that
   the provider may have received, answered and billed it although no answer came.
2. `Declined`: no answer will come to this request, others may be fine. It becomes a reply with a status.
3. `Lacking`: the server does not have something that the request used (schemas, log-probabilities); ask without.
4. `UserError`: no request will succeed until the user mends something (key, model, quota).

Providers' messages can quote a key: `scrub` takes keys out of everything that leaves this folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from exegete.tools.errors import UserError
from exegete.tools.llm.contract import Status

_KEY_SHAPED = re.compile(r"(?i)\b(?:sk|pk|rk)-[\w*.…-]{4,}|\bbearer\s+\S+")
_DETAIL_CHARS = 500

_TOO_LONG = re.compile(
    r"(?i)context.{0,20}(length|window|size)|prompt is too long|too many tokens|maximum.{0,30}tokens|input.{0,20}too long"
)
_FILTERED = re.compile(r"(?i)content.?(filter|policy|management)|moderation|flagged|invalid_prompt|usage polic")
_QUOTA = re.compile(r"(?i)insufficient_quota|exceeded your current quota|credit balance|billing")
_BAD_TEXT = re.compile(r"(?i)surrogate|invalid unicode|invalid utf|null byte|\\u0000")
_STRUCTURED = re.compile(r"(?i)response_format|json_schema|json_object|output_config|output_format|structured|grammar")
_LOGPROBS = re.compile(r"(?i)log_?probs")


class Transient(Exception):
    """The same request may succeed later."""

    def __init__(self, detail: str, *, pushback: bool = False, retry_after_s: float | None = None, sent: bool = False):
        super().__init__(detail)
        self.pushback = pushback
        self.retry_after_s = retry_after_s
        self.sent = sent


class Declined(Exception):
    """This request will not be answered; others may be."""

    def __init__(self, status: Status, detail: str):
        super().__init__(detail)
        self.status: Status = status


class Lacking(Exception):
    """The server lacks what `structured` or `logprobs` says; the request can be asked without."""

    def __init__(self, structured: bool, logprobs: bool, otherwise: Exception):
        super().__init__(str(otherwise))
        self.structured = structured
        self.logprobs = logprobs
        self.otherwise = otherwise


class Unexplained(Exception):
    """A request was rejected as malformed, for a reason that is not known here.

    Before the first answer that means that the configuration is wrong; after it, that this request is.
    """


def fault_of(
    name: str, key_variable: str, code: int, text: str, headers: Mapping[str, str], asked: tuple[bool, bool]
) -> Exception:
    """Return what an HTTP error means.

    Args:
        name: the client, as the user wrote it.
        key_variable: environment variable of its key.
        code: HTTP status, 400 to 599.
        text: the provider's message, scrubbed.
        headers: of the response.
        asked: whether the request asked for structured output and for log-probabilities.
    """
    detail = f"HTTP {code}: {text}"
    if code == 402 or (code in (400, 403, 429) and _QUOTA.search(text)):
        return UserError(f"{name}: the provider asks for payment or quota: {text}")
    if code in (408, 409, 425, 429) or code >= 500:
        lacking = _lacking(code, text, asked, Transient(detail)) if code == 501 else None
        return lacking or Transient(detail, pushback=code in (429, 503, 529), retry_after_s=retry_after_s(headers))
    if code == 401:
        return UserError(f"{name}: the server does not take the key in {key_variable}: {text}")
    if code in (400, 403, 413, 422) and (status := _declined(code, text)):
        return Declined(status, detail)
    return _lasting(name, code, text, asked)


def _declined(code: int, text: str) -> Status | None:
    if _FILTERED.search(text):
        return "filtered"
    return "rejected" if code == 413 or _TOO_LONG.search(text) or _BAD_TEXT.search(text) else None


def _lasting(name: str, code: int, text: str, asked: tuple[bool, bool]) -> Exception:
    otherwise: Exception
    if code == 403:
        otherwise = UserError(f"{name}: the key has no permission for this: {text}")
    elif code == 404:
        otherwise = UserError(f"{name}: no such model or address: {text}")
    else:
        otherwise = Unexplained(f"HTTP {code}: {text}")
    return _lacking(code, text, asked, otherwise) or otherwise


def _lacking(code: int, text: str, asked: tuple[bool, bool], otherwise: Exception) -> Lacking | None:
    structured = asked[0] and bool(_STRUCTURED.search(text))
    logprobs = asked[1] and bool(_LOGPROBS.search(text))
    return Lacking(structured, logprobs, otherwise) if structured or logprobs else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asks to wait (`retry-after-ms`, `retry-after` in seconds or as a date)."""
    for header, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[header]) * scale)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, (parsedate_to_datetime(headers["retry-after"]) - datetime.now(UTC)).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


def scrub(text: str, key: str | None) -> str:
    """Return a provider's message as one line of at most 500 characters, without `key` or anything that looks like one."""
    if key and len(key) >= 6:
        text = text.replace(key, "[key]")
    text = _KEY_SHAPED.sub("[key]", " ".join(text.split()))
    return text if len(text) <= _DETAIL_CHARS else text[:_DETAIL_CHARS] + "…"
