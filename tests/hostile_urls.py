"""URLs that strangers may send to reach what they must not, by the trick that each tries."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

# This machine, its network, and where clouds keep a machine's credentials.
INNER = ("127.0.0.1", "127.8.9.10", "10.0.0.1", "192.168.1.1", "172.16.5.4", "169.254.169.254")
INNER_6 = ("::1", "::", "fe80::1", "fd00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "100::1")
WIDE_DIGITS = str.maketrans("0123456789", "０１２３４５６７８９")
CIRCLED_DIGITS = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
DOTS = "。．｡"  # each a full stop to IDNA


def numbers(address: str) -> Iterator[str]:
    """An IPv4 address as `inet_aton` takes it, and as people may read it."""
    value, (a, b, c, d) = int(IPv4Address(address)), address.split(".")
    yield address
    yield f"{address}."
    yield str(value)
    yield f"{value}."
    yield str(value + (1 << 32))
    yield hex(value)
    yield hex(value).upper()
    yield f"0{value:o}"
    yield ".".join(f"0x{int(part):02x}" for part in (a, b, c, d))
    yield ".".join(f"0{int(part):o}" for part in (a, b, c, d))
    yield ".".join(f"{int(part):03d}" for part in (a, b, c, d))
    yield ".".join(f"{int(part):08o}" for part in (a, b, c, d))
    yield f"{a}.{b}.{int(c) * 256 + int(d)}"
    yield f"{a}.{value & 0xFFFFFF}"
    yield f"0x{int(a):x}.{b}.0{int(c):o}.{d}"
    yield f"{a}.{b}.{c}.{int(d) + 256}"
    yield f"{a}.{b}.{c}.{d}.0"
    yield f"{a}..{b}.{c}.{d}"
    yield address.translate(WIDE_DIGITS)
    yield address.translate(CIRCLED_DIGITS)
    yield from (address.replace(".", dot) for dot in DOTS)
    yield address.replace(".", "%2e")
    yield "".join(f"%{ord(character):02x}" for character in address)


def carriers(address: str) -> Iterator[str]:
    """IPv6 addresses with an IPv4 address in them."""
    value = int(IPv4Address(address))
    high, low = f"{value >> 16:x}", f"{value & 0xFFFF:x}"
    yield f"::ffff:{address}"
    yield f"::ffff:{high}:{low}"
    yield f"0:0:0:0:0:ffff:{high}:{low}"
    yield f"::{high}:{low}"
    yield f"::{address}"
    yield f"::ffff:0:{high}:{low}"
    yield f"64:ff9b::{high}:{low}"
    yield f"64:ff9b:1::{high}:{low}"
    yield f"2002:{high}:{low}::1"
    yield f"2001::{value >> 16 ^ 0xFFFF:x}:{value & 0xFFFF ^ 0xFFFF:x}"
    yield f"2606:4700::5efe:{high}:{low}"
    yield f"fe80::200:5efe:{high}:{low}"


def by_number(port: int) -> Iterator[str]:
    for address in INNER:
        for host in numbers(address):
            yield f"http://{host}:{port}/"
    yield from (f"https://{host}:{port}/" for host in numbers("127.0.0.1"))
    yield from (f"http://{host}/" for host in numbers("127.0.0.1"))
    yield from (f"http://{number}:{port}/" for number in ("0", "0x0", "00", "0.0.0.0", "0x7f", ""))


def by_number_6(port: int) -> Iterator[str]:
    for address in INNER_6:
        yield f"http://[{address}]:{port}/"
    for address in INNER[:3]:
        yield from (f"http://[{host}]:{port}/" for host in carriers(address))
    yield f"http://[0:0:0:0:0:0:0:1]:{port}/"
    yield f"http://[::0001]:{port}/"
    yield f"http://::1:{port}/"
    yield f"http://[::1:{port}/"
    yield f"http://[::1]x:{port}/"
    yield from (f"http://[fe80::1%{zone}]:{port}/" for zone in ("lo", "25lo", "1", "251"))
    yield f"http://[::1%25lo]:{port}/"
    yield f"http://[v1.127.0.0.1]:{port}/"


def by_name(port: int) -> Iterator[str]:
    """Names, all of which lead here, and which only look like an allowed one."""
    yield from (
        f"http://{name}:{port}/"
        for name in (
            "localhost",
            "LOCALHOST",
            "localhost.",
            "localhost.localdomain",
            "ip6-localhost",
            "ⓛocalhost",
            "ｌｏｃａｌｈｏｓｔ",
            "evil.example",
            "127.0.0.1.nip.example",
            "media.example.com.evil.example",
            "media.example.com.evil.example.",
            "evilmedia.example.com",
            "x.media.example.com",
            "example.com",
            "cdn.example.com",  # allowed is what is below it
            "evilcdn.example.com",
            ".cdn.example.com",
            "*.cdn.example.com",
            "a..cdn.example.com",
            "-.cdn.example.com",
            "a.cdn.example.com..",
            "media。example。com.evil.example",
            "mediа.example.com",  # a Cyrillic letter
            "media\u200d.example.com",
            "media\u00ad.example.com",
            "metadata.google.internal",
            "xn--.cdn.example.com.evil.example",
            f"{'a' * 64}.cdn.example.com",
            f"{'a.' * 130}cdn.example.com",
        )
    )


def by_user(port: int) -> Iterator[str]:
    """Two hosts in one URL: which of them is it?"""
    good, bad = "media.example.com", f"127.0.0.1:{port}"
    yield from (
        f"http://{authority}/"
        for authority in (
            f"{good}@{bad}",
            f"{good}:80@{bad}",
            f"{bad}@{good}",
            f"user:password@{good}",
            f"@{bad}",
            f"@{good}",
            f":@{good}",
            f"{good}%40{bad}",
            f"{good}@{bad}@{good}",
            f"{good}\\@{bad}",
            f"{bad}\\@{good}",
            f"{bad}\\.{good}",
            f"{bad}#@{good}",
            f"{bad}%23@{good}",
            f"{bad}%2f@{good}",
            f"{good}#@{bad}",
            f"{good};@{bad}",
            f"{good},{bad}",
            f"{good}&@{bad}",
            f"{good} @{bad}",
            f"{good}\t@{bad}",
            f"{good}＠{bad}",
            f"{good}／.{bad}",
            f"{bad}？.{good}",
            f"{bad}＃.{good}",
            f"{bad}℀.{good}",
        )
    )
    yield f"http:\\\\{bad}\\"
    yield f"http:/\\{bad}/"
    yield f"http://{bad}\\{good}/"


def by_control(port: int) -> Iterator[str]:
    """Characters that some parsers leave out, some split at, and some send as they are."""
    good = "media.example.com"
    hidden = ("\r\n", "\n", "\r", "\t", "\0", " ", "\x0b", "\x0c", "\x1f", "\x7f", "\x85", "\u2028")
    for character in (*hidden, "\u200b", "\u202e", "\ufeff", "\ud800"):
        yield f"http://{good}{character}.evil.example:{port}/"
        yield f"http://{good}/x{character}Host: 127.0.0.1:{port}"
        yield f"{character}http://{good}:{port}/"
        yield f"ht{character}tp://127.0.0.1:{port}/"


def by_port(port: int) -> Iterator[str]:
    good = "media.example.com"
    others = (22, 25, 81, 6379, 8080, 65535, 0, 65536, 99999, 4295000000)
    yield from (f"http://{good}:{other}/" for other in others)
    yield from (f"https://{good}:{other}/" for other in (*others, 80, port))
    written = (
        f"0{port}",
        f"+{port}",
        f"-{port}",
        f"{port} ",
        f"{port}.0",
        hex(port),
        "",
        "80:80",
        "x",
    )
    yield from (f"http://{good}:{other}/" for other in written)
    yield f"http://{good}:{str(port).translate(WIDE_DIGITS)}/"
    yield f"http://{good}:{port}:80/"


def by_scheme(port: int) -> Iterator[str]:
    place = f"127.0.0.1:{port}"
    schemes = (
        "ftp",
        "ftps",
        "gopher",
        "dict",
        "ldap",
        "tftp",
        "ws",
        "wss",
        "jar:http",
        "view-source",
    )
    yield from (f"{scheme}://{place}/" for scheme in schemes)
    yield from (
        f"{scheme}://{place}/live" for scheme in ("rtsp", "rtmp", "udp", "tcp", "srt", "sftp")
    )
    yield from (
        f"concat:http://{place}/|http://{place}/",
        f"subfile,,start,0,end,9,,:http://{place}/",
        f"crypto+http://{place}/",
        f"hls+http://{place}/",
        "unix:/var/run/docker.sock",
        "javascript:alert(1)",
        "about:blank",
        "blob:http://127.0.0.1/x",
        f"//{place}/",
        f"/{place}/",
        f"{place}/",
        "",
        "http",
        "http:",
        "http://",
        "http:///x",
        f"http:{place}",
        f"http:/{place}",
        f"http:///{place}/",
        f"http//{place}",
        f"httpx://{place}/",
        f"https//{place}",
        "media.example.com",
    )


def by_file(allowed: str, secret: str) -> Iterator[str]:
    """Files outside of the folder that is allowed, by ways through it and around it."""
    up = "../" * 12
    yield from (
        f"file://{secret}",
        f"FILE://{secret}",
        f"file:{secret}",
        f"file:/{secret}",
        f"file:///{secret}",
        f"file://localhost{secret}",
        f"file://127.0.0.1{secret}",
        f"file://evil.example{secret}",
        f"file://{allowed}/../{secret.rpartition('/')[2]}",
        f"file://{allowed}/{up}{secret}",
        f"file://{allowed}/%2e%2e/{secret.rpartition('/')[2]}",
        f"file://{allowed}/..%2f{secret.rpartition('/')[2]}",
        f"file://{allowed}/%252e%252e/x",
        f"file://{allowed}\\..\\x",
        f"file://{allowed}",
        f"file://{allowed}/",
        f"file://{allowed}/.",
        f"file://{allowed}//good.bin",
        f"file://{allowed}/./good.bin",
        f"file://{allowed}/good.bin/",
        f"file://{allowed}/good.bin%00.mp4",
        f"file://{allowed}/good.bin?x",
        f"file://{allowed}/good.bin#t=1",
        f"file://{allowed}/%zz",
        f"file://{allowed}/%",
        f"file://{allowed}2/good.bin",
        f"file://{allowed}/link",
        f"file://{allowed}/folder_link/secret.bin",
        f"file://{allowed}/loop",
        f"file://{allowed}/pipe",
        f"file://{allowed}/folder",
        f"file://{allowed}/folder%2fgood.bin",
        f"file://{allowed}/folder%2Fgood.bin",
        f"file://{allowed}/missing",
        f"file://{allowed}/{'n' * 300}",
        "file:///dev/zero",
        "file:///dev/stdin",
        "file:///proc/self/environ",
        "file:///proc/self/fd/0",
        "file:///etc/passwd",
        "file://",
        "file:",
    )


def in_redirects(port: int) -> Iterator[str]:
    """What else a "Location" may say, beside all URLs above."""
    place = f"127.0.0.1:{port}"
    yield from (
        f"//{place}/",
        f"///{place}/",
        f"//{place}",
        f"\\\\{place}\\",
        f"/\\{place}/",
        "//media.example.com@evil.example/",
        "data:video/mp4;base64,AAAA",
        "file:///etc/passwd",
        "http:",
        "",
    )


def all_direct(port: int) -> Iterator[str]:
    """Everything that names a network, without what files are."""
    for kind in (by_number, by_number_6, by_name, by_user, by_control, by_port, by_scheme):
        yield from kind(port)
