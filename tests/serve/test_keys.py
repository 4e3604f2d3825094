"""API keys: what the file holds, who is let in, and how much each may ask."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from browser import open_page
from overproof.cli.main import main
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.serve import api_keys
from overproof.serve.api_keys import ApiKey, KeyStore, KeysUnavailable, RateLimiter, hash_key
from overproof.serve.middleware import Access, Telemetry, load_access
from overproof.serve.routes import build_app
from single_model import listening, one

IMAGE = {"images": [[0.0] * 64]}


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def limited(requests: int | None = None, tokens: int | None = None) -> ApiKey:
    return ApiKey(name="team", sha256="0", created="", requests_per_minute=requests, tokens_per_minute=tokens)


def test_the_file_never_holds_a_key(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "keys.json"
    made = [api_keys.add_key(str(file), name, None, None) for name in ("a", "b")]
    assert len(set(made)) == 2
    assert all(len(key) > 40 and key not in file.read_text() for key in made)
    assert [key.sha256 for key in api_keys.read_keys(str(file)).keys] == [hash_key(key) for key in made]


def test_keys_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    adders = [threading.Thread(target=api_keys.add_key, args=(file, f"n{i}", None, None)) for i in range(16)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert len(api_keys.read_keys(file).keys) == 16


def test_keys_lie_behind_a_uri_too(s3_uri: str) -> None:
    from overproof.files import join_uri

    uri = join_uri(s3_uri, "keys.json")
    key = api_keys.add_key(uri, "a", 5, None)
    assert KeyStore(uri).find(hash_key(key)) == api_keys.read_keys(uri).keys[0]


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
    api_keys.add_key(str(file), "a", None, None)
    before = file.read_text()
    assert main(["keys", *words, "--file", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == before


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    assert main(["keys", "add", "team", "--file", file, "--requests-per-minute", "60"]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyStore(file).find(hash_key(key))
    assert main(["keys", "ls", "--file", file]) == 0
    listed = capsys.readouterr().out
    assert "team" in listed
    assert "60 requests a minute" in listed
    assert main(["keys", "revoke", "team", "--file", file]) == 0
    assert KeyStore(file).find(hash_key(key)) is None


def test_a_broken_or_empty_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv("OVERPROOF_KEYS", str(file))
    with pytest.raises(InputError, match="is not there, or holds no key"):
        load_access()
    file.write_text('{"keys": [{"name": "a"}]}')
    with pytest.raises(InputError, match=r"keys\.0\.sha256"):
        load_access()


def test_a_change_of_the_file_is_seen_within_seconds(tmp_path: Path) -> None:
    file, clock = str(tmp_path / "keys.json"), Clock()
    found, key = KeyStore(file, clock), api_keys.add_key(file, "a", None, None)
    assert found.find(hash_key(key))
    api_keys.revoke_key(file, "a")
    assert found.find(hash_key(key))
    clock.s = api_keys.REFRESH_S + 0.1
    assert found.find(hash_key(key)) is None


def test_a_file_that_is_gone_for_a_moment_changes_nothing(tmp_path: Path) -> None:
    """Valid keys stay valid, and where none were ever read the server says that it cannot know."""
    file, now_s = tmp_path / "keys.json", [0.0]
    key = api_keys.add_key(str(file), "a", None, None)
    store = KeyStore(str(file), lambda: now_s[0])
    assert store.find(hash_key(key))
    content = file.read_bytes()
    for broken in (None, b"", b"{", b'{"format": 2}'):
        file.unlink()
        if broken is not None:
            file.write_bytes(broken)
        now_s[0] += 10
        assert store.find(hash_key(key))
        assert store.find(hash_key("another")) is None
        with pytest.raises(KeysUnavailable):
            KeyStore(str(file)).find(hash_key(key))
        file.write_bytes(content)
    api_keys.revoke_key(str(file), "a")
    now_s[0] += 10
    assert store.find(hash_key(key)) is None


def test_requests_fill_up_evenly() -> None:
    clock = Clock()
    limiter, key = RateLimiter(clock), limited(requests=6)
    assert [limiter.admit(key) for _ in range(6)] == [0] * 6
    assert limiter.admit(key) == pytest.approx(10)
    assert limiter.admit(key) == pytest.approx(10)  # being refused costs nothing
    clock.s = 10.01
    assert limiter.admit(key) == 0
    assert limiter.admit(key) > 9
    clock.s = 1000
    assert [limiter.admit(key) for _ in range(7)][:6] == [0] * 6  # not more than a minute's


def test_tokens_are_paid_for_when_they_are_counted() -> None:
    clock = Clock()
    limiter, key = RateLimiter(clock), limited(tokens=60)
    assert limiter.admit(key) == 0
    limiter.charge(key, 90)
    assert limiter.admit(key) == pytest.approx(30)
    clock.s = 30
    assert limiter.admit(key) == 0
    other = key.model_copy(update={"name": "other"})
    limiter.charge(key, 60)
    assert limiter.admit(other) == 0


def test_servers_that_tell_each_other_hold_a_key_to_its_limit_together() -> None:
    clock = Clock()
    one, two = RateLimiter(clock), RateLimiter(clock)
    key = limited(requests=6, tokens=60)
    assert [one.admit(key) for _ in range(4)] == [0] * 4
    two.charge_elsewhere(one.take_spent())  # which has not seen the key yet
    assert [two.admit(key) for _ in range(3)] == [0, 0, pytest.approx(10)]
    one.charge_elsewhere(two.take_spent())
    assert one.take_spent() == two.take_spent() == {}  # what is told is not told back
    assert one.admit(key) == pytest.approx(10)
    two.charge(key, 90)
    one.charge_elsewhere(two.take_spent())
    assert one.admit(key) == two.admit(key) == pytest.approx(30)


def test_requests_are_let_in_by_any_key_and_refused_beyond_its_limit(digits_package: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    free, few = api_keys.add_key(file, "free", None, None), api_keys.add_key(file, "few", 2, None)
    registry = one(digits_package, OnnxRuntime(digits_package / "model.onnx"))
    app = build_app(registry, Access(hash_key("own"), file), Telemetry(RateLimiter(lambda: 0.0)))

    def ask(key: str, method: str = "POST", path: str = "/v1/classify") -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
                headers: Any = {"Authorization": f"Bearer {key}"}
                return await http.request(method, path, json=IMAGE, headers=headers)

        return asyncio.run(send())

    assert [ask(key).status_code for key in ("own", free, few, few, free, "op-wrong", "")] == [200] * 5 + [401] * 2
    operator, page = api_keys.add_key(file, "operator", 1, None, operator=True), {"method": "GET", "path": "/metrics"}
    time.sleep(api_keys.REFRESH_S + 0.1)
    assert [ask(key, **page).status_code for key in ("own", operator, operator, free)] == [200, 200, 200, 403]
    assert ask(operator).status_code == 200  # metrics counted against no limit
    refused = ask(few)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "30"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_person_authorizes_in_the_docs_and_tries_a_request(digits_package: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    key = api_keys.add_key(file, "team", None, None)
    registry = one(digits_package, OnnxRuntime(digits_package / "model.onnx"))
    with (
        listening(build_app(registry, Access(None, file))) as base,
        open_page(f"{base}/docs", tmp_path / "profile") as (page, heard),
    ):
        page.locator('[data-path="/v1/models"]').first.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        page.get_by_text("authentication_error").first.wait_for()
        page.get_by_role("button", name="Authorize", exact=True).click()
        page.locator(".auth-container input").fill(key)
        page.locator(".auth-container").get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Execute").click()
        page.get_by_text('"object": "list"').first.wait_for()
    assert all(url.startswith((base, "data:", "blob:")) for url in heard.requests)
    open_app = build_app(registry, Access())
    assert "securitySchemes" not in open_app.openapi()["components"]
