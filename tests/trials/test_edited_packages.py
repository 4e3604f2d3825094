"""A thousand packages with one edit each, of every kind there is: which are refused, with a signature and without.

The edits follow from a seed (``OVERPROOF_EDITS_SEED``). An edit of package.json or of the signature itself can only be
told from the original by a signature; every other must be refused without one, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overproof.errors import InputError
from overproof.package.package import load_package
from overproof.package.signature import SigningKey, make_key_pair, read_signing_key, sign_files
from overproof.package.trust import ANYONE, TrustPolicy
from packing import make_package

pytestmark = pytest.mark.trial
EDITS = 1000
RECORD = "artifact.json"  # the store's; no part of the package, and not read

Edit = Callable[[random.Random, Path, Path], Any]  # with a folder of its own, and another package


def one_byte(name: str) -> Edit:
    def edit(rng: random.Random, folder: Path, _: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(content)

    return edit


def bytes_in_or_out(name: str) -> Edit:
    def edit(rng: random.Random, folder: Path, _: Path) -> None:
        content = (folder / name).read_bytes()
        at, count = rng.randrange(len(content)), rng.randrange(1, 100)
        more = rng.choice((content[:at], content[:at] + content[at + count :], content + rng.randbytes(count),
                           content[:at] + rng.randbytes(count) + content[at:], b""))  # fmt: skip
        (folder / name).write_bytes(more if more != content else content + b"\n")

    return edit


def values(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from values(child, (*at, key))


def one_value(name: str, below: tuple[str, ...] = ()) -> Edit:
    """A value of a JSON part is changed, doubled or taken away; with its hash in package.json put right."""

    def edit(rng: random.Random, folder: Path, _: Path) -> None:
        tree = json.loads((folder / name).read_text())
        before = json.dumps(tree)
        root = tree
        for key in below:
            root = root[key]
        while json.dumps(tree) == before:
            *parents, last = rng.choice(list(values(root)))
            node = root
            for key in parents:
                node = node[key]
            found = node[last]
            if rng.random() < 0.2:
                del node[last]
            elif isinstance(found, bool | None):
                node[last] = not found
            elif isinstance(found, int | float):
                node[last] = found * rng.choice((0, -1, 0.5, 1.01, 1000)) + rng.choice((0, 1))
            elif isinstance(found, str):
                node[last] = rng.choice((found[:-1], found + "x", found.upper(), f"./{found}", f"../{found}", ""))
            elif isinstance(found, list):
                node[last] = found[:-1] or [*found, 0]
            else:
                node[last] = dict(list(found.items())[:-1])
        (folder / name).write_text(json.dumps(tree))
        forge_hash(folder, name)

    return edit


def forge_hash(folder: Path, name: str) -> None:
    """Let package.json say of a part what it is now."""
    listing = json.loads((folder / "package.json").read_text())
    if isinstance(listing.get("files"), dict) and name in listing["files"]:
        content = (folder / name).read_bytes()
        listing["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        (folder / "package.json").write_text(json.dumps(listing))


def another_model(rng: random.Random, folder: Path, other: Path) -> None:
    """Another package's model; sometimes with its hash put right in package.json, and in the report too."""
    report, before = folder / "report.json", hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    shutil.copyfile(other / "model.onnx", folder / "model.onnx")
    if rng.random() < 0.7:
        forge_hash(folder, "model.onnx")
    if rng.random() < 0.5:
        now = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
        report.write_text(report.read_text().replace(before, now))
        forge_hash(folder, "report.json")


def other_parts(rng: random.Random, folder: Path, other: Path) -> None:
    """Some parts of another signed package."""
    mine = {path.name: path.read_bytes() for path in folder.iterdir()}
    differ = [path.name for path in other.iterdir() if path.name != RECORD and mine.get(path.name) != path.read_bytes()]
    for name in rng.sample(differ, rng.randrange(1, len(differ))):
        shutil.copyfile(other / name, folder / name)


