"""The report of a real sweep in a real browser: it asks for nothing, and every control does what it says."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from browser import open_page
from finished import Run
from overproof.artifacts import Artifact
from overproof.cli.main import main
from overproof.evaluate.gate import CandidateVerdict, Reason, Verdict
from overproof.evaluate.outcome import Outcome
from overproof.evaluate.remedies import BrokenRule, Nearest, Remedy
from overproof.report.content import thin_curve
from overproof.report.stage import embed_json, render_page

EVIL = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def page_file(digits: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that `overproof report SWEEP` writes."""
    file: Path = tmp_path_factory.mktemp("page") / "page.html"
    sweep = digits.artifacts["sweep"].id
    assert main(["report", sweep, "--store", digits.recipe.store, "--out", str(file)]) == 0
    return file


def data_of(file: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def rows(page: Page) -> list[str]:
    """The trials listed, in order, without the control."""
    names = page.eval_on_selector_all("#trials tbody tr", "rows => rows.map(row => row.dataset.trial)")
    assert names[-1] == "control"
    return list(names[:-1])


def column(page: Page, title: str) -> list[str]:
    titles = page.eval_on_selector_all("#trials th", "cells => cells.map(cell => cell.textContent)")
    at = titles.index(title) + 1
    return page.locator(f"#trials tbody td:nth-child({at})").all_inner_texts()[:-1]


def test_the_page_asks_for_nothing_and_its_controls_work(page_file: Path, digits: Run, tmp_path: Path) -> None:
    data = data_of(page_file)
    trials = {trial["name"]: trial for trial in data["trials"]}
    with open_page(page_file.as_uri(), tmp_path) as (page, heard):
        page.wait_for_selector("#plane .point")
        assert page.locator("#plane .point").count() == len(data["files"]["rows"])
        assert set(rows(page)) == {student.name for student in digits.recipe.sweep.students}

        losses = [float(text) for text in column(page, "validation loss")]
        assert losses == sorted(losses)
        page.get_by_role("button", name="validation loss").click()
        assert [float(text) for text in column(page, "validation loss")] == losses[::-1]
        page.get_by_role("button", name="trial", exact=True).click()
        assert rows(page) == sorted(trials)

        page.locator("#find").fill("wide")
        assert rows(page) == sorted(name for name in trials if "wide" in name)
        page.locator("#find").fill("")
        page.locator("#status").select_option("stopped")
        assert rows(page) == sorted(name for name, trial in trials.items() if trial["status"] == "stopped")
        page.locator("#status").select_option("")

        places = []
        for axis in data["files"]["planes"]:
            page.locator("#axis").select_option(axis)
            assert page.locator("#plane").get_attribute("data-axis") == axis
            points = page.locator("#plane [data-file]:not(.beaten)")
            members = points.evaluate_all("groups => groups.map(group => group.dataset.file)")
            assert set(members) == set(data["files"]["planes"][axis]["frontier"])
            places.append(page.eval_on_selector_all("#plane .point", "points => points.map(p => p.getAttribute('cx'))"))
        assert len({tuple(place) for place in places}) == len(places)

        labels_are_apart(page)
        page.evaluate("""() => DATA.files.rows.forEach((row, i) => Object.assign(
            row, {size_mb: 1 + i / 500, quality: 0.9 + (i % 3) / 1e4, low: 0.89, high: 0.91}))""")
        page.locator("#axis").select_option(next(iter(data["files"]["planes"])))
        labels_are_apart(page)

        page.locator("#split").select_option("train")
        assert page.locator("#curves .curve").count() == len(data["curves"])

        brush(page, trials)
        assert heard.complaints == []
        assert [request for request in heard.requests if not request.startswith(("file:", "data:"))] == []
        assert len(heard.requests) == 1


def labels_are_apart(page: Page) -> None:
    """No name of the frontier lies on another, or on a marker."""
    boxes = "nodes => nodes.map(node => node.getBBox()).map(b => [b.x, b.y, b.x + b.width, b.y + b.height])"
    names = page.eval_on_selector_all("#plane .label", boxes)
    markers = page.eval_on_selector_all("#plane .point", boxes)
    assert len(names) == page.locator("#plane [data-file]").count() > 4
    for i, (left, top, right, bottom) in enumerate(names):
        for other in (*names[:i], *markers):
            assert not (left < other[2] and other[0] < right and top < other[3] and other[1] < bottom)


def brush(page: Page, trials: dict[str, Any]) -> None:
    """The upper half of the temperatures; the table and the lines follow, and a click lets go."""
    handle = page.locator('#parallel [data-axis="temperature"]')
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box is not None
    x, top, bottom = box["x"] + box["width"] / 2, box["y"] + 2, box["y"] + box["height"] / 2
    page.mouse.move(x, top)
    page.mouse.down()
    page.mouse.move(x, bottom, steps=4)
    page.mouse.up()
    hot = sorted(name for name, trial in trials.items() if trial["values"]["temperature"] == 4.0)
    assert 0 < len(hot) < len(trials)
    assert sorted(rows(page)) == hot
    lines = page.locator("#parallel path[data-trial]:not(.off)")
    assert sorted(lines.evaluate_all("lines => lines.map(line => line.dataset.trial)")) == hot
    assert page.locator("#curves .curve.off").count() == len(trials) - len(hot)
    page.mouse.click(x, bottom)
    assert sorted(rows(page)) == sorted(trials)


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1200, "dark")])
def test_it_fits_the_screen_and_its_colours(page_file: Path, tmp_path: Path, width: int, scheme: Any) -> None:
    with open_page(page_file.as_uri(), tmp_path, width, scheme) as (page, heard):
        page.wait_for_selector("#plane .point")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", paper)[:3])) > 3 * 128
        assert light == (scheme == "light")
        assert heard.complaints == []


