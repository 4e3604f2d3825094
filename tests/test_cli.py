"""The command line: its flags are pinned, its help comes from the schema, and what it prints is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finished import RECIPES, Run
from overproof import pipeline
from overproof.cli.main import EXAMPLES, STAGE_VERBS, main, parse_arguments
from overproof.cluster import ray_cluster
from overproof.config import load_recipe
from overproof.export.stage import read_exports
from overproof.pipeline import STAGES, stages_of

DIGITS = str(RECIPES / "digits.yaml")
CHOICES = {
    "--help", "--data", "--task", "--max-mb", "--max-p95-ms", "--keep", "--finetune", "--max-minutes", "--label",
    "--text", "--image", "--pattern", "--image-size", "--name", "--out", "--set",
}  # fmt: skip
RECIPE = {"--help", "--help-fields", "--set"}
FLAGS = {
    "shrink": CHOICES,
    "init": CHOICES,
    "demo": RECIPE | {"--keep"},
    "run": RECIPE | {"--until"},
    "plan": RECIPE | {"--cluster", "--tokens-per-s", "--rows-per-s"},
    "dashboard": {"--help", "--set", "--store", "--port"},
    "pick": RECIPE | {"--max-mb", "--max-p50-ms", "--max-p95-ms", "--max-resident-mb", "--min-quality"},
    "ls": {"--help", "--store"},
    "rm": {"--help", "--store", "--unlocked"},
    "gc": {"--help", "--store", "--yes", "--unlocked"},
    "export": {"--help", "--store"},
    "import": {"--help", "--store"},
    "show": {"--help", "--store", "--json"},
    "serve": RECIPE | {"--store"},
    "schema": {"--help", "--text"},
    "signing-key": {"--help"},
    "sign": {"--help", "--key", "--store"},
    "verify": {"--help", "--keys", "--policy", "--store"},
    **dict.fromkeys(STAGE_VERBS, RECIPE),
    "report": RECIPE | {"--store", "--out"},
}


def _help(capsys: pytest.CaptureFixture[str], *argv: str, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as ended:
        main([*argv, flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_stage_is_a_verb_and_the_flags_are_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(STAGE_VERBS) == tuple(stage.name for stage in STAGES)
    top = _help(capsys)
    for verb, flags in FLAGS.items():
        assert re.search(rf"^    {verb}\s", top, re.MULTILINE)
        usage = _help(capsys, verb).split("\nexamples:")[0]
        assert set(re.findall(r"--[a-z0-9-]+", usage)) == flags, verb


def test_examples_parse() -> None:
    """What --help shows can be typed."""
    for verb, lines in EXAMPLES.items():
        for line in lines:
            typed = re.fullmatch(r'(?:eval "\$\()?overproof (.*?)(?:\)")?(?:    .*)?', line)
            assert typed is not None, line
            assert parse_arguments(shlex.split(typed[1])).verb == verb


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["plan", DIGITS, "--set", "train.model={kind:", "vit,", "layers:", "2}"],
         "unknown vit, layers: 2}; expected values with blanks or braces in single quotes: "
         "--set 'train.model={kind: vit, layers: 2}'"),
        (["plan", DIGITS, "--set", "a=1", "--set", "b=[1,", "2]", "--set", "c=3"], "single quotes: --set 'b=[1, 2]'"),
        (["plan", DIGITS, "--stepz", "3"], "unknown --stepz 3; `overproof plan --help` lists"),
        (["ls", "store"], "ls: unknown store; `overproof ls --help`"),
    ],
)  # fmt: skip
def test_an_unknown_word_says_what_to_do(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="completes in bash")
def test_bash_completes_verbs_flags_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "digits.yaml").touch()

    def complete(*words: str) -> list[str]:
        line = " ".join(map(shlex.quote, words))
        script = (
            f"source ./completion; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE={shlex.quote(line)}; "
            "COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; _shtab_overproof 2>/dev/null; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("overproof", "dep") == ["deploy", "deployments"]
    assert complete("overproof", "pick", "--max-p") == ["--max-p50-ms", "--max-p95-ms"]
    assert complete("overproof", "run", "dig") == ["digits.yaml"]
    assert complete("overproof", "prove", "res") == ["resume"]


def test_a_stage_explains_its_part_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.zero_stage" not in _help(capsys, "train")
    text = _help(capsys, "train", flag="--help-fields")
    assert "train.zero_stage" in text
    assert "0 | 1 | 2 | 3 = 2" in text
    assert "sweep.students" not in text


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    for words in ("run --help-fields", "schema --text", "completion bash"):
        command = f"set -o pipefail; {sys.executable} -m overproof.cli.main {words} | exec 0<&-"  # which reads nothing
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (141, ""), words


def test_help_and_plan_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from overproof.cli.main import main\n"
        f"assert main(['plan', {DIGITS!r}, '--set', 'store={tmp_path}']) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to do") == len(stages_of(load_recipe(DIGITS)))


def test_plan_says_what_is_done_and_what_it_asks(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DIGITS, "--set", f"store={digits.recipe.store}", "--set", "sweep.learning_rate=0.001"]) == 0
    out = capsys.readouterr().out
    assert out.count("done in") == 3
    assert out.count("to do") == len(stages_of(digits.recipe)) - 3
    assert "150 steps, 9,600 images, ZeRO 1" in out
    assert "2 workers + 1 reader" in out


def test_ls_and_show_trace_a_package_to_its_shards(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--store", digits.recipe.store]) == 0
    listed = capsys.readouterr().out
    assert all(f"digits/{stage}-" in listed for stage in digits.artifacts)
    assert re.search(rf"^{len(digits.artifacts)} artifacts, [0-9.]+ MB$", listed, re.MULTILINE)
    assert main(["show", "package", "--json", "--store", digits.recipe.store]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["parents"]) >= {"prepare", "train", "cache", "sweep", "compress", "evaluate", "gate"}
    assert main(["show", "digits/package", "--store", digits.recipe.store]) == 0
    lineage = capsys.readouterr().out.splitlines()
    assert lineage[0] == digits.artifacts["package"].id
    for artifact in digits.artifacts.values():
        if artifact.record.stage != "report":  # the picture is no part of a package
            assert sum(line.strip(" └").startswith(artifact.id) for line in lineage) >= 1
    assert f"  └ {digits.artifacts['prepare'].id}" in lineage
    for name, entry in digits.artifacts["prepare"].record.files.items():
        listed = [line for line in lineage if line.startswith(f"    └ {name}  ")]
        assert len(listed) == name.endswith(".parquet")
        assert all(line.endswith(f"sha256 {entry.sha256[:12]}") for line in listed)
    assert len([line for line in lineage if ".parquet" in line]) >= 4


def test_a_run_is_summed_up_though_its_data_have_changed_meanwhile(
    digits: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever resolves the stages anew finds others then, which are not done."""
    resolve, calls = pipeline.resolve_stages, []

    def resolve_once(*args: Any) -> Any:
        assert not calls, "the data were looked at again"
        calls.append(args)
        return resolve(*args)

    monkeypatch.setattr(pipeline, "resolve_stages", resolve_once)
    assert main(["run", DIGITS, "--set", f"store={digits.recipe.store}"]) == 0
    out = capsys.readouterr().out
    assert " ships: " in out
    assert "report.html" in out


