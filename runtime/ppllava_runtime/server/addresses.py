"""Which IP addresses are anybody's, and which are of one's own network or of none."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

# From IANA's registries of special-purpose addresses. `is_global` of the standard library differs
# from release to release, so both must agree.
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's own services, for the machines in it
        *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

# Addresses that carry another one, which some network on the way may take out.
_CARRYING = [
    ipaddress.ip_network(text)
    for text in (
        "::/96",  # IPv4-compatible; also ::1 and ::, see below
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # translated (SIIT)
        *("64:ff9b::/96", "64:ff9b:1::/48"),  # NAT64
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
    )
]
_LOOPBACK = IPv6Address("::1")
# ISATAP: any network may be before it.
_ISATAP = (0x5EFE, 0x02005EFE)


def is_loopback(host: str) -> bool:
    """Whether a host can only be this machine: "localhost", or an address of the loopback."""
    try:
        return "%" not in host and ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or an address in another form than the usual one
        return host == "localhost"


def is_public(address: Address) -> bool:
    """Whether an address is somebody's in the public network, and can only be that."""
    if not address.is_global or address.is_multicast or address.is_reserved or carries(address):
        return False
    if any(address in network for network in _SPECIAL):
        return False
    return address.version == 4 or address in _GLOBAL_UNICAST


def is_unicast(address: Address, *, by_name: bool) -> bool:
    """Whether an address may be dialled where private ones are allowed.

    Args:
        address: The address.
        by_name: Whether it was looked up. Link-local addresses, where clouds tell machines their
            secrets, must be asked for by themselves.
    """
    if address.is_multicast or address.is_unspecified or carries(address):
        return False
    if address.is_link_local:
        return address.version == 4 and not by_name
    return address.version == 6 or (
        address not in ipaddress.ip_network("0.0.0.0/8")
        and address not in ipaddress.ip_network("240.0.0.0/4")
    )


def carries(address: Address) -> bool:
    """Whether it is an IPv6 address that has another address in it."""
    if address.version == 4 or address == _LOOPBACK:
        return False
    middle = (int(address) >> 32) & 0xFFFFFFFF
    return middle in _ISATAP or any(address in network for network in _CARRYING)
