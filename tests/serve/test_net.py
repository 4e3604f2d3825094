"""Addresses: what a server listens on, and where its clients find it."""

from __future__ import annotations

import pytest

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve.net import base_url, free_port, is_loopback, listening_socket


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "127.0.0.1"),
        ("::1", "[::1]"),
        ("example.org", "example.org"),
    ],
)
def test_a_base_url_is_one_that_this_machine_reaches(host: str, url: str) -> None:
    assert base_url(Serve(host=host, port=8001)) == f"http://{url}:8001"
    assert base_url(Serve(host=host, port=1, tls_certificate="c", tls_key="k")) == f"https://{url}:1"


def test_hosts_that_only_this_machine_reaches() -> None:
    hosts = ("localhost", "127.0.0.2", "::1", "0.0.0.0", "::", "192.0.2.7", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 3 + [False] * 4


def test_a_port_is_free_taken_or_shared_between_two_gateways() -> None:
    port = free_port("127.0.0.1", 0)
    assert port > 0
    with (
        listening_socket("127.0.0.1", port),
        listening_socket("127.0.0.1", port),  # of the gateway that replaces it
        pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port}: .*; take another"),
    ):
        free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
