"""The findings of a plan: storage that is really probed, uploads as Ray packs them, time, units."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from finished import RECIPES, Run
from overproof.cluster import cluster_checks, node_checks, preflight, recipe_checks, store_probe, upload
from overproof.cluster.placement import Capacity, NodeShape
from overproof.cluster.ray_cluster import capacity
from overproof.cluster.recipe_checks import Throughput
from overproof.config import load_recipe
from overproof.errors import InputError
from overproof.files import filesystem, join_uri
from overproof.units import format_bytes, format_seconds

DIGITS = RECIPES / "digits.yaml"
HERE = Capacity((NodeShape("this machine", 4, 0, 1, always=1),), "a local cluster here has 1 node of 4 CPUs")


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("deep", ["", "store", "a/b/store"])
def test_a_probe_writes_reads_and_leaves_nothing(tmp_path: Path, deep: str) -> None:
    before = everything(tmp_path)
    with store_probe.probe_store(str(tmp_path / deep)) as (file, text):
        assert Path(file).read_text() == text
    assert everything(tmp_path) == before


def test_a_probe_of_an_object_store_leaves_nothing(s3_uri: str) -> None:
    files, root = filesystem(s3_uri)
    with store_probe.probe_store(s3_uri) as (file, text):
        store, path = filesystem(file)
        with store.open_input_stream(path) as stream:
            assert stream.read().decode() == text
    assert files.get_file_info(root).type == fs.FileType.NotFound
    bucket = root.split("/")[0]
    assert files.get_file_info(fs.FileSelector(bucket, recursive=True)) == []
    with files.open_output_stream(f"{root}/kept") as stream:
        stream.write(b"kept")
    with store_probe.probe_store(s3_uri):
        pass
    assert [info.path for info in files.get_file_info(fs.FileSelector(root, recursive=True))] == [f"{root}/kept"]


def test_what_another_run_writes_meanwhile_stays(tmp_path: Path) -> None:
    with store_probe.probe_store(str(tmp_path / "store")):
        (tmp_path / "store/theirs").write_text("kept")
    assert everything(tmp_path) == {str(tmp_path / "store"), str(tmp_path / "store/theirs")}


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = load_recipe(DIGITS, (f"store={tmp_path / 'file/store'}",))
    found = cluster_checks.check_storage(recipe, HERE, attached=False)
    assert found.state == "refused"
    assert "cannot be written" in found.text
    assert "--set store=" in found.text
    missing = load_recipe(DIGITS, ("store=s3://no-such-bucket-of-anyone/x?scheme=http&endpoint_override=127.0.0.1:1",))
    assert cluster_checks.check_storage(missing, HERE, attached=False).state == "refused"


def test_every_node_of_a_cluster_is_asked_for_the_store(ray_cluster: str, tmp_path: Path) -> None:
    where = capacity()
    assert where.count == 2
    shared = cluster_checks.check_storage(load_recipe(DIGITS, (f"store={tmp_path}",)), where, attached=True)
    assert (shared.state, "every node" in shared.text) == ("ok", True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_other_nodes_do_not_see_is_refused(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = load_recipe(DIGITS, ("store=/proc/self/cwd/store",))  # a path that is another folder in every process
    found = cluster_checks.check_storage(own, capacity(), attached=True)
    assert found.state == "refused"
    assert "is not seen on" in found.text
    assert "s3://bucket/store" in found.text
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_cannot_read_a_bucket_say_why(ray_cluster: str, s3_uri: str) -> None:
    reports = node_checks.ask_nodes(join_uri(s3_uri, "none"), "text")
    unshared = node_checks.describe_unshared(s3_uri, reports)
    assert unshared
    assert re.search(r"is not seen on [0-9., ]* \(.*o such file or directory\); .*credentials of every node", unshared)


def test_nodes_have_the_versions_of_this_process(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("sound")
    reports = node_checks.ask_nodes(str(tmp_path / "file"), "sound")
    assert [report.store_error for report in reports] == [None, None]
    assert node_checks.describe_differences(reports) is None
    other = replace(reports[1], versions={**reports[1].versions, "torch": "2.12.1"})
    here = node_checks.installed_versions()["torch"]
    with pytest.raises(
        InputError, match=rf"^node {other.address}: torch 2\.12\.1, here {re.escape(here)}; expected the"
    ):
        node_checks.require_alike("s3://store", [reports[0], other])


def test_a_local_store_for_several_nodes_is_a_warning(tmp_path: Path) -> None:
    many = Capacity((NodeShape("cpu", 4, 0, 4),), "cluster.yaml may grow to 4 nodes")
    found = cluster_checks.check_storage(load_recipe(DIGITS, (f"store={tmp_path}",)), many, attached=False)
    assert found.state == "warning"
    assert "on 4 nodes it must be a folder that all of them share" in found.text


TREE = {
    ".git/objects/pack": 4000,
    ".gitignore": "*.log\n/only-here/\nbuild/\n!keep.log\n",
    ".rayignore": "big.bin\n**/deep/*.tmp\n",
    "a.txt": 10,
    "keep.log": 20,
    "drop.log": 30,
    "big.bin": 5000,
    "only-here/x": 40,
    "sub/only-here/x": 50,
    "sub/.gitignore": "secret\n",
    "sub/secret": 60,
    "sub/build/y": 70,
    "sub/deep/z.tmp": 80,
    "sub/deep/ünïcode.txt": 90,
    "__pycache__/m.pyc": 100,
    ".venv/lib/x.py": 110,
    "venv/lib/x.py": 120,
    "secret": 130,
}


def tree(folder: Path) -> Path:
    for name, content in TREE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else "x" * content, encoding="utf-8")
    (folder / "empty/inside").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "a.txt")
    return folder


@pytest.mark.parametrize("gitignore", [True, False])
def test_an_upload_is_counted_to_the_byte_as_ray_packs_it(
    tmp_path: Path, gitignore: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, package = tree(tmp_path / "work"), tmp_path / "package.zip"
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0" if gitignore else "1")
    create_package(
        str(folder), package, include_gitignore=gitignore, excludes=get_runtime_env_default_excludes(),
        logger=logging.getLogger("quiet"),
    )  # fmt: skip
    found = upload.measure_upload(folder)
    assert found.size_bytes == package.stat().st_size
    assert found.fits
    assert upload.LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_the_upload_of_this_repository_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", raising=False)
    repository, package = Path(__file__).parents[1], tmp_path / "package.zip"
    create_package(
        str(repository), package, include_gitignore=True, excludes=get_runtime_env_default_excludes(),
        logger=logging.getLogger("quiet"),
    )  # fmt: skip
    assert upload.measure_upload(repository).size_bytes == pytest.approx(
        package.stat().st_size, rel=0.05
    )  # caches change


def test_an_upload_over_the_limit_names_what_is_large(tmp_path: Path) -> None:
    for name, bytes_ in (("checkpoints/a.pt", 60 << 20), ("checkpoints/b.pt", 30 << 20), ("data.bin", 20 << 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(bytes_)
    found = cluster_checks.check_upload(tmp_path)
    assert found.state == "warning"
    assert "checkpoints 94.4 MB, data.bin 21.0 MB" in found.text
    assert ".rayignore" in found.text
    (tmp_path / ".rayignore").write_text("checkpoints/\n")
    assert cluster_checks.check_upload(tmp_path).state == "ok"


def test_time_from_a_given_rate_and_what_to_do_without_one() -> None:
    recipe = load_recipe(RECIPES / "stdlib-lm.yaml")
    tokens = recipe.train.steps * recipe.train.batch_size * 128
    found = recipe_checks.training_time(recipe, Throughput(tokens / 7200, "as given"), recipe.data.positions)
    assert found.text.endswith("(as given): 2.0 hours")
    assert f"{tokens:,} tokens" in found.text
    assert "--tokens-per-s N" in recipe_checks.training_time(recipe, None, recipe.data.positions).text


def test_time_from_an_earlier_run_of_the_same_model(digits: Run) -> None:
    record = digits.artifacts["train"].record
    rate = recipe_checks.measured_rate(digits.recipe)
    assert rate is not None
    assert rate.per_s == pytest.approx(digits.recipe.train.batch_size / record.metrics["seconds_per_step"])
    assert digits.artifacts["train"].id in rate.source
    other = load_recipe(DIGITS, (f"store={digits.recipe.store}", "train.model.layers=2"))
    assert recipe_checks.measured_rate(other) is None
    longer = load_recipe(DIGITS, (f"store={digits.recipe.store}", "train.steps=15000"))
    assert recipe_checks.measured_rate(longer) == rate


def test_units() -> None:
    assert [format_bytes(n) for n in (0, 999, 1_500, 104_857_600, 3_200_000_000, 1.2e13)] == [
        "0 B", "999 B", "1.50 kB", "105 MB", "3.20 GB", "12.0 TB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (35, 720, 12_240, 181_440)] == ["35 s", "12 min", "3.4 hours", "2.1 days"]


def test_bf16_on_cpus_is_warned_of_and_what_no_torch_scores_takes_no_word_of_it() -> None:
    recipe = load_recipe(DIGITS, ("cache.precision=bf16", "sweep.precision=bf16", "sweep.gpus_per_trial=1"))
    assert [(found.about, found.state) for found in recipe_checks.check_precision(recipe)] == [
        ("cache.precision", "warning")
    ]
    assert list(recipe_checks.check_precision(load_recipe(DIGITS))) == []
    for asked in ("evaluate.precision=tf32", "evaluate.gpus_per_task=1"):
        with pytest.raises(InputError, match=r"evaluate\.\w+: found .*; onnxruntime scores its files itself, on CPUs"):
            list(recipe_checks.check_precision(load_recipe(DIGITS, (asked,))))
        torch_scores = load_recipe(RECIPES / "stdlib-lm.yaml", (asked, "evaluate.engine=vllm"))
        assert list(recipe_checks.check_precision(torch_scores)) == []


def test_elastic_training_is_told_how_many_workers_fit() -> None:
    recipe = load_recipe(DIGITS, ("train.workers=[2,16]",))
    train = next(found for found in cluster_checks.check_placement(recipe, HERE) if found.about == "train")
    assert train.state == "warning"
    assert "2 x 1 + 1 = 3 of 4 CPUs" in train.text  # three would fit, and do not divide the batch of 64
    assert "16 do not fit: 2 at a time" in train.text


def test_a_run_beside_replicas_is_counted() -> None:
    recipe = load_recipe(DIGITS, ("serve.min_replicas=2",))
    together = [found for found in cluster_checks.check_placement(recipe, HERE) if found.about == "together"]
    assert [found.state for found in together] == ["warning"]
    assert "train 3 + serve 2 = 5 of 4 CPUs" in together[0].text


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("stdlib-lm", ("train.attention=varlen",), None),
        ("digits", ("train.attention=varlen",), "train.attention: varlen: .* rows of this data are read as one text"),
        (
            "stdlib-lm", ("sweep.group={attention: varlen}", "sweep.students.0.model.kind=gemma2"),
            "sweep.group.attention: varlen: models of the family gemma2 cannot attend by lengths",
        ),
    ],
)  # fmt: skip
def test_attention_by_lengths_is_for_texts_that_share_a_row(
    recipe: str, changes: tuple[str, ...], words: str | None
) -> None:
    read = load_recipe(RECIPES / f"{recipe}.yaml", changes)
    if words is None:
        preflight.require_trainable(read)
        return
    with pytest.raises(InputError, match=words):
        preflight.require_trainable(read)
