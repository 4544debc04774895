"""Pictures of the service's page: `python benchmarks/page_pictures.py` makes docs/search-page.png and compare-page.png.

It exports bundled images with mini-unet, indexes and serves them, and looks at the page in headless Chromium.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import repkit
from repkit.datasets.fashion_mnist import write_folder

DOCS = Path(__file__).parent.parent / "docs"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
CLASS, POINT = "sandal", (0.74, 0.74)  # of width and height: the heel


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=60, help="images of each class")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no Chromium to look with; apt-get install chromium")
    with TemporaryDirectory() as folder:
        first = indexed(Path(folder), options.each)
        with serving(Path(folder) / "fashion-mnist") as address, browser(chromium) as window:
            look(window, f"{address}/#id={first}", "light", options.out / "search-page.png")
            compare(window, f"{address}/#id={first}", options.out / "compare-page.png")


def indexed(folder: Path, each: int) -> str:
    """Build an index of bundled images; the id of the one to search from."""
    images = write_folder(folder / "images", "train", each)
    extract = repkit.DiffusionExtractor(repkit.load("mini-unet"), ["up.0@50"])
    store = repkit.export(images, extract, folder / "features", pool="2x2")
    repkit.Index.build(store, kind="flat").save(folder / "fashion-mnist")
    return min(name for name in store.table["id"].to_pylist() if name.startswith(CLASS))


@contextmanager
def serving(index: Path) -> Iterator[str]:
    """The address of the service."""
    command = [sys.executable, "-m", "repkit.cli", "serve", str(index), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def browser(path: str) -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


def look(window: Any, address: str, scheme: str, out: Path) -> Any:
    """The page once all its pictures are there."""
    page = window.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=out)
    return page


def compare(window: Any, address: str, out: Path) -> None:
    """The compare view of the best other result, with a point clicked."""
    page = look(window, address, "dark", out)
    page.get_by_role("button", name="Compare").first.click()
    page.wait_for_load_state("networkidle")
    box = page.locator("dialog canvas, dialog img").first.bounding_box()
    with page.expect_response(lambda answer: "/v1/match" in answer.url):
        page.mouse.click(box["x"] + POINT[0] * box["width"], box["y"] + POINT[1] * box["height"])
    page.wait_for_timeout(500)
    page.screenshot(path=out)


if __name__ == "__main__":
    main()
