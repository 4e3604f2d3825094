"""API keys: what the file holds, who is let in, and how much each may ask."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from alone import one
from overproof.cli import main
from overproof.errors import InputError
from overproof.recipe import Serve
from overproof.serve import keys, run
from overproof.serve.beside import Beside
from overproof.serve.engines.onnx import OnnxClassifier
from overproof.serve.http import build_http
from overproof.serve.keys import Key, Keys, Meter, digest
from overproof.serve.limits import Access, access

IMAGE = {"images": [[0.0] * 64]}


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def limited(requests: int | None = None, tokens: int | None = None) -> Key:
    return Key(name="team", sha256="0", created="", requests_per_minute=requests, tokens_per_minute=tokens)


def test_the_file_never_holds_a_key(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "keys.json"
    made = [keys.add(str(file), name, None, None) for name in ("a", "b")]
    assert len(set(made)) == 2
    assert all(len(key) > 40 and key not in file.read_text() for key in made)
    assert [key.sha256 for key in keys.read(str(file)).keys] == [digest(key) for key in made]


def test_keys_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    adders = [threading.Thread(target=keys.add, args=(file, f"n{i}", None, None)) for i in range(16)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert len(keys.read(file).keys) == 16


def test_keys_lie_behind_a_uri_too(s3_uri: str) -> None:
    from overproof.files import join

    uri = join(s3_uri, "keys.json")
    key = keys.add(uri, "a", 5, None)
    assert Keys(uri).find(digest(key)) == keys.read(uri).keys[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add"], "found name None"),
        (["ls", "a"], "found name 'a'"),
        (["add", "a"], "has a key 'a'"),
        (["add", "../a"], "name: found '../a'"),
        (["add", "b", "--tokens-per-minute", "0"], "tokens_per_minute: found 0"),
        (["revoke", "b"], "no key 'b'; found a"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    file = tmp_path / "keys.json"
    keys.add(str(file), "a", None, None)
    before = file.read_text()
    assert main(["keys", *words, "--file", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == before


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    assert main(["keys", "add", "team", "--file", file, "--requests-per-minute", "60"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys(file).find(digest(key))
    assert main(["keys", "ls", "--file", file]) == 0
    listed = capsys.readouterr().out
    assert "team" in listed
    assert "60 requests a minute" in listed
    assert main(["keys", "revoke", "team", "--file", file]) == 0
    assert Keys(file).find(digest(key)) is None


def test_a_broken_or_empty_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv("OVERPROOF_KEYS", str(file))
    with pytest.raises(InputError, match="holds no key"):
        access()
    file.write_text('{"keys": [{"name": "a"}]}')
    with pytest.raises(InputError, match=r"keys\.0\.sha256"):
        access()


def test_a_change_of_the_file_is_seen_within_seconds(tmp_path: Path) -> None:
    file, clock = str(tmp_path / "keys.json"), Clock()
    found, key = Keys(file, clock), keys.add(file, "a", None, None)
    assert found.find(digest(key))
    keys.revoke(file, "a")
    assert found.find(digest(key))
    clock.s = keys.READ_AGAIN_S + 0.1
    assert found.find(digest(key)) is None


def test_requests_fill_up_evenly() -> None:
    clock = Clock()
    meter, key = Meter(clock), limited(requests=6)
    assert [meter.admit(key) for _ in range(6)] == [0] * 6
    assert meter.admit(key) == pytest.approx(10)
    assert meter.admit(key) == pytest.approx(10)  # being refused costs nothing
    clock.s = 10.01
    assert meter.admit(key) == 0
    assert meter.admit(key) > 9
    clock.s = 1000
    assert [meter.admit(key) for _ in range(7)][:6] == [0] * 6  # not more than a minute's


def test_tokens_are_paid_for_when_they_are_counted() -> None:
    clock = Clock()
    meter, key = Meter(clock), limited(tokens=60)
    assert meter.admit(key) == 0
    meter.charge(key, 90)
    assert meter.admit(key) == pytest.approx(30)
    clock.s = 30
    assert meter.admit(key) == 0
    other = key.model_copy(update={"name": "other"})
    meter.charge(key, 60)
    assert meter.admit(other) == 0


def test_requests_are_let_in_by_any_key_and_refused_beyond_its_limit(digits_package: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    free, few = keys.add(file, "free", None, None), keys.add(file, "few", 2, None)
    house = one(digits_package, OnnxClassifier(digits_package / "model.onnx"))
    app = build_http(house, Access(digest("own"), file), Beside(Meter(lambda: 0.0)))

    def ask(key: str) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
                headers: Any = {"Authorization": f"Bearer {key}"}
                return await http.post("/v1/classify", json=IMAGE, headers=headers)

        return asyncio.run(send())

    assert [ask(key).status_code for key in ("own", free, few, few, free, "op-wrong", "")] == [200] * 5 + [401] * 2
    refused = ask(few)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "30"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a fresh one for this machine, and of its key."""
    secret, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    here, now = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    signed = builder.add_extension(here, critical=False).sign(secret, hashes.SHA256())
    chain, key = folder / "certificate.pem", folder / "key.pem"
    chain.write_bytes(signed.public_bytes(Encoding.PEM))
    key.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(chain), str(key)


def test_replicas_share_one_count_and_answer_over_tls(
    ray_cluster: str, digits_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, (chain, secret) = str(tmp_path / "keys.json"), certificate(tmp_path)
    key = keys.add(file, "team", 12, None)
    monkeypatch.setenv("OVERPROOF_KEYS", file)
    base = run.start(
        digits_package,
        Serve(port=0, min_replicas=2, cpus_per_replica=0.2, tls_certificate=chain, tls_key=secret),
    )
    try:
        assert base.startswith("https://")
        with httpx.Client(base_url=base, verify=ssl.create_default_context(cafile=chain)) as client:
            headers = {"Authorization": f"Bearer {key}"}
            found = [client.post("/v1/classify", json=IMAGE, headers=headers).status_code for _ in range(15)]
            assert found[:12] == [200] * 12
            assert 429 in found[12:]
            assert client.get("/docs").status_code == 200
            assert client.get("/v1/models").status_code == 401
            keys.revoke(file, "team")
            time.sleep(keys.READ_AGAIN_S + 0.5)
            assert {client.get("/v1/models", headers=headers).status_code for _ in range(6)} == {401}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{base}/healthz")  # a certificate that nobody vouches for
    finally:
        run.stop()


def test_a_certificate_that_cannot_be_used_is_refused(digits_package: Path, tmp_path: Path) -> None:
    chain, secret = certificate(tmp_path)
    for files in ({"tls_certificate": chain, "tls_key": chain}, {"tls_certificate": "/none", "tls_key": secret}):
        with pytest.raises(InputError, match="expected a pair in PEM"):
            run.start(digits_package, Serve(port=0, **files))
    with pytest.raises(InputError, match="belong together"):
        Serve.parse({"tls_key": secret}, "serve")
