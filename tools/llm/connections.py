"""Connections for many calls in flight: lanes, each of which carries one call at a time.

1. A pool of the HTTP library looks at each of its connections twice per call, and asks the system about each idle one.
   With 256 connections in one pool that costs more processor time than all else in a call.
2. So each call in flight has an HTTP client of the SDK's own making to itself (proxies, certificates and redirects as the
   SDK has them), and in it one connection. The one that was used last is used next: it is the least likely to have been
   closed by the server, and those that are not needed are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2


class Lanes(httpx2.AsyncClient):
    """An HTTP client for an SDK that sends each request through a lane of its own. Opens as many as are in use at a time."""

    def __init__(self, open_lane: Callable[..., httpx2.AsyncClient]) -> None:
        """Prepare; `open_lane` is the SDK's class of HTTP clients, which takes `verify`."""
        # Certificates take long to load: once for all lanes.
        self._certificates = httpx2.create_ssl_context()
        super().__init__(verify=self._certificates)
        self._open_lane = open_lane
        self._opened: list[httpx2.AsyncClient] = []
        self._spare: list[httpx2.AsyncClient] = []

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request through a lane that is not in use.

        A response that is streamed outlasts this call; should its lane be used again before its end, that opens a second
        connection in it.
        """
        lane = self._spare.pop() if self._spare else self._open()
        try:
            return await lane.send(request, **options)
        finally:
            self._spare.append(lane)

    async def aclose(self) -> None:
        """Close all connections."""
        for lane in self._opened:
            await lane.aclose()
        await super().aclose()

    def _open(self) -> httpx2.AsyncClient:
        lane = self._open_lane(verify=self._certificates)
        self._opened.append(lane)
        return lane
