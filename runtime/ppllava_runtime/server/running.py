"""One process that serves: its socket, its signals, and what it says when it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from ppllava_engines.errors import UnavailableError
from ppllava_engines.memory_layout import MemoryKind
from ppllava_runtime.server.app import app_of
from ppllava_runtime.server.live_protocol import LiveProtocol
from ppllava_runtime.server.protocol import protocol_of
from ppllava_runtime.server.service import Service
from ppllava_runtime.server.settings import Settings

_BACKLOG = 128
_SWITCH_SECONDS = 0.0005
_LARGEST_MESSAGE = 8 << 20  # of a WebSocket, before anything is made of it


def serve(
    bundle: Path,
    settings: Settings,
    *,
    host: str,
    port: int,
    device: str,
    threads: int | None,
    memory: MemoryKind,
) -> None:
    """Serves until it is told to stop and has answered what it accepted; see `create_app`.

    Raises:
        UnavailableError: The address cannot be listened on.
        PPLLaVAError: The model cannot be loaded.
    """
    # The event loop must not wait for threads that answer: each would keep it for 5 ms by default.
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # It warns of each request that is none, with which strangers could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with _noting_signals() as early, _listening(host, port) as listener:
        service = Service.open(bundle, settings, device, threads, memory)
        name = f"[{host}]" if ":" in host else host
        server = _Server(service, f"http://{name}:{listener.getsockname()[1]}", early)
        server.run([listener])
        if service.is_loading:
            # Python would wait for the thread, a large model's for a minute; all else is put away.
            os._exit(0)
        server.check()


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready and drains at the first signal.

    Args:
        service: What it serves.
        address: Where.
        early: Signals that came before it handles them.
    """

    def __init__(self, service: Service, address: str, early: list[int]) -> None:
        settings = service.settings
        config = uvicorn.Config(
            app_of(service),
            http=protocol_of(settings, service.metrics),
            ws=LiveProtocol,
            ws_max_size=_LARGEST_MESSAGE,
            ws_per_message_deflate=False,  # small messages that become large
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            # Time to be told that time is up, which the protocol does.
            timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type]  # a float is as good
        )
        super().__init__(config)
        self._service = service
        self._address = address
        self._early = early
        self._failure: BaseException | None = None
        self._announcing: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Passes where the model could be loaded.

        Raises:
            PPLLaVAError: Why not.
        """
        if self._failure is not None:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and waits in the background for the model."""
        await super().startup(sockets)
        self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        loading = self._service.loading
        assert loading is not None  # of the lifespan, which comes first
        await asyncio.wait([loading])
        if loading.cancelled():
            return
        self._failure = loading.exception()
        if self._failure is not None:
            self.should_exit = True
        elif self._service.state == "ready":
            # What is there now stays: to look through all of it again and again for garbage would
            # hold every answer up for a tenth of a second.
            gc.collect()
            gc.freeze()
            print(f"listening on {self._address}", flush=True)
            print(self._service.describe_memory(), flush=True)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at once at the next."""
        if self.should_exit:
            self._service.spool.close()
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self._service.drain()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals for the time of the block; having drained is a good end, not a death."""
        with _handling(self.handle_exit):
            for sig in self._early:
                self.handle_exit(sig, None)
            yield


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Signals that come in the block, noted and nothing else."""
    noted: list[int] = []
    with _handling(lambda sig, _: noted.append(sig)):
        yield noted


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handles what asks a process to end for the time of the block."""
    before = {sig: signal.signal(sig, handler) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, was in before.items():
            signal.signal(sig, was)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UnavailableError(
            f"server: {host} port {port} cannot be listened on: {error.strerror}: give another "
            "--host or --port"
        ) from error
