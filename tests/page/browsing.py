"""A real browser, whose requests and complaints are kept, and waits for what it shows or asks."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 15_000  # milliseconds that a busy machine may take for what is awaited


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, without a window; skips the tests where it or playwright is absent."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium; apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """What pages have done: addresses asked for, complaints and dialogs; `expected`: HTTP errors of the test's own."""

    origin: str
    requests: list[Any] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    expected: set[int] = field(default_factory=set)

    def check(self) -> None:
        """No request left the origin, no dialog was opened, and nothing was complained of that was not expected."""
        local = (self.origin, f"blob:{self.origin}")
        away = [one.url for one in self.requests if not one.url.startswith(local)]
        assert not away and not self.dialogs, (away, self.dialogs)
        told = [f"status of {status}" for status in self.expected] + (["ERR_"] if 0 in self.expected else [])
        problems = [one for one in self.problems if not any(text in one for text in told)]
        assert not problems, problems


def watch(page: Any, watched: Watched) -> None:
    """Keep what a page does from now on."""

    def complain(one: Any) -> None:
        if one.type in ("error", "warning"):
            watched.problems.append(one.text)

    def dismiss(one: Any) -> None:
        watched.dialogs.append(one.message)
        one.dismiss()

    page.on("request", lambda one: watched.requests.append(one))
    page.on("console", complain)
    page.on("pageerror", lambda error: watched.problems.append(str(error)))
    page.on("dialog", dismiss)


Opener = Callable[..., tuple[Any, Watched]]


@contextmanager
def opener(browser: Any, origin: str) -> Iterator[Opener]:
    """A function that opens the page at a "#..." in a fresh profile; at the end all that was watched is checked."""
    opened: list[tuple[Any, Watched]] = []

    def open_page(view: str = "", **options: Any) -> tuple[Any, Watched]:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE)
        page, watched = context.new_page(), Watched(origin)
        watch(page, watched)
        opened.append((context, watched))
        page.goto(f"{origin}/{view}")
        return page, watched

    yield open_page
    for context, watched in opened:
        context.close()
        watched.check()


def texts(page: Any, selector: str) -> list[str]:
    """What the elements say, in their order."""
    return page.locator(selector).all_text_contents()


def shown_ids(page: Any) -> list[str]:
    """The ids of the grid, once there is a grid."""
    page.locator("#grid .tile:not(.waiting)").first.wait_for()
    return page.locator("#grid .tile").evaluate_all("tiles => tiles.map((tile) => tile.dataset.id)")


def wait_for_first(page: Any, name: str) -> None:
    """Wait until an item is the first of the grid, as the query is in its own results."""
    page.wait_for_function("name => document.querySelector('#grid .tile')?.dataset.id === name", arg=name)


def wait_for_tiles(page: Any, count: int) -> None:
    """Wait until the grid has so many items."""
    page.wait_for_function(
        "count => document.querySelectorAll('#grid .tile:not(.waiting)').length === count", arg=count
    )


def wait_for_others(page: Any, before: list[str]) -> None:
    """Wait until the grid has other items than before, or the same in another order."""
    page.wait_for_function(
        """before => {
          const shown = [...document.querySelectorAll("#grid .tile:not(.waiting)")].map((tile) => tile.dataset.id);
          return shown.length > 0 && shown.join("\\n") !== before.join("\\n");
        }""",
        arg=before,
    )


def until(page: Any, holds: Callable[[], object]) -> None:
    """Take in what the browser tells of requests until something holds."""
    end = monotonic() + PATIENCE / 1000
    while not holds():
        assert monotonic() < end, "what was awaited did not come"
        page.evaluate("() => null")  # what it told before the answer to this has been taken in then


def asked(watched: Watched, path: str) -> list[Any]:
    """The requests for a path."""
    return [one for one in watched.requests if urlsplit(one.url).path == path]


def hold(page: Any, path: str, most: int | None = None) -> list[Any]:
    """The requests for a path from now on, which wait until one goes on with them; `most`: only the first so many."""
    held: list[Any] = []

    def take(one: Any) -> None:
        if most is not None and len(held) >= most:
            one.continue_()
        else:
            held.append(one)

    page.route(f"**{path}", take)
    return held
