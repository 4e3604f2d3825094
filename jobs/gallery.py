"""Makes the pictures of docs/gallery.md anew, from real runs: `make gallery`, some eight minutes on two cores.

Terminal pictures are what a command said in a terminal of its own, colours included; pages are what a browser drew of
them. Only the folder it all runs in is written as ~/project.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pyte
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/gallery"
RECIPE = "jobs/recipes/own-text.yaml"
COLUMNS, LINES, HISTORY = 118, 50, 2000
STARTED_S = 120
COLOURS = {"brown": "yellow"}  # names of pyte that rich calls otherwise
BROWSER = ("--no-sandbox", "--disable-gpu")


def main() -> None:
    """Run everything in a folder of its own."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gallery") as name:
        folder = Path(name)
        for part in ("jobs/recipes", "platform/overproof"):  # the recipe's data are the latter
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        terminal = Terminal(folder)
        terminal.picture("plan", f"overproof plan {RECIPE}")
        terminal.picture("run", f"overproof run {RECIPE}", keep_from="own-text")
        report = newest(folder / "store/own-text", "report")
        verdict = json.loads((newest(folder / "store/own-text", "gate") / "verdict.json").read_text())
        refused = f"overproof run {RECIPE} --set gate.rules.0.at_least=0.97"
        terminal.picture("refused", refused, keep_from="own-text", code=1)
        terminal.picture("pick", f"overproof pick {RECIPE} --max-mb 0.2")
        terminal.picture("show", "overproof show own-text/package")
        terminal.picture("ls", "overproof ls")
        shutil.copy(report / "report.png", PICTURES / "frontier.png")
        with browser() as page:
            shoot(page, f"file://{report}/report.html", "report", height=1500)
            tensorboard(folder, page)
            served(folder, terminal, page, verdict)
    print(f"{PICTURES}: {sum(path.stat().st_size for path in PICTURES.iterdir()) / 1e6:.1f} MB")


class Terminal:
    """Runs commands in a terminal, and draws what they say."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TERM": "xterm-256color",
            "COLUMNS": str(COLUMNS),
            "LINES": str(LINES),
            "OMP_NUM_THREADS": "1",
            "XDG_STATE_HOME": str(folder / "state"),
            **environment,
        }

    def picture(self, name: str, command: str, keep_from: str | None = None, code: int = 0) -> None:
        """Draw a command and what it says, of which lines before one that begins so are left out."""
        screen = self.run(command, code)
        lines = [self._text(line) for line in (*screen.history.top, *(screen.buffer[row] for row in range(LINES)))]
        while lines and not lines[-1].plain.strip():
            lines.pop()
        if keep_from is not None:
            first = max(i for i, line in enumerate(lines) if line.plain.strip() == keep_from)
            lines = [Text("..."), *lines[first:]]
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(Text("$ ", "bold green") + Text(command, "bold"))
        for line in lines:
            console.print(line, soft_wrap=True)
        console.save_svg(str(PICTURES / f"{name}.svg"), title="overproof", theme=SVG_EXPORT_THEME)

    def run(self, command: str, code: int = 0) -> Any:
        """Run a command, and give the screen as it leaves it."""
        print(command, flush=True)
        screen = pyte.HistoryScreen(COLUMNS, LINES, HISTORY, ratio=1e-9)
        stream = pyte.ByteStream(screen)
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(self.folder)
            os.execvpe("bash", ["bash", "-c", command], self.environment)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        while True:
            try:
                said = os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not said:
                break
            stream.feed(said)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if ended != code:
            raise SystemExit(f"{command}: exit code {ended}, expected {code}:\n" + "\n".join(screen.display))
        return screen

    def _text(self, line: Any) -> Text:
        text = Text()
        for (colour, bold), cells in groupby((line[i] for i in range(COLUMNS)), key=lambda cell: (cell.fg, cell.bold)):
            named = COLOURS.get(colour, colour)
            named = f"#{named}" if re.fullmatch("[0-9a-f]{6}", named) else named.replace("bright", "bright_")
            style = Style(color=None if named == "default" else named, bold=bold)
            text.append("".join(cell.data for cell in cells), style)
        text.rstrip()
        plain = text.plain.replace(str(self.folder), "~/project")
        return text if plain == text.plain else Text(plain)


def newest(recipe: Path, stage: str) -> Path:
    """The artifact of a stage that was made last."""
    return max(recipe.glob(f"{stage}-*"), key=lambda path: path.stat().st_mtime)


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is missing: apt-get install chromium (or your system's way)")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=list(BROWSER)) as opened,
    ):
        yield opened.new_page()


def shoot(page: Page, address: str, name: str, height: int = 900, wait_for: str | None = None) -> None:
    """A picture of an address, as wide as a laptop's window."""
    print(name, flush=True)
    page.set_viewport_size({"width": 1280, "height": height})
    page.goto(address)
    if wait_for is not None:
        page.get_by_text(wait_for).first.wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


@contextmanager
def running(terminal: Terminal, command: str, until: str) -> Iterator[str]:
    """A command that stays up, and what it has said."""
    log = terminal.folder / "log"
    with log.open("w") as said:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=terminal.folder, env=terminal.environment, stdout=said, stderr=said
        )
    try:
        deadline_s = time.monotonic() + STARTED_S
        while until not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"{command}: {log.read_text()}")
            time.sleep(0.2)
        yield log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def tensorboard(folder: Path, page: Page) -> None:
    """The dashboard's HParams tab."""
    with running(Terminal(folder), f"overproof dashboard {RECIPE} --port 0", "until Ctrl-C") as said:
        address = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert address is not None
        shoot(page, f"{address[0]}#timeseries", "tensorboard", wait_for="validation_loss")
        shoot(page, f"{address[0]}?gallery#hparams", "hparams", wait_for="Hyperparameters")


def served(folder: Path, terminal: Terminal, page: Page, verdict: dict[str, Any]) -> None:
    """A cluster on this machine, a canary on it, and the page to try a model."""
    said = subprocess.run(
        ["overproof", "up"], env=terminal.environment, cwd=folder, capture_output=True, text=True, check=True
    )
    exported = dict(line.removeprefix("export ").split("=", 1) for line in said.stdout.splitlines())
    here = Terminal(folder, **exported)
    try:
        here.picture("deploy", "overproof deploy own-text/package --set port=8123")
        name = next(c["name"] for c in verdict["candidates"] if c["passed"] and c["name"] != verdict["chosen"])
        here.run(f"overproof run {RECIPE} --set gate.candidate={name}")
        here.picture("canary", "overproof deploy own-text/package --canary --set canary.share=0.5")
        with httpx.Client(base_url="http://127.0.0.1:8123", trust_env=False, timeout=60) as client:
            for number in range(80):
                body = {"model": "own-text", "prompt": "def ", "max_tokens": 24, "user": f"person-{number}"}
                client.post("/v1/completions", json=body).raise_for_status()
        here.picture("deployments", "overproof deployments")
        shoot(page, "http://127.0.0.1:8123/docs", "docs", wait_for="/v1/completions")
    finally:
        subprocess.run(["overproof", "down"], env=here.environment, cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    main()
