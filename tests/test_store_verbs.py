"""What a store holds is listed, deleted where nothing needs it, and handed on as one file that is verified."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overproof.artifacts import RECORD, Artifact, Store
from overproof.cli.main import main
from overproof.cli.store import needed
from overproof.config import Serve
from overproof.serve.controller import describe_version
from overproof.serve.deployments import Deployments, ModelDeployment, write_deployments
from packing import make_package


def make(store: Store, stage: str, fingerprint: str, *parents: Artifact, recipe: str = "a") -> Artifact:
    named = {parent.record.stage: parent.record.fingerprint for parent in parents}
    draft = store.new_writer(recipe, stage, fingerprint * 64, None, named)
    (Path(draft.uri) / "weights").write_bytes(b"w" * 1000)
    return draft.commit({}, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def overproof(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_gc_keeps_what_packages_and_the_newest_need(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    data = make(store, "prepare", "0")
    old, packed, newest = (make(store, "train", digit, data) for digit in "123")
    beside = make(store, "sweep", "4", old)
    package = make(store, "package", "5", packed)
    last = make(store, "sweep", "6", newest)
    other = make(store, "train", "1", recipe="b")
    stays = {each.id for each in (data, packed, newest, package, last, other)}
    assert needed(store.artifacts()) == stays
    assert needed(store.artifacts(), {"b"}) == stays
    assert needed(store.artifacts(), {"a"}) == stays | {beside.id, old.id}

    code, out, _ = overproof(capsys, "gc", "--store", store.uri)
    assert code == 0
    told = (
        "2 artifacts, 2.00 kB may go, 6 artifacts, 6.00 kB (a 5.00 kB, b 1.00 kB) stay; to delete: overproof gc --store"
    )
    assert told in out
    assert all(out.count(each.id) == 1 for each in (old, beside))
    assert len(store.artifacts()) == 8  # a dry run
    assert overproof(capsys, "gc", "--store", store.uri, "--yes")[0] == 0
    assert {each.id for each in store.artifacts()} == stays
    assert not Path(beside.uri).exists()
    assert overproof(capsys, "gc", "--store", store.uri, "--yes")[1].startswith("nothing may go; 6 artifacts")


def test_gc_keeps_all_of_a_recipe_that_is_unfinished(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for digit in "12":
        make(store, "train", digit)
    (Path(store.uri) / "a/sweep.work").mkdir()
    code, out, _ = overproof(capsys, "gc", "--store", store.uri, "--yes")
    assert (code, len(store.artifacts())) == (0, 2)
    assert "a: a stage of it is unfinished, so that all of it stays" in out


def test_folders_above_stores_and_stores_without_a_lock_are_refused(
    store: Store, tmp_path: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(store, "train", "1")
    for words in (("gc",), ("gc", "--yes"), ("rm", made.id)):
        code, _, err = overproof(capsys, *words, "--store", tmp_path)
        assert code == 2
        assert f"{made.uri}: lies elsewhere than a/train-11111111 in {tmp_path}; give its own store" in err
    bucket = Store(s3_uri)
    drafts = [bucket.new_writer("a", "train", digit * 64, None, {}) for digit in "12"]
    old, new = (draft.commit({}, 1.0) for draft in drafts)
    assert overproof(capsys, "gc", "--store", s3_uri)[1].endswith("--yes --unlocked\n")
    for words in (("gc", "--yes"), ("rm", old.id)):
        code, _, err = overproof(capsys, *words, "--store", s3_uri)
        assert (code, "has no lock that would say whether a run is using it" in err) == (2, True)
    assert overproof(capsys, "gc", "--yes", "--unlocked", "--store", s3_uri)[0] == 0
    assert bucket.artifacts() == [new]


def test_rm_refuses_what_others_follow_from_and_what_is_deployed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(store, "prepare", "0")
    model = make(store, "train", "1", data)
    code, _, err = overproof(capsys, "rm", data.id, "--store", store.uri)
    assert (code, err) == (2, f"overproof: {data.id}: {model.id} follows from it; remove that too, or keep both\n")
    assert overproof(capsys, "rm", data.id, "a/train", "--store", store.uri)[:2] == (
        0,
        "removed 2 artifacts, 2.00 kB\n",
    )
    assert store.artifacts() == []
    assert overproof(capsys, "rm", "a/train", "--store", store.uri)[0] == 2


@pytest.mark.parametrize("place", ["stable", "canary", "previous"])
def test_what_is_deployed_is_not_removed(
    place: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    served, file = store / package.parent.name / package.name, str(store / "deployments.json")
    shutil.copytree(package, served)
    version = describe_version(str(served), Serve())
    renamed = version.model.overproof.model_copy(update={"package": "digits/package-00000000"})
    model = version.model.model_copy(update={"overproof": renamed})
    other = version.model_copy(update={"location": "/elsewhere", "model": model})
    line = ModelDeployment(**{"stable": other, place: version})
    write_deployments(file, Deployments(format=3, models={"digits": line}))
    code, _, err = overproof(capsys, "rm", "digits", "--store", store)
    assert (code, f"is deployed by {file}; undeploy it first" in err) == (2, True)
    assert served.is_dir()
    write_deployments(file, Deployments())
    assert overproof(capsys, "rm", "digits", "--store", store)[0] == 0
    assert not served.exists()


def test_nothing_is_deleted_beside_a_run_or_a_record_that_cannot_be_read(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(store, "train", "1")
    make(store, "train", "2")
    with store.lock():
        for words in (("gc", "--yes"), ("rm", made.id)):
            code, _, err = overproof(capsys, *words, "--store", store.uri)
            assert code == 2
            assert "in use by process" in err
    broken = Path(store.uri) / "a/package-00000000" / RECORD
    broken.parent.mkdir()
    broken.write_text("{}")
    for words in (("gc", "--yes"), ("rm", made.id)):
        code, _, err = overproof(capsys, *words, "--store", store.uri)
        assert code == 2
        assert err.startswith(f"overproof: {broken}: ")
        assert "nothing is deleted meanwhile" in err
    broken.unlink()
    assert len(store.artifacts()) == 2


def test_a_store_that_is_not_there_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("ls",), ("gc",), ("rm", "x"), ("show", "x")):
        code, out, err = overproof(capsys, *words, "--store", tmp_path / "nowhere")
        assert (code, out) == (2, "")
        assert "store; expected the folder or URI that runs wrote to: --store" in err
    assert not (tmp_path / "nowhere").exists()


def test_a_stage_by_its_name_is_its_newest(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    make(store, "train", "1")
    newest = make(store, "train", "0")
    assert overproof(capsys, "show", "a/train", "--store", store.uri)[1].splitlines()[0] == newest.id
    code, _, err = overproof(capsys, "show", "train", "--store", store.uri)
    assert code == 2
    assert "expected one artifact" in err


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("digits", tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def archive(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("handed") / "digits.tar"
    assert main(["export", str(package), str(file)]) == 0
    return file


def test_a_package_is_handed_on(
    package: Path, archive: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{package.parent.name}/{package.name}"
    for _ in range(2):  # what is there already is taken for done
        code, out, _ = overproof(capsys, "import", archive, "--store", store.uri)
        assert code == 0
        assert f"serve it: overproof serve {name} --store {store.uri}\nit is not signed" in out
    assert overproof(capsys, "verify", name, "--store", store.uri)[0] == 0
    (artifact,) = store.artifacts()
    artifact.verify()
    assert [path.name for path in Path(store.uri).iterdir() if path.name.startswith(".import")] == []
    again = tmp_path / "again.tar"
    assert overproof(capsys, "export", name, again, "--store", store.uri)[0] == 0
    assert again.read_bytes() == archive.read_bytes()
    code, _, err = overproof(capsys, "export", name, again, "--store", store.uri)
    assert (code, "lies there already" in err) == (2, True)
    with (Path(artifact.uri) / "README.md").open("a") as card:
        card.write("!")
    code, _, err = overproof(capsys, "export", name, tmp_path / "third.tar", "--store", store.uri)
    assert (code, "this copy came from elsewhere: have it given anew" in err) == (2, True)
    record, gate = Path(artifact.uri) / RECORD, Path(artifact.uri).with_name("gate-12345678")  # as where it was made
    record.write_bytes(of(parents={"gate": "12345678" * 8})(record.read_bytes()))
    gate.mkdir()
    (gate / RECORD).write_text("{}")
    code, _, err = overproof(capsys, "serve", name, "--store", store.uri)
    assert (code, f"made in this store: `overproof rm {name}`, and run the recipe digits again" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.tar", "store"]


def changed(archive: Path, to: Path, change: Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]) -> Path:
    with tarfile.open(archive) as old, tarfile.open(to, "w") as new:
        for member in old:
            stream = old.extractfile(member)
            assert stream is not None
            change(new, member, stream.read())
    return to


def add(new: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    member.size = len(content)
    new.addfile(member, io.BytesIO(content))


def without(name: str) -> Callable[..., None]:
    return lambda new, member, content: None if member.name == name else add(new, member, content)


def edited(name: str, edit: Callable[[bytes], bytes]) -> Callable[..., None]:
    return lambda new, member, content: add(new, member, edit(content) if member.name == name else content)


def linked(new: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    if member.name == "README.md":
        member.type, member.linkname, content = tarfile.SYMTYPE, "/etc/passwd", b""
    add(new, member, content)


def renamed(name: str) -> Callable[..., None]:
    def change(new: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
        member.name = name if member.name == "README.md" else member.name
        add(new, member, content)

    return change


def twice(new: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    for _ in range(2):
        add(new, member, content)


def elsewhere(new: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    """A record and a package that agree on a place outside of the store."""
    recipe = "../../elsewhere"
    if member.name == RECORD:
        content = of(recipe=recipe)(content)
    elif member.name == "package.json":
        content = of(id=f"{recipe}/package-{json.loads(content)['id'][-8:]}")(content)
    add(new, member, content)


def of(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | fields).encode()


@pytest.mark.parametrize(
    "change",
    [
        elsewhere, without(RECORD), without("package.json"), without("README.md"), linked, renamed("../README.md"),
        renamed("/tmp/README.md"), renamed("a/README.md"), renamed(".."), renamed("another"), twice,
        edited("report.json", lambda content: content + b" "), edited("README.md", lambda content: content[:-1]),
        edited(RECORD, of(recipe="../../elsewhere")), edited(RECORD, of(stage="train")), edited(RECORD, lambda _: b"{"),
    ],
)  # fmt: skip
def test_an_archive_that_was_changed_is_refused_and_leaves_nothing(
    change: Callable[..., None], archive: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(archive, tmp_path / "changed.tar", change)
    code, out, err = overproof(capsys, "import", file, "--store", store.uri)
    assert code == 2, out
    assert err.count("\n") == 1
    assert err.startswith(f"overproof: {file}: ")
    assert store.artifacts() == []
    assert [path.name for path in Path(store.uri).iterdir()] == [".lock"]


def test_an_artifact_that_is_no_package_is_called_so_and_none_of_its_folders_is_to_be_deleted(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = make(store, "train", "d")
    (Path(trained.uri) / "model").mkdir()
    for words in (("serve", trained.id), ("verify", trained.id), ("export", trained.id, tmp_path / "x.tar")):
        code, _, err = overproof(capsys, *words, "--store", store.uri)
        assert code == 2
        assert "no package.json, so no package; expected one" in err
        assert "delete" not in err


def test_what_is_no_archive_is_refused(
    archive: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.tar"
    half.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    text = tmp_path / "text.tar"
    text.write_text("no archive")
    new = tmp_path / "new"
    for file in (half, text, tmp_path / "nowhere.tar", tmp_path):
        for to in (store.uri, new):
            code, _, err = overproof(capsys, "import", file, "--store", to)
            assert (code, err.count("\n")) == (2, 1)
            assert err.startswith(f"overproof: {file}")
        assert not new.exists()