def test_hundreds_of_trials_and_words_that_look_like_code(page_file: Path, tmp_path: Path) -> None:
    data = data_of(page_file)
    (curve,) = (curve for curve in data["curves"] if curve["name"] == data["trials"][0]["name"])
    for i in range(400):
        name = f"{EVIL}{i}"
        values = {"learning_rate": 10 ** -(1 + i % 5), "t": EVIL}
        ended = {"status": "failed", "reason": EVIL, "validation_loss": None if i % 7 else 1.0 + i}
        copy = {**data["trials"][0], "name": name, "role": "trial", "values": values, **ended}
        data["trials"].append(copy)
        data["curves"].append({**curve, "name": name, "role": "trial"})
    text = page_file.read_text(encoding="utf-8")
    start, end = text.index('id="data">') + len('id="data">'), text.index("</script>", text.index('id="data">'))
    file = tmp_path / "many.html"
    file.write_text(text[:start] + embed_json(data) + text[end:], encoding="utf-8")
    with open_page(file.as_uri(), tmp_path / "profile") as (page, heard):
        page.wait_for_selector("#plane .point")
        title = page.title()
        assert len(rows(page)) == len(data["trials"])
        assert rows(page)[-1].startswith(EVIL)  # what has no loss comes last
        page.locator("#find").fill("onerror")
        assert len(rows(page)) == 400
        assert page.title() == title != "run"
        assert page.locator("img, script[src]").count() == 0
        assert heard.complaints == []


def test_the_words_of_a_verdict_are_escaped(digits: Run, tmp_path: Path) -> None:
    """A name of the recipe or a reason of the gate is text, never markup."""
    name = digits.recipe.sweep.students[0].name
    verdict = Verdict(passed=False, chosen=None, candidates=(
        CandidateVerdict(name=name, passed=False, reasons=(Reason(rule="x", passed=False, text=EVIL),)),))  # fmt: skip
    remedy = Remedy(text=EVIL, overrides=(EVIL,))
    outcome = Outcome(
        passed=False, ships=EVIL, lost=EVIL, bought=EVIL, warnings=(EVIL,), next_steps=(),
        nearest=Nearest(name=EVIL, broken=(BrokenRule(kind=EVIL, text=EVIL, remedies=(remedy,)),)),
    )  # fmt: skip
    folder = tmp_path / "gate"
    folder.mkdir()
    (folder / "verdict.json").write_text(verdict.model_dump_json())
    (folder / "outcome.json").write_text(outcome.model_dump_json())
    gate = type(digits.artifacts["gate"])(str(folder), digits.artifacts["gate"].record)
    page = render_page(EVIL, digits.artifacts | {"gate": gate})
    assert EVIL not in page
    assert page.count("&lt;/script&gt;") >= 12  # the name twice, a reason, and each part of the outcome


def test_a_sweep_alone_has_a_page_without_files(digits: Run, tmp_path: Path) -> None:
    stages = ("prepare", "train", "cache", "sweep")
    file = tmp_path / "page.html"
    file.write_text(render_page("alone", {stage: digits.artifacts[stage] for stage in stages}))
    assert data_of(file)["files"] is None
    with open_page(file.as_uri(), tmp_path / "profile") as (page, heard):
        page.wait_for_selector("#curves .curve", state="attached")
        assert len(rows(page)) == len(digits.recipe.sweep.students)
        assert page.locator("#frontier").count() == 0
        assert heard.complaints == []


def test_a_sweep_without_a_cache_says_nothing_of_one(digits: Run) -> None:
    stages = ("prepare", "train", "cache", "sweep", "evaluate", "gate")
    whole = {stage: digits.artifacts[stage] for stage in stages}
    assert "What the shared cache saved" in render_page("whole", whole)
    page = render_page("without", {stage: artifact for stage, artifact in whole.items() if stage != "cache"})
    assert "What the shared cache saved" not in page
    assert "of wall time).</p>" in page
    record = digits.artifacts["cache"].record
    written = Artifact("", record.model_copy(update={"metrics": {"teacher_seconds": 3.0}}))
    assert "each of its text (3.00 s of writing), and" in render_page("written", whole | {"generate": written})


def test_what_is_no_sweep_is_refused(digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--store", digits.recipe.store]
    assert main(["report", digits.artifacts["train"].id, *own]) == 2
    assert "expected a sweep" in capsys.readouterr().err
    assert main(["report", "digits/sweep-00000000", *own]) == 2
    assert "expected one artifact" in capsys.readouterr().err
    assert main(["report", digits.artifacts["sweep"].id, *own, "--out", str(tmp_path / "no/such.html")]) == 2
    assert "--out FILE" in capsys.readouterr().err


def test_the_costs_are_sums_over_the_trials(digits: Run, page_file: Path) -> None:
    data, cached = data_of(page_file), digits.artifacts["cache"].record.metrics
    steps = sum(trial["steps"] for trial in data["trials"])
    assert data["costs"]["live_predictions"] == steps * digits.recipe.sweep.batch_size  # one prediction an image
    assert data["costs"]["cached_predictions"] == cached["positions"]
    assert data["costs"]["live_s"] == pytest.approx(
        cached["teacher_seconds"] * data["costs"]["live_predictions"] / cached["positions"]
    )
    assert all(trial["cpu_seconds"] > 0 for trial in data["trials"])


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_step() -> None:
    points = [(step, float(step)) for step in range(1, 1001)]
    found = thin_curve(points)
    assert len(found) <= 120
    assert found[-1][0] == 1000
    for (before, _), (step, loss) in pairwise([(0, 0.0), *found]):
        assert loss == (before + 1 + step) / 2
    assert thin_curve(points[:5]) == points[:5]
    assert thin_curve([]) == []
