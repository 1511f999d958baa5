"""The providers' own clients on the test server, without their retries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from .starting import Running


@asynccontextmanager
async def openai_client(server: Running, timeout: float = 10) -> AsyncIterator[AsyncOpenAI]:
    """Open OpenAI's client; `timeout` in seconds."""
    async with AsyncOpenAI(base_url=server.openai_url, api_key="k", max_retries=0, timeout=timeout) as client:
        yield client


@asynccontextmanager
async def anthropic_client(server: Running, timeout: float = 10) -> AsyncIterator[AsyncAnthropic]:
    """Open Anthropic's client; `timeout` in seconds."""
    async with AsyncAnthropic(base_url=server.anthropic_url, api_key="k", max_retries=0, timeout=timeout) as client:
        yield client
