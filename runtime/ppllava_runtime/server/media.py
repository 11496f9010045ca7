"""What a request shows → files of that request → what the assistant remembers of them."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from ppllava_engines.errors import MediaError, PPLLaVAError
from ppllava_runtime.conversation import Video
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.server.asked import Item
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.replies import Seen

if TYPE_CHECKING:
    from ppllava_runtime.server.service import Service
    from ppllava_runtime.server.spool import Spooled

_MOST_NAMES = 4096
_NAME_BYTES = 4096  # of each, for which some 70 pictures have room
_OWN_BYTES = 1024  # of a name without what it stands for, amply
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Remembered:
    """Something that was seen under a name, as far as its memory does not say it.

    Attributes:
        key: By which the assistant recalls it.
        digests: SHA-256 of each item, one after the other.
        damages: Of each item, what could not be read.
    """

    key: str
    digests: bytes
    damages: tuple[str | None, ...]

    @property
    def num_names(self) -> int:
        """As how many names it counts."""
        said = sum(map(sys.getsizeof, {damage for damage in self.damages if damage}))
        size = _OWN_BYTES + len(self.digests) + 8 * len(self.damages) + said
        return math.ceil(size / _NAME_BYTES)


class Uuids:
    """The names that tenants gave to what they showed, the last ones. Threads may share it.

    Where there are too many, the tenant that gave most of them loses some: no other loses its own
    to who gives many.

    Args:
        most: How many of all tenants together, each of 4 KiB: what takes more counts as several.
    """

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self._most = most
        self._lock = Lock()
        # Of each tenant, where the one used last is last.
        self._found: dict[str, OrderedDict[str, Remembered]] = {}
        self._counts = Counter[str]()  # of each tenant

    def get(self, tenant: str, items: Sequence[Item]) -> Remembered | None:
        """What this tenant showed under these names, sampled in the same way."""
        name = _name(items)
        with self._lock:
            found = self._found.get(tenant, OrderedDict())
            if name in found:
                found.move_to_end(name)
            return found.get(name)

    def put(self, tenant: str, items: Sequence[Item], remembered: Remembered) -> None:
        """From now on these names are of this."""
        name = _name(items)
        with self._lock:
            found = self._found.setdefault(tenant, OrderedDict())
            if (before := found.pop(name, None)) is not None:
                self._counts[tenant] -= before.num_names
            found[name] = remembered
            self._counts[tenant] += remembered.num_names
            while sum(self._counts.values()) > self._most:
                loser, _ = self._counts.most_common(1)[0]
                _, lost = self._found[loser].popitem(last=False)
                self._counts[loser] -= lost.num_names


@dataclass(frozen=True)
class Media:
    """The media of one request.

    Attributes:
        items: As they were asked for.
        files: Of each item; empty where they are only named.
        tenant: Whose they are.
    """

    items: tuple[Item, ...]
    files: tuple[tuple[Spooled, ...], ...]
    tenant: str

    def see(self, service: Service, leaving: Leaving) -> tuple[Video, tuple[Seen, ...]] | None:
        """What there is to be seen, and what to tell of each item; None where there is nothing.

        Raises:
            ApiError: It cannot be read, is more than the server takes, or is not remembered.
            Left: Nobody waits for it any more.
        """
        if not self.items:
            return None
        if self.items[0].urls is None:
            return self._recalled(service)
        names = self._names()
        try:
            video = self._watched(service, leaving)
        except PPLLaVAError as error:
            if isinstance(error, MediaError):
                service.metrics.media_failed()
            raise _named(ApiError.of(error), names) from error
        digests, damages = self._digests(), self._damages(video, names)
        if video.key is not None and all(item.uuid for item in self.items):
            remembered = Remembered(video.key, digests, damages)
            service.uuids.put(self.tenant, self.items, remembered)
        return video, self._seen(video, digests, damages)

    def _recalled(self, service: Service) -> tuple[Video, tuple[Seen, ...]]:
        remembered = service.uuids.get(self.tenant, self.items)
        video = None if remembered is None else service.assistant.recall(remembered.key)
        if remembered is None or video is None:
            item = self.items[0]
            raise ApiError(
                404,
                f"media {item.param}: nothing is remembered under this uuid with this sampling: "
                "send it again",
                code="media_not_found",
                param=item.param,
            )
        return video, self._seen(video, remembered.digests, remembered.damages)

    def _watched(self, service: Service, leaving: Leaving) -> Video:
        assistant, item = service.assistant, self.items[0]
        paths = [file.path for files in self.files for file in files]
        fps, num_frames = item.fps, item.num_frames
        if item.kind == "video":
            (path,) = paths
            return assistant.watch(path, num_frames, fps=fps, owner=self.tenant, leaving=leaving)
        return assistant.look(
            paths, fps=fps, num_frames=num_frames, owner=self.tenant, leaving=leaving
        )

    def _names(self) -> dict[str, str]:
        """What files are called in the request, by their paths, which are nobody's business."""
        names = {}
        for item, files in zip(self.items, self.files, strict=True):
            for i, file in enumerate(files):
                inside = f".frames[{i}]" if item.kind == "frames" else ""
                names[str(file.path)] = item.param + inside
        return names

    def _digests(self) -> bytes:
        found = []
        for item, files in zip(self.items, self.files, strict=True):
            hashes = [file.sha256 for file in files]
            if item.kind == "frames":
                hashes = [hashlib.sha256("".join(hashes).encode()).hexdigest()]
            found.append(bytes.fromhex(hashes[0]))
        return b"".join(found)

    def _damages(self, video: Video, names: Mapping[str, str]) -> tuple[str | None, ...]:
        damage = video.info.damage and _renamed(video.info.damage, names)
        if not damage or video.memory.kind == "video":
            return (damage,) * len(self.items)
        # Of several pictures it names those that it is about.
        return tuple(damage if item.param in damage else None for item in self.items)

    def _seen(
        self, video: Video, digests: bytes, damages: Sequence[str | None]
    ) -> tuple[Seen, ...]:
        is_video = video.memory.kind == "video"
        return tuple(
            Seen(
                kind="video" if is_video else "image",
                uuid=item.uuid,
                sha256=digests[i * _DIGEST_BYTES : (i + 1) * _DIGEST_BYTES].hex(),
                timestamps=[float(t) for t in video.info.timestamps] if is_video else [],
                damage=damage or None,
            )
            for i, (item, damage) in enumerate(zip(self.items, damages, strict=True))
        )


@asynccontextmanager
async def gathered(service: Service, items: tuple[Item, ...], tenant: str) -> AsyncIterator[Media]:
    """The media of a request, as files for the time of the block.

    Raises:
        ApiError: A URL that may not be opened, or cannot be; names its place.
    """
    async with service.spool.request() as spool:
        files = []
        for item in items:
            of_item = []
            for url in item.urls or ():
                try:
                    of_item.append(await spool.add(service.fetcher.fetch(url)))
                except ApiError as error:
                    error.param = error.param or item.param
                    raise
            files.append(tuple(of_item))
        yield Media(items, tuple(files), tenant)


def _named(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The failure with files called as in the request."""
    param = next((name for path, name in names.items() if path in error.message), None)
    return ApiError(
        error.status,
        _renamed(error.message, names),
        code=error.code,
        param=param,
        type=error.type,
        retry_after=error.retry_after,
    )


def _renamed(message: str, names: Mapping[str, str]) -> str:
    for path, name in names.items():
        message = message.replace(path, name)
    return message


def _name(items: Sequence[Item]) -> str:
    """One of a fixed length, however long those are that were given."""
    given = [(item.kind, item.uuid, item.fps, item.num_frames) for item in items]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()
