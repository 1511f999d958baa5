"""A language model server for tests: a process of its own that speaks the providers' wire formats over loopback.

    with serving(answer="oracle", rate=0.1) as server:
        client = AsyncOpenAI(base_url=server.openai_url, api_key="k", max_retries=0)

starting            run it, set behaviours, read its log
behaviours          how it answers and what goes wrong; also in a model's name: `oracle?rate=0.1&fault=429,first=3`
judges, reading     the oracle, recorded verdicts, the script; what they read in a prompt
answers, tools      answers in the structured form that was asked for, and broken ones
openai_*, anthropic_*   the two wire formats
service, routes, wire, record   from a request to its reply; addresses; HTTP; the log
"""

from __future__ import annotations

from .starting import Running, recorded, serving

__all__ = ["Running", "recorded", "serving"]
