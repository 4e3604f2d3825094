"""What the documents tell a user to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from overproof.cli.main import parse_arguments

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text() for path in DOCUMENTS}
COMMANDS = sorted({line.split("#")[0].strip() for text in TEXT.values() for line in text.splitlines()
                   if line.startswith("    ") and "overproof " in line and "make" not in line})  # fmt: skip


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(".venv/bin/overproof ")])
def test_a_documented_command_parses(command: str) -> None:
    options = parse_arguments(shlex.split(command)[1:])
    by_id = options.verb == "report" and "/sweep" in str(options.recipe)  # a sweep of a store
    if "recipe" in vars(options) and not by_id:
        assert (REPOSITORY / options.recipe).is_file()


def test_documented_jobs_parse() -> None:
    jobs = [line for text in TEXT.values() for line in re.findall(r"python jobs/run\.py (.+)", text)]
    assert len(jobs) >= 2
    for job in jobs:
        assert (REPOSITORY / parse_arguments(shlex.split(job)).recipe).is_file()


@pytest.mark.parametrize("name", TEXT)
def test_links_and_named_files_exist(name: str) -> None:
    text, folder = TEXT[name], next(p.parent for p in DOCUMENTS if p.name == name)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (folder / target).exists(), target
    for path in re.findall(r"\b(?:jobs|serve_configs|docs|platform|tests)/[\w./-]+\.(?:py|yaml|json|md|png)", text):
        assert (REPOSITORY / path).exists(), path


def test_make_has_the_targets_it_is_said_to_have() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for text in TEXT.values():
        assert set(re.findall(r"^    make (\w+)", text, re.MULTILINE)) <= targets
    assert "make test" in (REPOSITORY / ".ci/run").read_text()


def test_platform_is_no_package() -> None:
    assert not (REPOSITORY / "platform/__init__.py").exists()
