"""Addresses and TLS: what a server listens on, and how its clients reach and verify it."""

from __future__ import annotations

import socket
import ssl

from overproof.config import Serve
from overproof.errors import InputError

BACKLOG = 2048  # connections that wait to be accepted


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: it is taken.
    """
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"serve: cannot listen at {host}:{port}: {error.strerror}; take another: --set serve.port=0 finds one"
            ) from None
        return int(probe.getsockname()[1])


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that shares its port, for a replaced gateway listens until its streams are done."""
    listening = socket.socket(_family(host))
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
    listening.bind((host, port))
    listening.listen(BACKLOG)
    listening.setblocking(False)
    return listening


def base_url(settings: Serve, node: str = "127.0.0.1") -> str:
    """The base URL at which a client reaches a server with these settings, which listens on this machine or a node."""
    host = node if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "https" if settings.tls_certificate else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def tls_context(settings: Serve) -> ssl.SSLContext | None:
    """What a server shows its clients; None where it speaks without TLS.

    Raises:
        OSError: the certificate or its key cannot be read.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    return context


def tls_trust(settings: Serve) -> ssl.SSLContext | bool:
    """What a client verifies: the server's own certificate, whoever has signed it and whatever host it names; True
    where there is none.

    Raises:
        InputError: the certificate or its key cannot be read.
    """
    if settings.tls_certificate is None:
        return True
    try:
        tls_context(settings)
        context = ssl.create_default_context(cafile=settings.tls_certificate)
    except OSError as error:  # an ssl.SSLError is one
        files, why = f"{settings.tls_certificate}, {settings.tls_key}", error.strerror or error
        raise InputError(f"serve.tls_certificate, serve.tls_key: {files}: {why}; expected a pair in PEM") from None
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # of a chain in the file its root is not
    return context


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
