"""Language models behind one awaitable call (see `contract`); `open_client` makes clients."""

from __future__ import annotations

from exegete.tools.llm.contract import (
    BatchJournal,
    Client,
    Journal,
    MemoryJournal,
    Message,
    PromptScorer,
    Reply,
    Request,
    Status,
    Submission,
    TokenLogprob,
    ToolCall,
    ToolResult,
    Usage,
    schema_text,
    tool_text,
)

# isort: split
# After the contract, which prompts are rendered into.
from exegete.tools.llm.batch_limits import BatchLimits
from exegete.tools.llm.budget import Budget, BudgetUsedUp
from exegete.tools.llm.opening import gives_logprobs, open_client, open_scorer
from exegete.tools.llm.pacing import Allowance, Limits
from exegete.tools.llm.prices import Price, Prices, load_prices
from exegete.tools.llm.specs import Spec, parse_spec

__all__ = [
    "Allowance",
    "BatchJournal",
    "BatchLimits",
    "Budget",
    "BudgetUsedUp",
    "Client",
    "Journal",
    "Limits",
    "MemoryJournal",
    "Message",
    "Price",
    "Prices",
    "PromptScorer",
    "Reply",
    "Request",
    "Spec",
    "Status",
    "Submission",
    "TokenLogprob",
    "ToolCall",
    "ToolResult",
    "Usage",
    "gives_logprobs",
    "load_prices",
    "open_client",
    "open_scorer",
    "parse_spec",
    "schema_text",
    "tool_text",
]
