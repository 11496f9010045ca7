"""What may be read of the URLs that a request names: nothing, but for what settings allow.

A URL is taken apart here and nowhere else: who opens it gets a `Target` and never the text, so that
no other parser can find another host in it.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TypeAlias

import idna

from ppllava_engines.errors import UsageError
from ppllava_runtime.server.addresses import Address, is_public, is_unicast
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.spool import too_large

_PORTS = {"http": 80, "https": 443}
_MOST_CHARACTERS = 8192
_REMOTE = re.compile(r"(https?)://([^/?]*)([/?].*)?", re.IGNORECASE | re.DOTALL)
_FILE = re.compile(r"file://(?:localhost)?(/[^?]*)", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})?")
_MEDIA_TYPE = re.compile(r"(?:(?:video|image)/[a-z0-9.+-]+|application/octet-stream)?")
_CHARACTERS_AT_ONCE = 1 << 20  # a multiple of 4


@dataclass(frozen=True)
class Remote:
    """Something to fetch by HTTP.

    Attributes:
        scheme: "http" or "https".
        host: In lower case and ASCII, or an address without brackets.
        port: Where to.
        path: What to ask for, with its query.
        private: Whether the host may have addresses that are not public.
    """

    scheme: str
    host: str
    port: int
    path: str
    private: bool

    @property
    def address(self) -> Address | None:
        """The address that `host` is; None where it is a name."""
        return _address(self.host)

    @property
    def authority(self) -> str:
        """The host as a request's "Host" has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def admits(self, address: Address) -> bool:
        """Whether this address of the host may be dialled."""
        if self.private:
            return is_unicast(address, by_name=self.address is None)
        return is_public(address)


@dataclass(frozen=True)
class Inline:
    """Content that a "data:" URL brings along, base64 in `text` from `start` on."""

    text: str = field(repr=False)
    start: int

    def chunks(self) -> Iterator[bytes]:
        """Yields the content.

        Raises:
            ApiError: 400: it is not base64.
        """
        for begin in range(self.start, len(self.text), _CHARACTERS_AT_ONCE):
            block = self.text[begin : begin + _CHARACTERS_AT_ONCE]
            is_last = begin + _CHARACTERS_AT_ONCE >= len(self.text)
            try:
                if "=" in block and not is_last:
                    raise binascii.Error
                yield base64.b64decode(block, validate=True)
            except ValueError as error:
                raise _invalid("data: what is in it is not base64") from error


