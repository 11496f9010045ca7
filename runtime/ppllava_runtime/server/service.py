"""What the endpoints of one server share: `request.app.state.service`."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ppllava_engines.errors import UsageError
from ppllava_engines.memory_layout import MemoryKind
from ppllava_runtime.asking import Options
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.live import LiveVideo
from ppllava_runtime.memories import MemoryStore
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.server.admission import Admission
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.fetching import Fetcher
from ppllava_runtime.server.media import Uuids
from ppllava_runtime.server.metrics import Metrics
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.spool import Spool
from ppllava_runtime.server.urls import Policy

State = Literal["starting", "ready", "draining", "failed"]


@dataclass
class Service:
    """What the endpoints of one server share.

    Attributes:
        assistant: Answers; it reads files in `sandbox` and remembers in its store.
        settings: What the server was started with.
        model_id: The name that a request has to give as its model: that of the bundle's folder.
        admission: Slots of requests: `async with service.admission.slot():`.
        live: Slots of live sessions, likewise; none waits.
        sandbox: Where files are decoded.
        spool: Where media are files while a request lasts.
        fetcher: Fetches media from URLs.
        uuids: Names of media that were watched.
        metrics: Counts.
        threads: Where the assistant works, one thread per running request.
        created: When the server was started, in seconds since 1970.
        state: "ready" once a first answer has been given.
        loading: Loads the model, and ends as that does; from the lifespan on.
    """

    assistant: Assistant
    settings: Settings
    model_id: str
    admission: Admission
    live: Admission
    sandbox: Sandbox
    spool: Spool
    fetcher: Fetcher
    uuids: Uuids
    metrics: Metrics
    threads: ThreadPoolExecutor
    created: int
    state: State = "starting"
    loading: asyncio.Task[None] | None = field(default=None, repr=False)
    _warming: Future[None] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def open(
        bundle: Path, settings: Settings, device: str, threads: int | None, memory: MemoryKind
    ) -> Service:
        """A service whose model is not loaded yet; see `create_app`."""
        policy = Policy(settings)
        store, sandbox = MemoryStore(settings.cache_bytes), Sandbox(settings.media)
        assistant = Assistant.open(bundle, threads, device, memory, store, sandbox)
        spool = Spool(settings.spool, settings.media, settings.spool_bytes)
        admission = Admission(settings.num_running, settings.num_queued)
        live = Admission(settings.num_live, 0, "live sessions")
        # Of the folder, which its owner named; the model's is that of a checkpoint's folder.
        name = bundle.resolve().name or assistant.model.name
        metrics = Metrics(version("ppllava-edge"), name, device)
        shown = metrics.show
        shown("ppllava_requests_running", "Requests that are answered.", lambda: admission.num_held)
        shown("ppllava_requests_queued", "Requests that wait.", lambda: admission.num_queued)
        shown("ppllava_live_sessions", "Live sessions.", lambda: live.num_held)
        shown("ppllava_cache_bytes", "Memories of videos.", lambda: store.nbytes)
        shown("ppllava_spool_bytes", "Files of requests.", lambda: spool.num_bytes)
        shown(
            "ppllava_sandbox_broken", "Processes that broke decoding.", lambda: sandbox.num_broken
        )
        shown("ppllava_sandbox_peak_bytes", "Most of any of them.", lambda: sandbox.peak_bytes)
        return Service(
            assistant=assistant,
            settings=settings,
            model_id=name,
            admission=admission,
            live=live,
            sandbox=sandbox,
            spool=spool,
            fetcher=Fetcher(policy, settings.media),
            uuids=Uuids(),
            metrics=metrics,
            threads=ThreadPoolExecutor(settings.num_running, "answering"),
            created=int(time.time()),
        )

    async def load(self) -> None:
        """Loads the model and asks it about a picture, from the file to the last word.

        Raises:
            PPLLaVAError: See `Assistant.load`; what cannot answer here never can.
        """
        self._warming = self.threads.submit(self._warm_up)
        try:
            await asyncio.wrap_future(self._warming)
        except Exception:
            self.state = "failed"
            raise
        if self.state == "starting":
            self.state = "ready"

    @property
    def is_loading(self) -> bool:
        """Whether a thread still loads the model, which nothing can end."""
        return self._warming is not None and not self._warming.done()

    def _warm_up(self) -> None:
        if self.state != "starting":
            return
        self.sandbox.start()
        self.assistant.load()
        if self.state != "starting":  # told to stop: nothing to be asked about is there any more
            return
        path = self.spool.folder / "warm-up.png"
        try:
            Image.new("RGB", (64, 64), (90, 120, 150)).save(path)
            video = self.assistant.watch(path)
            _ = video.answer("What is this?", Options(max_new_tokens=2)).text  # which generates it
        finally:
            path.unlink(missing_ok=True)

    def drain(self) -> None:
        """Takes no more requests; those that were accepted are answered."""
        if self.state in ("starting", "ready"):
            self.state = "draining"
        self.admission.close()
        self.live.close()

    async def close(self) -> None:
        """Puts everything away that outlives a request."""
        if self.loading is not None:
            self.loading.cancel()
            await asyncio.wait([self.loading])
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.fetcher.close()
        self.sandbox.close()
        self.spool.close()

    def describe_memory(self) -> str:
        """One line on what of the machine's memory this server may take, beside the program."""
        media, settings = self.settings.media, self.settings
        model = sum(file.size for file in self.assistant.bundle.manifest.files.values())
        try:
            fps = settings.live_fps
            seconds = min(settings.live_seconds, self.assistant.max_frames / fps)
            window = LiveVideo(self.assistant, seconds, fps).nbytes
            live = f"{settings.num_live} live windows of {_mib(window)}"
        except UsageError:  # of less than two frames: sessions ask for another
            live = f"{settings.num_live} live windows of up to {self.assistant.max_frames} frames"
        answers = f"{settings.num_running} KV caches of up to {_mib(self.kv_bytes)}"
        # A live session has its frames decoded beside the slots.
        num_decoding = settings.num_running + settings.num_live
        decoding = f"{num_decoding} decoders of up to {_mib(media.address_space)}"
        cache = f"cache up to {_mib(settings.cache_bytes)}"
        bodies = f"bodies of up to {_mib(settings.bodies_bytes)}"
        return f"memory: model {_mib(model)}, {cache}, {answers}, {bodies}, {live}, {decoding}"

    @property
    def kv_bytes(self) -> int:
        """Keys and values of an answer that uses all positions, as any request may have it."""
        manifest = self.assistant.bundle.manifest
        spec = manifest.decoder
        size = 2 if manifest.precision.dtype == "bf16" else np.dtype(spec.dtype).itemsize
        token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * size
        return self.assistant.decoder.max_positions * token

    def check_ready(self) -> None:
        """Passes where requests are answered.

        Raises:
            ApiError: 503: not yet, or not any more.
        """
        if self.state == "ready":
            return
        why = {
            "starting": "the model is being loaded: try again in a few seconds",
            "draining": "it was told to stop and answers only what it has accepted: ask another",
            "failed": "the model could not be loaded: its log says why",
        }[self.state]
        raise ApiError(
            503,
            f"server: {why}",
            code="not_ready",
            type="server_error",
            retry_after=5.0 if self.state == "starting" else None,
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
