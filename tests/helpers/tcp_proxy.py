"""A bad network between a device and the server: a TCP proxy that is slow, cuts, or swallows everything."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

_PIECE_BYTES: Final = 8192


@dataclass(eq=False)
class TcpProxy:
    """Passes bytes between `port` and the server's `target` port, in a thread of its own; a context manager.

    Change its ways at any time: `hold_at` lets nothing more go up once so many bytes have (until it is None again),
    `swallow` passes nothing on while connections stay open (until `pass_on`), `refusing` closes new ones at once, `cut`
    closes those that are open.
    """

    target: int
    hold_at: int | None = None
    refusing: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    port: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _passing: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        ready = threading.Event()

        async def serve() -> None:
            server = self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = server.sockets[0].getsockname()[1]
            self._passing.set()
            ready.set()

        def work() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=work, name="proxy", daemon=True)
        self._thread.start()
        assert ready.wait(60.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(10.0)
        self._loop.close()

    def cut(self) -> None:
        """Close every open connection, whatever it is carrying."""

        def close() -> None:
            for writer in list(self._open):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(close)

    def swallow(self) -> None:
        """Take everything and pass nothing on."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def pass_on(self) -> None:
        """Pass on again, first what was swallowed."""
        self._loop.call_soon_threadsafe(self._passing.set)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [task for task in asyncio.all_tasks(self._loop) if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0.05)  # sockets are closed in later turns of the loop

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._open.discard(writer)
            writer.transport.abort()
            return
        self._open.add(back)
        try:
            await asyncio.gather(self._pass(reader, back, up=True), self._pass(there, writer, up=False))
        except OSError:
            pass  # cut by one side or by the test
        finally:
            for end in (writer, back):
                self._open.discard(end)
                end.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while data := await source.read(_PIECE_BYTES):
                await self._passing.wait()
                if up:
                    self.bytes_up += len(data)
                    while self.hold_at is not None and self.bytes_up >= self.hold_at:  # noqa: ASYNC110 - set by another thread
                        await asyncio.sleep(0.01)
                else:
                    self.bytes_down += len(data)
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
