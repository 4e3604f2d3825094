"""Private copies: one of each content, of what was hashed, read-only, deleted when nobody uses them."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from overproof.config import Serve
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.package import private_copy
from overproof.package.contents import PackageFolder, read_listing
from overproof.package.package import Package, load_package, open_package, open_served_copy
from overproof.package.trust import ANYONE
from overproof.serve.controller import describe_version
from overproof.serve.deployments import Version
from packing import copy, edit, make_package


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("digits", tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they lie."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / f"tmp/overproof-{os.getuid()}/packages"


def load(folder: Path, **options: Any) -> Package:
    return load_package(str(folder), ANYONE, **options)


def other_version(packed: Path, folder: Path, name: str) -> Path:
    """The same files but for what package.json says."""
    (folder / name).mkdir(parents=True)
    made = copy(packed, folder / name)
    edit(made / "package.json", lambda content: content.update(id=f"digits/package-{name}"))
    return made


def kept(copies: Path) -> list[str]:
    return sorted(path.name for path in copies.iterdir() if path.name != "by-sha256")


def test_a_copy_is_what_was_hashed_and_nobody_may_write_to_it(packed: Path, tmp_path: Path, copies: Path) -> None:
    folder = copy(packed, tmp_path)
    package = load(folder)
    assert package.path == copies / package.listing.sha256
    assert package.listing == open_package(packed).listing
    assert {path.name for path in package.path.iterdir()} == set(package.listing.files)  # without the store's record
    assert stat.S_IMODE(package.path.stat().st_mode) == 0o500
    assert stat.S_IMODE(copies.stat().st_mode) == 0o700
    for name in package.listing.files:
        assert stat.S_IMODE((package.path / name).stat().st_mode) == 0o400
        assert (package.path / name).stat().st_ino != (folder / name).stat().st_ino
    before = package.model.read_bytes()
    os.truncate(folder / "model.onnx", 10)
    assert package.model.read_bytes() == before
    sha256 = package.listing.sha256
    assert load(folder, expected_sha256=sha256).path == package.path  # it was deployed, and lies here
    with pytest.raises(InputError, match=r"model\.onnx: has 10 bytes, package\.json says"):
        load(folder)


def test_every_content_is_there_once(packed: Path, tmp_path: Path, copies: Path) -> None:
    one, two = load(packed), load(other_version(packed, tmp_path, "two"))
    assert one.path != two.path
    for name in one.content.files:
        assert (one.path / name).samefile(two.path / name)
        assert (one.path / name).samefile(copies / "by-sha256" / one.content.files[name].sha256)


def test_what_is_read_while_it_is_copied_is_what_is_compared(
    packed: Path, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is changed between the listing and the copy is refused, and nothing of it stays."""
    folder = copy(packed, tmp_path)
    listing = read_listing(PackageFolder(folder))
    model = bytearray((folder / "model.onnx").read_bytes())
    model[-1] ^= 1
    (folder / "model.onnx").write_bytes(model)
    with pytest.raises(InputError, match=r"model\.onnx: sha256 is .* it was changed after it was packed"):
        private_copy.make_copy(PackageFolder(folder), listing)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(packed / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: cannot be read"):
        private_copy.make_copy(PackageFolder(folder), listing)
    assert kept(copies) == []
    assert listing.content.files["model.onnx"].sha256 not in {path.name for path in (copies / "by-sha256").iterdir()}


def test_a_package_that_was_replaced_after_it_was_deployed_is_refused(packed: Path, tmp_path: Path) -> None:
    deployed = open_package(packed).listing.sha256
    with pytest.raises(InputError, match="is not the package that was deployed from there"):
        load(other_version(packed, tmp_path, "two"), expected_sha256=deployed)


def test_a_copy_that_a_disk_has_spoiled_is_made_anew(packed: Path, tmp_path: Path) -> None:
    path = load(packed).path
    sha256, model = path.name, (path / "model.onnx").read_bytes()
    for spoil in (lambda file: file.write_bytes(b"x" * len(model)), lambda file: file.write_bytes(b"x")):
        (path / "model.onnx").chmod(0o600)
        spoil(path / "model.onnx")
        assert load(packed, expected_sha256=sha256).model.read_bytes() == model
    os.truncate(path / "model.onnx", 3)
    other = load(other_version(packed, tmp_path, "two"))  # which shares the content
    assert other.model.read_bytes() == model


def test_a_hash_that_is_a_path_reaches_nothing(packed: Path, tmp_path: Path, copies: Path) -> None:
    """Listings and deployments files come from elsewhere, and copies are named by the hashes in them."""
    (tmp_path / "own").mkdir()
    own = copy(packed, tmp_path / "own")
    load(packed)
    for path in (os.path.relpath(own, copies), str(own)):
        with pytest.raises(InputError, match="is not the package that was deployed from there"):
            load(packed, expected_sha256=path)
        with pytest.raises(InputError, match="is not the package that was deployed from there"):
            open_served_copy(str(packed), ANYONE, path)
        deployed = describe_version(str(packed), Serve()).model_dump()
        with pytest.raises(ValidationError, match="contents_sha256"):
            Version.model_validate(deployed | {"contents_sha256": path})
        folder = other_version(packed, tmp_path, f"listed-{len(path)}")
        victim = own / "README.md"
        inside = os.path.relpath(victim, copies / "by-sha256") if not path.startswith("/") else str(victim)
        edit(folder / "package.json", lambda c, to=inside: c["files"]["README.md"].update(sha256=to))  # type: ignore[misc]
        with pytest.raises(InputError, match="no sha256 in hex"):
            load(folder)
    assert open_package(own).listing == open_package(packed).listing


def test_copies_that_nobody_uses_are_deleted_but_the_last_few(packed: Path, tmp_path: Path, copies: Path) -> None:
    used = load(packed)
    names = []
    for number in range(private_copy.KEPT_UNUSED + 2):
        made = load(other_version(packed, tmp_path, str(number)))
        os.utime(made.path, (number, number))
        names.append(made.path.name)
        del made
    (copies / ".making-left").mkdir()
    (copies / ".making-left/model.onnx").write_bytes(b"half")
    os.utime(copies / ".making-left", (0, 0))
    private_copy.delete_unused()
    assert kept(copies) == sorted([used.path.name, *names[-private_copy.KEPT_UNUSED :]])
    private_copy.delete_unused(0)
    assert kept(copies) == [used.path.name]
    sha256 = used.listing.sha256
    held = open_served_copy(str(packed), ANYONE, sha256)
    del used
    private_copy.delete_unused(0)
    assert kept(copies) == [held.path.name]
    del held
    private_copy.delete_unused(0)
    assert kept(copies) == []
    assert list((copies / "by-sha256").iterdir()) == []
    assert open_served_copy(str(packed), ANYONE, sha256).path.name == sha256


def _load_in_turn(package: Path, temporary: str, answers: Any) -> None:
    import tempfile

    tempfile.tempdir = temporary
    loaded = load(package)
    answers.put((str(loaded.path), loaded.model.stat().st_ino))


def test_processes_that_need_the_same_copy_share_one(packed: Path, copies: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers = [fork.Process(target=_load_in_turn, args=(packed, str(tmp_path / "tmp"), answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert kept(copies) == [open_package(packed).listing.sha256]


def test_a_disk_without_room_is_said_and_a_link_in_place_of_the_folder_is_refused(
    packed: Path, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_copy, "SPARE_BYTES", 1 << 62)
    with pytest.raises(InputError, match=r"its private copy needs .* MB, and .* has .* MB; make room, or set TMPDIR"):
        load(packed)
    assert kept(copies) == []
    copies.parent.rename(tmp_path / "elsewhere")
    copies.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected a folder of your own"):
        load(packed)


def test_long_copies_tell_how_far_they_are(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_copy, "TELL_EVERY_S", 0.0)
    told: list[str] = []
    load(packed, say=told.append)
    listing = open_package(packed).listing
    total = sum(entry.size_bytes for entry in listing.content.files.values()) / 1e6
    assert told[-1] == f"copying {listing.content.id}: {total:,.0f} of {total:,.0f} MB"


def external_model(file: Path, location: str) -> None:
    """A model that ONNX Runtime takes, whose weights lie in another file."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        weights.external_data.add(key=key, value=value)
    inputs = helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 4])
    outputs = helper.make_tensor_value_info("logprobs", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("MatMul", ["inputs", "w"], ["logprobs"])
    graph = helper.make_graph([node], "graph", [inputs], [outputs], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.write_bytes(model.SerializeToString())


def test_external_data_of_onnx_are_listed_and_so_hashed_or_refused(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path)
    data = numpy_helper.from_array(np.ones((4, 4), np.float32)).raw_data
    outside = tmp_path / "weights.bin"
    outside.write_bytes(data)
    own = tmp_path / "as-served"  # a folder of nothing but listed files
    own.mkdir()
    for location in ("../weights.bin", str(outside), "missing.bin"):
        external_model(own / "model.onnx", location)
        with pytest.raises(InputError, match="cannot be loaded"):
            OnnxRuntime(own / "model.onnx")
    (own / "weights.bin").write_bytes(data)
    external_model(own / "model.onnx", "weights.bin")
    assert OnnxRuntime(own / "model.onnx").logprobs(np.ones((1, 4), np.float32))[0, 0] == 4
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"weights\.bin: not listed in package\.json"):
        load(folder)
