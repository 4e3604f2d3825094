"""Addresses of machines, as text."""

from __future__ import annotations

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> IpAddress | None:
    """An address, None where it is none; one of IPv4 that is written as IPv6 is that of IPv4."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    address = parse_address(host)
    return host == "localhost" if address is None else address.is_loopback