def test_compress_prints_every_file_in_one_table(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", DIGITS, "--set", f"store={digits.recipe.store}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head[:4] == ["variant", "against the teacher", "format", "MB"]
    assert {"accuracy, %", "KL from teacher, nats", "p50, ms", "p95, ms", "resident MB"} < set(head)
    assert {*"".join(rule)} == {"-"}
    exports = read_exports(digits.artifacts["compress"].local())
    assert [row[0].strip("`") for row in rows] == [export.name for export in exports]
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", cells["accuracy, %"])
        assert (cells["KL from teacher, nats"] == "") == (cells["against the teacher"] == "") == (row[0] == "`teacher`")


def test_another_gate_is_judged_and_packaged_without_ray(
    digits: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect() -> None:
        raise AssertionError("Ray was started")

    shutil.copytree(digits.recipe.store, tmp_path / "store")
    monkeypatch.setattr(ray_cluster, "connect", connect)
    changed = ["--set", f"store={tmp_path}/store", "--set", "gate.rules.1.at_least=3.5"]
    assert main(["run", DIGITS, *changed]) == 0
    assert "package  " in capsys.readouterr().out
    assert len(list((tmp_path / "store/digits").glob("package-*"))) == 2


def test_show_of_something_unknown(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name, near in (
        ("no-such-thing", "; expected one artifact"),
        ("digits/pakage", ", nearest is 'digits/package'"),
    ):
        assert main(["show", name, "--store", digits.recipe.store]) == 2
        assert f"found none in {digits.recipe.store}{near}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian", DIGITS], "trian: no such verb, nearest is 'train'; expected one that `overproof --help` lists"),
        (["serv"], "serv: no such verb, nearest is 'serve'"),
        (["xyzzy"], "xyzzy: no such verb; expected"),
        (
            ["run", DIGITS, "--until", "swep"],
            "swep: there is no such stage, nearest is 'sweep'; expected one of pre",
        ),
        (["run", DIGITS, "--until", "speculate"], "speculate: the recipe has no such section; expected one of prepare"),
    ],
)
def test_an_unknown_verb_or_stage_suggests_the_nearest(
    argv: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, *(("--set", f"store={tmp_path}") if DIGITS in argv else ())]) == 2
    assert capsys.readouterr().err.startswith(f"overproof: {told}")


def test_serving_what_is_no_package(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(digits.artifacts["train"].local()), "--store", digits.recipe.store]) == 2
    assert "package" in capsys.readouterr().err


def test_a_demo_whose_port_is_taken_ends_before_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", DIGITS, "--set", f"store={tmp_path}", "--set", f"serve.port={port}"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


TERMINATED = """
import os, signal, sys, time
from overproof.cli import main as cli
from overproof.cluster import ray_cluster

def connect(_):
    ray_cluster.connect()  # Ray takes SIGTERM for itself
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

cli.verbs.schema = connect
sys.exit(cli.main(["schema"]))
"""


def test_sigterm_ends_a_command_like_ctrl_c_with_a_code_of_its_own(ray_cluster: str) -> None:
    def ignore_sigint() -> None:  # as in what shells start in the background
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    for prepare in (None, ignore_sigint):
        done = subprocess.run(
            [sys.executable, "-c", TERMINATED], env=os.environ | {"RAY_ADDRESS": ray_cluster}, preexec_fn=prepare,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (143, "")
        assert done.stderr == "overproof: stopped; finished stages stay, run the same command to go on\n"
