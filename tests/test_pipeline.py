"""The loop as a whole: what is done is skipped, an edit rebuilds what follows it, a kill loses one stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finished import RECIPES, Run
from overproof import pipeline
from overproof.artifacts import RECORD, Store
from overproof.cli.main import main
from overproof.config import load_recipe
from overproof.export.stage import read_exports
from overproof.pipeline import resolve_stages, stages_of

DIGITS = str(RECIPES / "digits.yaml")
NAMES = tuple(stage.name for stage in stages_of(load_recipe(DIGITS)))
STAGE_S = 240


def _sets(overrides: tuple[str, ...]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def test_every_stage_leaves_a_record_with_its_parents(digits: Run) -> None:
    assert tuple(digits.artifacts) == NAMES
    for artifact in digits.artifacts.values():
        artifact.verify()
        for parent, fingerprint in artifact.record.parents.items():
            assert digits.artifacts[parent].record.fingerprint == fingerprint


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("data.test_fraction=0.2", "prepare"),
        ("train.steps=10", "train"),
        ("cache.scheme.k=5", "cache"),
        ("sweep.learning_rate=0.001", "sweep"),
        ("evaluate.confidence=0.9", "evaluate"),
        ("gate.rules.0.at_most=0.5", "gate"),
        ("gate.candidate=wide-t2-int8", "gate"),
        ("sweep.keep=3", "sweep"),
        ("evaluate.gpus=1", "evaluate"),  # it is the device that is measured
        ("serve.port=0", None),
        ("sweep.concurrent_trials=1", None),
        ("train.cpus_per_worker=0.5", None),
        ("train.gpus_per_worker=1", None),
    ],
)
def test_an_edit_rebuilds_what_follows_and_nothing_else(digits: Run, override: str, first: str | None) -> None:
    recipe = load_recipe(DIGITS, (f"store={digits.recipe.store}", override))
    todo = [step.stage.name for step in resolve_stages(recipe, Store(recipe.store)) if step.artifact is None]
    rebuilt = NAMES[NAMES.index(first) :] if first else ()
    assert tuple(todo) == rebuilt


def test_what_trials_run_on_counts_where_their_time_does(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        recipe = load_recipe(DIGITS, (f"store={tmp_path}", *overrides))
        return next(s.fingerprint for s in resolve_stages(recipe, Store(recipe.store)) if s.stage.name == "sweep")

    timed = "tune={objectives: [validation_loss, seconds]}"
    assert fingerprint("tune={}") == fingerprint("tune={}", "sweep.gpus_per_trial=1")
    assert len({fingerprint("tune={}"), fingerprint(timed), fingerprint(timed, "sweep.gpus_per_trial=1")}) == 3


def test_a_second_run_does_nothing_and_starts_nothing(digits: Run) -> None:
    code = (
        "import sys; from overproof.cli.main import main\n"
        f"assert main(['run', {DIGITS!r}, '--set', 'store={digits.recipe.store}']) == 0\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    before = {a.id: a.record.created for a in Store(digits.recipe.store).artifacts()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == len(NAMES)
    assert {a.id: a.record.created for a in Store(digits.recipe.store).artifacts()} == before


def test_the_report_is_one_page_with_the_picture_inside(digits: Run) -> None:
    folder = digits.artifacts["report"].local()
    page = (folder / "report.html").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in page.replace("http-equiv", "")
    exports = read_exports(digits.artifacts["compress"].local())
    for name in (*(e.name for e in exports), *(s.name for s in digits.recipe.sweep.students)):
        assert f'"name":"{name}"' in page


def test_the_refused_recipe_ends_with_reasons_and_serves_nothing(
    digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the digits under another policy: beside them, only the gate is new."""
    recipes = [
        load_recipe(RECIPES / f"{name}.yaml").model_dump(exclude={"name", "gate"}) for name in ("digits", "refused")
    ]
    assert recipes[0] == recipes[1]
    shutil.copytree(digits.recipe.store, tmp_path, dirs_exist_ok=True)
    packages = set(tmp_path.glob("digits/package-*"))
    overrides = (f"store={tmp_path}", "serve.port=0", "name=digits")
    assert main(["demo", str(RECIPES / "refused.yaml"), *_sets(overrides)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("done before") == NAMES.index("gate")
    assert "the gate refused every candidate" in printed.err
    assert "needed 100 times" in printed.err
    assert "refused" in printed.out
    assert "curl" not in printed.out
    assert set(tmp_path.glob("digits/package-*")) == packages
    assert len(list(tmp_path.glob(f"digits/gate-*/{RECORD}"))) == 2


def test_killed_within_a_stage_only_that_stage_is_lost(ray_cluster: str, digits: Run, tmp_path: Path) -> None:
    """Every stage in turn is a trial; the cluster stays, so that the next run meets what the killed one left."""
    for stage in ("prepare", "train"):
        done = digits.artifacts[stage]
        shutil.copytree(done.local(), tmp_path / done.id)
    before = Store(str(tmp_path)).artifacts()
    command = [sys.executable, "-m", "overproof.cli.main", "cache", DIGITS, "--set", f"store={tmp_path}"]
    process = subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": ray_cluster}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + STAGE_S
    while not list(tmp_path.glob("digits/cache-*")):
        assert process.poll() is None, "ended before the stage"
        assert time.monotonic() < deadline, "never reached the stage"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert Store(str(tmp_path)).artifacts() == before
    again = pipeline.run(load_recipe(DIGITS, (f"store={tmp_path}",)), "cache")
    assert [again["prepare"], again["train"]] == before
    again["cache"].verify()
    assert again["cache"].content_sha256 == digits.artifacts["cache"].content_sha256