def link(rng: random.Random, folder: Path, other: Path) -> None:
    """A link in place of a part, to the same bytes or others, or beside them."""
    name = rng.choice([path.name for path in folder.iterdir()])
    kept = folder.with_name("kept")
    match rng.randrange(4):
        case 0:
            (folder / name).rename(kept)
            (folder / name).symlink_to(kept)
        case 1:
            (folder / name).unlink()
            (folder / name).symlink_to(other / name if (other / name).exists() else "/etc/hostname")
        case 2:
            (folder / "more.json").symlink_to(rng.choice((name, "/etc/passwd", "nothing", "..", str(folder))))
        case _:
            (folder / name).rename(folder / f"{name}.kept")
            (folder / name).symlink_to(f"{name}.kept")


def more_files(rng: random.Random, folder: Path, _: Path) -> None:
    """A file, folder or pipe that is not listed."""
    name = rng.choice(("more.bin", ".hidden", "Model.onnx", "model.onnx ", "MODEL.ONNX", "tokenizer.json", "a.pkl",
                       "model.onnx.data", "._model.onnx", "report.json.part", "é.json", "package.sig.bak"))  # fmt: skip
    made = folder / name
    if made.exists():
        made = folder / "more.bin"
    match rng.randrange(5):
        case 0:
            made.mkdir()
        case 1:
            os.mkfifo(made)
        case 2:
            made.mkdir()
            shutil.copyfile(folder / "model.onnx", made / "model.onnx")
        case _:
            made.write_bytes(rng.randbytes(rng.randrange(100)))


def fewer_files(rng: random.Random, folder: Path, _: Path) -> None:
    rng.choice([path for path in folder.iterdir() if path.name not in (RECORD, "package.sig")]).unlink()


def renamed(rng: random.Random, folder: Path, _: Path) -> None:
    """A name in another case, or two names exchanged."""
    parts = [path for path in folder.iterdir() if path.name not in (RECORD, "package.sig")]
    one, two = rng.sample(parts, 2)
    if rng.random() < 0.5:
        one.rename(folder / (one.name.upper() if one.name.upper() != one.name else one.name.lower()))
    else:
        one.rename(folder / "moving")
        two.rename(one)
        (folder / "moving").rename(two)


def listed_paths(rng: random.Random, folder: Path, _: Path) -> None:
    """A name in the listing becomes a path, or one that differs in case, or is listed twice."""
    listing = json.loads((folder / "package.json").read_text())
    name = rng.choice(list(listing["files"]))
    entry = listing["files"].pop(name) if rng.random() < 0.5 else listing["files"][name]
    path = rng.choice(("./{}", "../{}", "x/../{}", "/{}", "{}/", "{} ", "{}\u0000", ".\\{}")).format(name)
    listing["files"][rng.choice((path, name.upper() if name.upper() != name else name.lower()))] = entry
    (folder / "package.json").write_text(json.dumps(listing))


def another_signature(rng: random.Random, folder: Path, other: Path) -> None:
    """None, another package's, or one by a key that nobody trusts, in its own name or that of the trusted key."""
    target = folder / "package.sig"
    match rng.randrange(4):
        case 0:
            target.unlink()
        case 1:
            shutil.copyfile(other / "package.sig", target)
        case turn:
            hint = json.loads(target.read_bytes())["verificationMaterial"]
            names = [path for path in folder.iterdir() if path.name not in (RECORD, "package.sig")]
            files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
            made = json.loads(sign_files("digits/package", files, fresh_key()))
            if turn == 2:
                made["verificationMaterial"] = hint
            target.write_text(json.dumps(made, separators=(",", ":")))


def fresh_key() -> SigningKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return SigningKey(ec.generate_private_key(ec.SECP256R1()))


