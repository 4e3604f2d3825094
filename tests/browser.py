"""A real browser without a network, and what a page did in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, sync_playwright

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@dataclass
class PageLog:
    """What a page asked for and complained of."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def open_page(
    address: str, profile: Path, width: int = 1200, scheme: Literal["light", "dark"] = "light"
) -> Iterator[tuple[Page, PageLog]]:
    """A page from the disk or a server, in a browser with a profile of its own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is missing; `make test` installs it for root, else: apt-get install chromium")
    log = PageLog()

    def note_complaint(message: Any) -> None:
        if message.type in ("error", "warning"):
            log.complaints.append(message.text)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=list(FLAGS),
            viewport={"width": width, "height": 900}, color_scheme=scheme,
        )  # fmt: skip
        try:
            page = browser.pages[0]
            page.set_default_timeout(20_000)
            page.on("console", note_complaint)
            page.on("pageerror", lambda error: log.complaints.append(str(error)))
            page.on("request", lambda request: log.requests.append(request.url))
            page.goto(address)
            yield page, log
        finally:
            browser.close()
