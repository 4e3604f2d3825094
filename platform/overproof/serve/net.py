"""Whether an address can be listened at: asked before a long run as well as before serving."""

from __future__ import annotations

import socket

from overproof.errors import InputError


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"serve: cannot listen at {host}:{port}: {error.strerror}; take another: --set serve.port=0 finds one"
            ) from None
        return int(probe.getsockname()[1])