# What is edited -> how, and whether it must be refused without a signature as well.
KINDS: dict[str, tuple[Edit, bool]] = {
    "model, a bit": (one_byte("model.onnx"), True),
    "model, bytes more or fewer": (bytes_in_or_out("model.onnx"), True),
    "model, another's, hashes put right": (another_model, False),
    "report, a bit": (one_byte("report.json"), True),
    "report, a value, hash put right": (one_value("report.json"), False),
    "verdict, a bit": (one_byte("verdict.json"), True),
    "verdict, a value, hash put right": (one_value("verdict.json"), False),
    "policy, a value": (one_value("package.json", ("policy",)), False),
    "card, a bit": (one_byte("README.md"), True),
    "card, bytes more or fewer": (bytes_in_or_out("README.md"), True),
    "tokenizer, a bit": (one_byte("tokenizer.json"), True),
    "tokenizer, a value, hash put right": (one_value("tokenizer.json"), True),
    "listing, a bit": (one_byte("package.json"), False),
    "listing, a value": (one_value("package.json"), False),
    "listing, paths and case": (listed_paths, True),
    "signature, a bit": (one_byte("package.sig"), False),
    "signature, bytes more or fewer": (bytes_in_or_out("package.sig"), False),
    "signature, none or another": (another_signature, False),
    "links": (link, True),
    "further files": (more_files, True),
    "fewer files": (fewer_files, True),
    "names": (renamed, True),
    "parts of another package": (other_parts, False),
}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "team.key"
    make_key_pair(file)
    return file


def signed_package(store: Path, key_file: Path, *overrides: str) -> Path:
    """With a tokenizer beside it, listed and measured with, as texts have."""
    folder = make_package("digits", store, *overrides)
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"of": store.name}))
    listing = json.loads((folder / "package.json").read_text())
    listing["files"]["tokenizer.json"] = {}
    (folder / "package.json").write_text(json.dumps(listing))
    forge_hash(folder, "tokenizer.json")
    report = json.loads((folder / "report.json").read_text())
    report["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "report.json").write_text(json.dumps(report))
    forge_hash(folder, "report.json")
    parts = [path for path in folder.iterdir() if path.name not in (RECORD, "package.sig")]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}
    (folder / "package.sig").write_bytes(sign_files("digits/package", files, read_signing_key(key_file)))
    return folder


def test_a_thousand_edits_of_a_package(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    package = signed_package(tmp_path / "one", key_file)
    other = signed_package(tmp_path / "two", key_file, "seed=1")
    public = read_signing_key(key_file).public
    trust = TrustPolicy({public.id: public})
    assert load_package(str(package), trust).signed_by == load_package(str(other), trust).signed_by == public.id
    seed = int(os.environ.get("OVERPROOF_EDITS_SEED", "0"))
    made, with_signature, without = Counter[str](), Counter[str](), Counter[str]()
    wrong: list[str] = []
    for number in range(EDITS):
        rng, kind = random.Random(f"{seed} {number}"), list(KINDS)[number % len(KINDS)]
        edit, always = KINDS[kind]
        folder = tmp_path / "edited/package"
        shutil.copytree(package, folder)
        edit(rng, folder, other)
        made[kind] += 1
        for policy, refused, must in ((trust, with_signature, True), (ANYONE, without, always)):
            try:
                load_package(str(folder), policy)
            except InputError:
                refused[kind] += 1
            else:
                if must:
                    wrong.append(f"{kind}, edit {number}, {'signed' if policy is trust else 'unsigned'}")
        shutil.rmtree(folder.parent)
    assert load_package(str(package), trust).signed_by
    with capsys.disabled():
        print(f"\n\n{'edited':<36}{'edits':>6}{'refused, signed':>17}{'refused, unsigned':>19}")
        for kind, (_, always) in KINDS.items():
            note = "" if always else "  (needs a signature)"
            print(f"{kind:<36}{made[kind]:>6}{with_signature[kind]:>17}{without[kind]:>19}{note}")
        print(f"{'in all':<36}{made.total():>6}{with_signature.total():>17}{without.total():>19}")
    assert wrong == []
    assert with_signature.total() == EDITS
