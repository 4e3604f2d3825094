"""Addresses: what a server listens on, and where its clients find it."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from overproof.addresses import is_loopback
from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve.net import base_url, free_port, listening_socket, tls_trust


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
    hosts = ("localhost", "127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "192.0.2.7", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


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


Signer = tuple[x509.Name, ec.EllipticCurvePrivateKey]


def signed(name: str, by: Signer | None, is_ca: bool) -> tuple[bytes, Signer]:
    """A certificate in PEM, by itself where by nobody else, and who it is of."""
    secret = ec.generate_private_key(ec.SECP256R1())
    own, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    issuer, key = by or (own, secret)
    builder = x509.CertificateBuilder(issuer, own, secret.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = builder.add_extension(x509.BasicConstraints(is_ca, None), critical=True).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.PEM), (own, secret)


def shakes_hands(chain: Path, secret: Path) -> None:
    """A handshake in memory, of a server with this chain and a client that trusts what ours do."""
    trust = tls_trust(Serve(tls_certificate=str(chain), tls_key=str(secret)))
    assert isinstance(trust, ssl.SSLContext)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, secret)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trust.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() is not None


def test_clients_here_trust_a_chain_of_an_own_authority(tmp_path: Path) -> None:
    root, of_root = signed("root", None, True)
    middle, of_middle = signed("middle", of_root, True)
    leaf, (_, key) = signed("server", of_middle, False)
    other, _ = signed("other", of_root, False)
    secret = tmp_path / "key.pem"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for chain in (leaf, leaf + middle, leaf + middle + root):
        (tmp_path / "chain.pem").write_bytes(chain)
        shakes_hands(tmp_path / "chain.pem", secret)
    (tmp_path / "chain.pem").write_bytes(other + middle)
    with pytest.raises(InputError, match="expected a pair in PEM"):
        shakes_hands(tmp_path / "chain.pem", secret)
