"""Signatures: what a trusted key vouches for, every way round it, and the format that others read."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pyarrow import fs

from overproof.cli.main import main
from overproof.config import Recipe, Serve, Trust
from overproof.errors import InputError
from overproof.files import filesystem, join_uri
from overproof.package import signature
from overproof.package.package import load_package, open_package
from overproof.package.signature import SigningKey, make_key_pair, read_signing_key, sign_files
from overproof.package.trust import TrustPolicy
from overproof.pipeline import STAGES
from overproof.serve.package_trust import read_trusted_keys, trust_policy
from packing import copy, edit, make_package, make_parents, make_recipe, pack

Spoil = Callable[[Path], Any]
BINARY, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "team.key"
    make_key_pair(file)
    return file


@pytest.fixture(scope="module")
def trust(key_file: Path) -> TrustPolicy:
    return trust_policy(Serve(trust=Trust(keys=f"{key_file}.pub")))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe("digits", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def signed(recipe: Recipe, key_file: Path) -> Path:
    """Packed where the environment names the key."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(signature.KEY_VARIABLE, str(key_file))
        return pack(recipe, make_parents(recipe)).local()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, key_file: Path) -> Path:
    """Another package, signed by the same key."""
    folder = make_package("digits", tmp_path_factory.mktemp("other"), "seed=1")
    assert main(["sign", str(folder), "--key", str(key_file)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_package_is_signed_where_it_is_made_and_verified_where_it_is_loaded(
    signed: Path, key_file: Path, trust: TrustPolicy
) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    (key_id,) = trust.keys
    package = load_package(str(signed), trust)
    assert package.signed_by == key_id == read_signing_key(key_file).public.id
    bundle = json.loads((signed / "package.sig").read_bytes())
    statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    named = [each["name"] for each in statement["predicate"]["resources"]]
    assert named == sorted(p.name for p in signed.iterdir() if p.name not in ("package.sig", "artifact.json"))
    assert "package.json" in named


def _append(file: Path, content: bytes = b"\0") -> None:
    file.write_bytes(file.read_bytes() + content)


def _bundle(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the signature's JSON."""
    file = folder / "package.sig"
    tree = json.loads(file.read_bytes())
    change(tree)
    file.write_text(json.dumps(tree, separators=(",", ":")))


def _payload(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change what is signed, under the same signature."""

    def changed(tree: Any) -> None:
        statement = json.loads(b64decode(tree["dsseEnvelope"]["payload"]))
        change(statement)
        tree["dsseEnvelope"]["payload"] = b64encode(json.dumps(statement).encode()).decode()

    _bundle(folder, changed)


def _sign_otherwise(folder: Path, **changes: Any) -> None:
    """As whoever has another key does."""
    listing = open_package(folder).listing
    files = {n: e.sha256 for n, e in listing.files.items() if n != "package.sig"} | changes
    (folder / "package.sig").write_bytes(sign_files("x", files, SigningKey(ec.generate_private_key(ec.SECP256R1()))))


REFUSALS: dict[str, tuple[Spoil, str]] = {
    "no signature": (lambda f: (f / "package.sig").unlink(), "is not signed, and serve.trust.keys asks"),
    "a signature that is no JSON": (lambda f: (f / "package.sig").write_bytes(b"{"), "package.sig: "),
    "every hash put right": (lambda f: edit(f / "report.json", lambda r: r.update(engine="vllm")),
        "signs other files than lie there: package.json, report.json differ"),
    "another policy": (
        lambda f: edit(f / "package.json", lambda c: c["policy"]["rules"].pop()), "files .* package.json differ"),
    "another verdict": (
        lambda f: edit(f / "verdict.json", lambda v: v["candidates"][0]["reasons"][0].update(text="good")),
        "signs other files"),
    "another hash in the statement": (
        lambda f: _payload(f, lambda s: s["predicate"]["resources"][0].update(digest="0" * 64)), "not made by key"),
    "fewer files in the statement": (
        lambda f: _payload(f, lambda s: s["predicate"]["resources"].pop()), "not made by key"),
    "the signature's last byte": (lambda f: _bundle(
        f, lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=b64encode(b"x" * 70).decode())), "not made by key"),
    "no signature in the envelope": (
        lambda f: _bundle(f, lambda b: b["dsseEnvelope"].update(signatures=[])), "package.sig: dsseEnvelope"),
    "two signatures in the envelope": (
        lambda f: _bundle(f, lambda b: b["dsseEnvelope"]["signatures"].append(b["dsseEnvelope"]["signatures"][0])),
        "package.sig: dsseEnvelope"),
    "another type of payload": (
        lambda f: _bundle(f, lambda b: b["dsseEnvelope"].update(payloadType="text/plain")), "package.sig: dsse"),
    "a white space": (lambda f: _append(f / "package.sig", b"\n"), "was changed after it was written"),
    "a key that nobody trusts": (lambda f: _sign_otherwise(f), "signed by key .*, which is not trusted; trusted: "),
    "a key that gives itself the name of another": (
        lambda f: (name := json.loads((f / "package.sig").read_bytes())["verificationMaterial"],
                      _sign_otherwise(f), _bundle(f, lambda b: b.update(verificationMaterial=name))),
        "not made by key"),
    "another file beside it": (lambda f: (f / "more").write_text(""), "more: not listed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_nobody_trusted_has_signed_is_refused(signed: Path, trust: TrustPolicy, tmp_path: Path, name: str) -> None:
    folder = copy(signed, tmp_path)
    spoil, message = REFUSALS[name]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_package(str(folder), trust)
    assert load_package(str(signed), trust).signed_by


@pytest.mark.parametrize("parts", [["package.sig"], ["package.json", "model.onnx", "report.json", "README.md"]])
def test_parts_of_another_signed_package_are_refused(
    signed: Path, other: Path, trust: TrustPolicy, tmp_path: Path, parts: list[str]
) -> None:
    folder = copy(signed, tmp_path)
    for part in parts:
        shutil.copyfile(other / part, folder / part)
    with pytest.raises(InputError, match="signs other files than lie there: "):
        load_package(str(folder), trust)
    assert load_package(str(other), trust).signed_by


def test_only_policies_that_are_listed_are_enough(
    signed: Path, trust: TrustPolicy, tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = open_package(signed).listing.policy_sha256
    listed = TrustPolicy(trust.keys, (policy,))
    assert load_package(str(signed), listed).signed_by
    easy = 'gate.rules=[{"kind": "parity", "at_most": 1}]'
    folder = make_package("digits", tmp_path / "easy", easy)
    (folder / "package.sig").unlink(missing_ok=True)
    assert main(["sign", str(folder), "--key", str(key_file)]) == 0
    assert load_package(str(folder), trust).signed_by
    with pytest.raises(
        InputError, match=r"passed by the policy [0-9a-f]{64}, which serve.trust.policies does not list"
    ):
        load_package(str(folder), listed)
    keys = ("--keys", f"{key_file}.pub")
    capsys.readouterr()
    assert main(["verify", str(signed), *keys, "--policy", policy]) == 0
    shown = capsys.readouterr().out
    assert f"signer   key {next(iter(trust.keys))}\npolicy   {policy}\nverdict  " in shown
    assert main(["verify", str(folder), *keys, "--policy", policy]) == 2
    assert main(["verify", str(folder), "--policy", policy]) == 2
    assert "policies without keys" in capsys.readouterr().err
    (folder / "package.sig").unlink()
    assert main(["verify", str(folder)]) == 0
    assert "signer   not signed" in capsys.readouterr().out


def test_a_package_in_a_bucket_is_signed_there(
    signed: Path, s3_uri: str, trust: TrustPolicy, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = join_uri(s3_uri, f"digits/{signed.name}")
    bucket, path = filesystem(uri)
    bucket.create_dir(path, recursive=True)
    fs.copy_files(str(signed), path, destination_filesystem=bucket)
    bucket.delete_file(f"{path}/package.sig")
    with pytest.raises(InputError, match="is not signed"):
        load_package(uri, trust)
    assert main(["sign", uri, "--key", str(key_file)]) == 0
    assert load_package(uri, trust).signed_by == read_signing_key(key_file).public.id
    assert main(["verify", uri, "--keys", f"{key_file}.pub"]) == 0
    bucket.create_dir(f"{path}/more")
    assert main(["verify", uri]) == 2
    assert "more: a folder; a package holds plain files alone" in capsys.readouterr().err


def test_a_package_follows_from_its_recipe_and_its_signer(
    recipe: Recipe, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = [stage for stage in STAGES if stage.name == "package"]
    assert stage.part(recipe) == {"name": "digits"}
    monkeypatch.setenv(signature.KEY_VARIABLE, str(key_file))
    assert stage.part(recipe) == {"name": "digits", "signer": read_signing_key(key_file).public.id}
    monkeypatch.setenv(signature.KEY_VARIABLE, f"{key_file}.gone")
    with pytest.raises(
        InputError, match=r"No such file or directory; expected a key that `overproof signing-key FILE`"
    ):
        stage.part(recipe)


def test_signing_refuses_what_it_should_not_sign(
    signed: Path, tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sign", str(signed), "--key", str(key_file)]) == 2
    assert "is there already" in capsys.readouterr().err
    folder = copy(signed, tmp_path)
    (folder / "package.sig").unlink()
    edit(folder / "verdict.json", lambda verdict: verdict.update(passed=False, chosen=None))
    assert main(["sign", str(folder), "--key", str(key_file)]) == 2
    assert "has no passing verdict" in capsys.readouterr().err
    assert not (folder / "package.sig").exists()


def test_a_private_key_that_others_may_read_or_that_lies_in_the_store_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("digits", tmp_path / "store")
    (tmp_path / "store").mkdir()
    for file, message in ((tmp_path / "store/team.key", "lies in the store"), (tmp_path / "team.key", "chmod 600")):
        make_key_pair(file)
        file.chmod(0o640)
        monkeypatch.setenv(signature.KEY_VARIABLE, str(file))
        with pytest.raises(InputError, match=message):
            signature.configured_signing_key(recipe.store)
    (tmp_path / "team.key").chmod(0o600)
    before = (tmp_path / "team.key").read_bytes()
    for taken in ("team.key", "team.key.pub"):
        with pytest.raises(InputError, match=r"is there already|File exists"):
            make_key_pair(tmp_path / "team.key")
        (tmp_path / taken).replace(tmp_path / f"moved-{taken}")
    assert (tmp_path / "moved-team.key").read_bytes() == before


def test_keys_are_read_from_a_file_or_folder_and_others_are_refused(tmp_path: Path, key_file: Path) -> None:
    public = Path(f"{key_file}.pub")
    (tmp_path / "keys").mkdir()

    def settings(keys: Path, **more: Any) -> Serve:
        return Serve(trust=Trust(keys=str(keys)), **more)

    with pytest.raises(InputError, match=r"no file there ends in \.pub or \.pem"):
        read_trusted_keys(settings(tmp_path / "keys"))
    shutil.copy(public, tmp_path / "keys")
    make_key_pair(tmp_path / "second.key")
    (tmp_path / "keys/both.pem").write_text(
        f"# of two\n{public.read_text()}\n{Path(tmp_path / 'second.key.pub').read_text()}"
    )
    assert len(trust_policy(settings(tmp_path / "keys")).keys) == 2
    resolved = read_trusted_keys(settings(tmp_path / "keys"))
    shutil.rmtree(tmp_path / "keys")
    assert len(trust_policy(resolved).keys) == 2  # every process has the keys themselves
    with pytest.raises(InputError, match=r"names no key, and 0\.0\.0\.0 can be reached"):
        trust_policy(Serve(host="0.0.0.0"))
    assert trust_policy(Serve()) == TrustPolicy()
    rsa_key = rsa.generate_private_key(65537, 2048)
    wrong = tmp_path / "wrong.pem"
    for content, message in (
        (b"no key", "no public key in PEM"),
        (key_file.read_bytes(), "no public key in PEM"),
        (
            rsa_key.public_key().public_bytes(BINARY, serialization.PublicFormat.SubjectPublicKeyInfo),
            "found RSAPublicKey",
        ),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key in PEM"),
    ):
        wrong.write_bytes(b"\n" + content)
        with pytest.raises(InputError, match=message):
            read_trusted_keys(settings(wrong))


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_the_format_is_that_of_openssf_model_signing(signed: Path, tmp_path: Path, curve: Any) -> None:
    """Each reads what the other has signed."""
    hashing = pytest.importorskip("model_signing.hashing", reason="of the extra dev")
    from model_signing import signing, verifying

    folder = copy(signed, tmp_path)
    ignored = hashing.Config().set_ignored_paths(
        paths=[folder / "package.sig", folder / "artifact.json"], ignore_git_paths=False
    )
    private = ec.generate_private_key(curve())
    key, files = SigningKey(private), (tmp_path / "a.key", tmp_path / "a.key.pub")
    files[0].write_bytes(private.private_bytes(BINARY, serialization.PrivateFormat.PKCS8, PLAIN))
    files[1].write_bytes(key.public.pem)

    def theirs() -> None:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=files[1]).set_hashing_config(ignored)
        verifier.verify(folder, folder / "package.sig")

    sha256 = {n: e.sha256 for n, e in open_package(folder).listing.files.items() if n != "package.sig"}
    (folder / "package.sig").write_bytes(sign_files("any/name", sha256, key))
    theirs()
    (folder / "package.sig").unlink()
    signer = signing.Config().use_elliptic_key_signer(private_key=files[0]).set_hashing_config(ignored)
    signer.sign(folder, folder / "package.sig")
    assert load_package(str(folder), TrustPolicy({key.public.id: key.public})).signed_by == key.public.id
    _append(folder / "README.md")
    with pytest.raises(ValueError, match=r"README\.md"):
        theirs()
