"""Serve on loopback until standard input closes, on the port that is given or a free one: the first line of standard output."""

from __future__ import annotations

import asyncio
import gc
import sys

from .routes import Server
from .wire import serve


async def main() -> None:
    """Serve until whoever started this process is gone."""
    server = await serve(Server().handle, int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    gc.freeze()
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


asyncio.run(main())
