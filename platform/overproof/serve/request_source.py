"""Where a request comes from: the host that it names, the web page that sent it, and the client behind a proxy.

Without a key "this machine" may ask, and browsers and proxies run on it, too. A page of elsewhere reaches a server here
by its address, which its ``Origin`` gives away, or by a name of its own that resolves to it (DNS rebinding), which
``Host`` gives away (RFC 9110 section 7.2, RFC 6454 section 7).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Scope

from overproof.addresses import is_loopback, parse_address
from overproof.config import Serve

AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)\.?)(?::([0-9]{1,5}))?")
DEFAULT_PORTS = {"http": "80", "https": "443"}
WILDCARDS = ("0.0.0.0", "::")
ANY_ORIGIN = "*"
OPEN_PATHS = ("/healthz", "/readyz")  # that probes ask for, without a key
FORWARDED, FORWARDED_FOR = b"forwarded", b"x-forwarded-for"
# What proxies write: a request that has one of these was not sent by the process that connected.
PROXIED = (
    FORWARDED, FORWARDED_FOR, b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via", b"cf-connecting-ip",
    b"true-client-ip",
)  # fmt: skip
NODE = re.compile(r'for\s*=\s*("(?:[^"\\]|\\.)*"|[^";,\s]*)', re.IGNORECASE)


class SourceRefused(Exception):
    """A request that is not taken: the status of the refusal, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class SourcePolicy:
    """What requests may come from. ``hosts`` are names beside loopback's, ``proxies`` addresses or networks whose word
    of a client is taken, ``origins`` web pages that may ask.
    """

    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    restricts_hosts: bool = False  # where keys are needed, too

    @classmethod
    def of(cls, settings: Serve) -> SourcePolicy:
        """What a server with these settings takes."""
        own = () if settings.host in WILDCARDS else (_name(settings.host),)
        given = tuple(map(_name, settings.hosts))
        return cls((*own, *given), settings.proxies, settings.origins, bool(given))

    def client(self, scope: Scope) -> str | None:
        """The address of the client: the peer, or whom a configured proxy names; None where it cannot be known.

        Raises:
            SourceRefused: the headers of a configured proxy contradict each other.
        """
        peer: str | None = scope["client"][0] if scope["client"] else None
        if peer is None or not self._is_proxy(peer):
            return peer
        given = {name: values for name in (FORWARDED, FORWARDED_FOR) if (values := _values(scope, name))}
        found = {self._client_of(values, name) for name, values in given.items()}
        if not found:
            return peer
        if len(found) > 1:
            raise SourceRefused(400, "the headers Forwarded and X-Forwarded-For name two clients; expected one of them")
        return found.pop()

    def check(self, scope: Scope, needs_key: bool) -> None:
        """Look at the headers that say where a request comes from.

        Raises:
            SourceRefused: it is malformed; or anybody could have sent it, while no key is asked for.
        """
        authority = self._authority(scope, needs_key)
        if not needs_key:
            self._check_origin(scope, authority)
            self._check_proxied(scope)

    def _authority(self, scope: Scope, needs_key: bool) -> str:
        """The header Host, whose name must be one of this server's."""
        given = _values(scope, b"host")
        if not given and needs_key and scope.get("http_version") == "1.0":
            return ""
        parsed = parse_authority(given[0]) if len(given) == 1 else None
        if parsed is None:
            raise SourceRefused(400, f"expected one header Host with a name or an address; found {given or 'none'}")
        host, _ = parsed
        if needs_key and (not self.restricts_hosts or scope["path"] in OPEN_PATHS):  # which are asked for by address
            return given[0]
        if not is_loopback(host) and host not in self.hosts:
            raise SourceRefused(403, f"host {host!r} is no name of this server; the operator can add it to serve.hosts")
        return given[0]

    def _check_origin(self, scope: Scope, authority: str) -> None:
        """A page that this server itself sent, or one of a configured origin, may ask."""
        for origin in _values(scope, b"origin"):
            scheme, _, of_page = origin.partition("://")
            port = DEFAULT_PORTS.get(scheme)
            is_own = port is not None and parse_authority(of_page, port) == parse_authority(authority, port)
            if not is_own and not self.allows(origin):
                raise SourceRefused(
                    403, f"pages of {origin} may not ask here without an API key; the operator can add serve.origins"
                )

    def _check_proxied(self, scope: Scope) -> None:
        found = [name.decode() for name in PROXIED if _values(scope, name)]
        peer = scope["client"][0] if scope["client"] else ""
        if found and not self._is_proxy(peer):
            raise SourceRefused(
                403,
                f"the request came through a proxy ({found[0]}), and without an API key only this machine may ask; set "
                "a key where Serve starts, or name the proxy in serve.proxies",
            )

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may ask."""
        return ANY_ORIGIN in self.origins or origin in self.origins

    def _is_proxy(self, address: str) -> bool:
        found = parse_address(address)
        return found is not None and any(found in ipaddress.ip_network(each, strict=False) for each in self.proxies)

    def _client_of(self, values: Sequence[str], name: bytes) -> str | None:
        """The last address that no proxy of ours has, which is the last that one of them saw."""
        nodes = NODE.findall(",".join(values)) if name == FORWARDED else ",".join(values).split(",")
        address: str | None = None
        for node in reversed(nodes):
            found = parse_address(_without_port(node.strip().strip('"')))
            address = None if found is None else str(found)
            if address is None or not self._is_proxy(address):
                return address
        return address


def parse_authority(text: str, default_port: str | None = None) -> tuple[str, str | None] | None:
    """Host, in lower case and without brackets, and port of a header Host; None where it is malformed."""
    found = AUTHORITY.fullmatch(text)
    if found is None or int(found[3] or 0) > 65535:
        return None
    if found[1] is None:
        return found[2].lower(), found[3] or default_port
    address = parse_address(found[1])
    return None if address is None else (str(address), found[3] or default_port)


def _name(host: str) -> str:
    """As ``parse_authority`` gives it."""
    address = parse_address(host)
    return host.lower() if address is None else str(address)


def _without_port(node: str) -> str:
    """Of ``192.0.2.1:80``, ``[2001:db8::1]:80`` or an address alone."""
    if node.startswith("["):
        return node[1:].partition("]")[0]
    return node.partition(":")[0] if node.count(":") == 1 else node


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for each, value in scope["headers"] if each == name]
