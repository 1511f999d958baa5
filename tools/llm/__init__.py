"""Language models behind one awaitable call (see `contract`)."""

from __future__ import annotations

from exegete.tools.llm.contract import (
    Client,
    Journal,
    MemoryJournal,
    Message,
    PromptScorer,
    Reply,
    Request,
    Status,
    TokenLogprob,
    Usage,
    schema_text,
)

__all__ = [
    "Client",
    "Journal",
    "MemoryJournal",
    "Message",
    "PromptScorer",
    "Reply",
    "Request",
    "Status",
    "TokenLogprob",
    "Usage",
    "schema_text",
]