@dataclass(frozen=True)
class Local:
    """A file below an allowed folder, each name on the way to it being one of a folder in it."""

    root: Path
    names: tuple[str, ...]

    def open(self) -> int:
        """A descriptor of the file, which was found without following a link.

        Raises:
            ApiError: 400: there is no such regular file.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        # A pipe without a writer shall not hold who opens it.
        ways = [os.O_DIRECTORY] * (len(self.names) - 1) + [os.O_NONBLOCK | os.O_NOCTTY]
        try:
            found = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                for name, how in zip(self.names, ways, strict=True):
                    inner = os.open(name, flags | how, dir_fd=found)
                    os.close(found)
                    found = inner
                if not stat.S_ISREG(os.fstat(found).st_mode):
                    raise OSError
            except BaseException:
                os.close(found)
                raise
        except (OSError, ValueError) as error:
            raise ApiError(
                400,
                "file: it is not there, or not a regular file, or behind a link; name a file of an "
                "allowed folder by its real path",
                code="media_fetch_failed",
            ) from error
        return found


Target: TypeAlias = Remote | Inline | Local


@dataclass(frozen=True)
class _Rule:
    """A host of the settings: with a port, that one only."""

    host: str
    port: int | None
    below: bool  # "*.host"

    @staticmethod
    def of(text: str, *, below: bool) -> _Rule:
        """The rule that an operator wrote as "host", "host:port" or, if `below`, "*.host"."""
        wild = below and text.startswith("*.")
        name = text[2:] if wild else text
        if name.count(":") > 1 and not name.startswith("["):
            name = f"[{name}]"
        try:
            host, port = _split(name)
        except ApiError as error:
            raise UsageError(f"allowed host {text!r}: {error.message}") from error
        if wild and _address(host) is not None:
            raise UsageError(f"allowed host {text!r}: an address has nothing below it")
        return _Rule(host, port, wild)

    def holds(self, host: str, port: int, usual: int) -> bool:
        """Whether it allows this host at this port."""
        if port != (usual if self.port is None else self.port):
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


class Policy:
    """Which URLs may be opened: none, but for those that settings allow.

    Args:
        settings: Its `media_domains`, `private_hosts`, `media_roots` and `media`.

    Raises:
        UsageError: A host or a folder of the settings is not one.
    """

    def __init__(self, settings: Settings) -> None:
        self._public = [_Rule.of(text, below=True) for text in settings.media_domains]
        self._private = [_Rule.of(text, below=False) for text in settings.private_hosts]
        self._roots = list(_roots(settings.media_roots))
        self._num_bytes = settings.media.num_bytes

    def parse(self, url: str) -> Target:
        """What a URL is, where it may be opened.

        Raises:
            ApiError: 400: "invalid_url", "media_not_allowed" or "media_too_large".
        """
        if url[:5].lower() == "data:":
            return self._inline(url)
        _check_characters(url)
        if _SCHEME.match(url) is None:
            raise _invalid("it has no scheme")
        if match := _REMOTE.fullmatch(url):
            scheme, authority, path = match.groups()
            return self._remote(scheme.lower(), authority, path or "/")
        if url[:5].lower() == "file:":
            return self._local(url)
        raise _not_allowed(
            "it is of another scheme than http, https, data and file, or lacks the // after it"
        )

    def follow(self, target: Remote, location: str) -> Remote:
        """Where a redirect leads, which must be allowed as if it had been asked for.

        Args:
            target: What redirects.
            location: What its "Location" says.

        Raises:
            ApiError: See `parse`; also, it leads from https to another scheme.
        """
        _check_characters(location)
        if location.startswith("//"):
            location = f"{target.scheme}:{location}"
        if _SCHEME.match(location):
            match = _REMOTE.fullmatch(location)
            if match is None:
                raise _not_allowed("it redirects to another scheme than http and https")
            scheme, authority, path = match.groups()
            if target.scheme == "https" and scheme.lower() != "https":
                raise _not_allowed("it redirects from https to http")
            return self._remote(scheme.lower(), authority, path or "/")
        before = target.path.partition("?")[0]
        if location.startswith("?"):
            location = before + location
        elif not location.startswith("/"):
            location = f"{before.rpartition('/')[0]}/{location}"
        # Through all checks again, though the host is the same.
        return self._remote(target.scheme, target.authority, location)

    def _remote(self, scheme: str, authority: str, path: str) -> Remote:
        host, port = _split(authority)
        usual = _PORTS[scheme]
        port = usual if port is None else port
        private = any(rule.holds(host, port, usual) for rule in self._private)
        if not private and not any(rule.holds(host, port, usual) for rule in self._public):
            raise _not_allowed(f"{host} at port {port} is none of the hosts that are allowed here")
        path = path if path.startswith("/") else f"/{path}"
        target = Remote(scheme, host, port, _encoded(path), private)
        if target.address is not None and not target.admits(target.address):
            raise _not_allowed(f"{host} is no address that may be dialled")
        return target

    def _local(self, url: str) -> Local:
        match = _FILE.fullmatch(url)
        if match is None:
            raise _invalid("file: expected file:///path, a path of this machine")
        path = _decoded(match[1])
        names = tuple(path.split("/")[1:])
        if any(name in ("", ".", "..") for name in names) or "%2f" in url.lower():
            raise _invalid("file: its path has empty names, dots or encoded slashes for names")
        for root, real in self._roots:
            if names[: len(root)] == root and len(names) > len(root):
                return Local(real, names[len(root) :])
        raise _not_allowed("the file is in none of the folders that are allowed here")

    def _inline(self, url: str) -> Inline:
        comma = url.find(",", 0, 256)
        media_type, *parameters = url[5:comma].lower().split(";")
        if comma < 0 or parameters[-1:] != ["base64"] or not _MEDIA_TYPE.fullmatch(media_type):
            raise _invalid(
                "data: expected data:video/…;base64, or data:image/…;base64, before the content"
            )
        if (len(url) - comma - 1) // 4 * 3 > self._num_bytes + 2:
            raise too_large(self._num_bytes)
        return Inline(url, comma + 1)


def _check_characters(url: str) -> None:
    """Refuses what one parser may read in another way than the next."""
    if len(url) > _MOST_CHARACTERS:
        raise _invalid(f"it has {len(url)} characters, expected {_MOST_CHARACTERS} at most")
    for character in url:
        if character in "\\#" or character.isspace() or not character.isprintable():
            raise _invalid(f"it has the character {character!a}, which must not be in it")


def _split(authority: str) -> tuple[str, int | None]:
    """The host in the one form it has, and the port; None where there is none.

    Raises:
        ApiError: 400 "invalid_url".
    """
    if "@" in authority:
        raise _invalid("it has a user or a password, which are not sent")
    match = _HOST.fullmatch(authority)
    if match is None:
        raise _invalid("its host is none, or its port is no number")
    host, port = match[1].lower(), match[2]
    if port is not None and not (0 < int(port) < 65536 and str(int(port)) == port):
        raise _invalid("its port is no number from 1 to 65535")
    return _canonical(host), None if port is None else int(port)


def _canonical(host: str) -> str:
    if host.startswith("["):
        return _address_of(IPv6Address, host[1:-1])
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True, transitional=False).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise _invalid("its host is no name of the internet") from error
        if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
            raise _invalid("its host is an address in other digits than 0 to 9")
    host = host.removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _invalid("its host is no name of the internet")
    # Whatever ends in a number may be read as an address: 127.1, 0x7f.1, 2130706433.
    return _address_of(IPv4Address, host) if _NUMBER.fullmatch(labels[-1]) else host


def _address_of(kind: type[IPv4Address] | type[IPv6Address], text: str) -> str:
    try:
        address = kind(text)
    except ValueError as error:
        raise _invalid("its host is an address of no usual form") from error
    if str(address) != text:
        raise _invalid(f"its host is an address in another form than the usual, {address}")
    return text


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _encoded(path: str) -> str:
    """The path and query in ASCII: UTF-8 in percent signs, as browsers send it."""
    sent = path.encode("utf-8")
    return "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in sent)


def _decoded(path: str) -> str:
    """The path with its percent signs resolved, once."""
    sent = path.encode("utf-8")
    if any(match[1] is None for match in _PERCENT.finditer(sent)):
        raise _invalid("file: a % is followed by no two hexadecimal digits")
    return os.fsdecode(_PERCENT.sub(lambda match: bytes([int(match[1], 16)]), sent))


def _roots(folders: Iterable[Path]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yields the names that paths below each folder begin with, and the folder without links."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"media folder {folder}: it is no folder; name one that is there")
        real = folder.resolve()
        # As the operator wrote it, and as it is.
        for path in dict.fromkeys((Path(os.path.abspath(folder)), real)):  # noqa: PTH100 - keeps links
            yield path.parts[1:], real


def _invalid(what: str) -> ApiError:
    return ApiError(400, f"URL of media: {what}", code="invalid_url")


def _not_allowed(what: str) -> ApiError:
    sentence = f"URL of media: {what}; the server's operator can allow it, or send the content"
    return ApiError(400, f"{sentence} as a data: URL", code="media_not_allowed")
