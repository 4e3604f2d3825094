"""API keys as they are given, and kept from other processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from overproof.errors import InputError
from overproof.serve import api_keys
from overproof.serve.api_keys import hash_key
from overproof.serve.environment import api_key, hidden_api_key, key_in_shell, keys_uri
from overproof.serve.middleware import load_access

VARIABLES = ("OVERPROOF_API_KEY", "OVERPROOF_API_KEY_FILE", "OVERPROOF_KEYS")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_key_may_end_in_a_newline_and_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (api_key(), keys_uri(), load_access().needs_key) == (None, None, False)
    file = tmp_path / "key"
    file.write_bytes(b"of the file\r\n")
    monkeypatch.setenv("OVERPROOF_API_KEY_FILE", f"{file}\n")
    assert api_key() == "of the file"
    assert "$(cat" in key_in_shell()
    monkeypatch.setenv("OVERPROOF_API_KEY", "a-secret\n")
    assert api_key() == "a-secret"
    assert load_access().key_sha256 == hash_key("a-secret")
    keys = tmp_path / "keys.json"
    api_keys.add_key(str(keys), "team", None, None)
    monkeypatch.setenv("OVERPROOF_KEYS", f"{keys}\n")
    assert load_access().keys_uri == str(keys)


def test_a_file_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, content in (("none", None), ("empty", b"\n"), ("binary", b"\xff\xfe")):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        monkeypatch.setenv("OVERPROOF_API_KEY_FILE", str(file))
        with pytest.raises(InputError, match=f"OVERPROOF_API_KEY_FILE: {file}: .*expected a file that holds a key"):
            load_access()


def test_a_hidden_key_is_known_here_and_to_no_process_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPROOF_API_KEY", "a-secret\n")
    with hidden_api_key():
        assert api_key() == "a-secret"
        assert key_in_shell() == "$OVERPROOF_API_KEY"
        program = "import os; print([name for name, value in os.environ.items() if 'a-secret' in value])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
    assert os.environ["OVERPROOF_API_KEY"] == "a-secret\n"
    monkeypatch.delenv("OVERPROOF_API_KEY")
    with hidden_api_key():
        assert api_key() is None


def test_a_file_of_keys_is_its_users_alone_and_no_job_takes_it_along(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    before = os.umask(0)
    try:
        api_keys.add_key(str(file), "a", None, None)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)
        api_keys.revoke_key(str(file), "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    root = Path(__file__).parents[2]
    for ignored in (".rayignore", ".gitignore"):
        assert "keys.json" in [line.lstrip("/") for line in (root / ignored).read_text().splitlines()]
