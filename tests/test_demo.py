"""The tour at its smallest: one page that holds all it shows."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from repkit import cli
from repkit.store import FeatureStore
from repkit.tasks import demo
from repkit.tasks.demo import Tour, run_demo
from repkit.tasks.page import Cell, Neighbours, Table, Verdict, write_page
from tests.export_cases import hashes

MODELS = ("mini-unet", "mini-dit")
SMALL = Tour(train=5, test=2, times=(50, 200), evaluations=2, fitted=5)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether what was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, text: str) -> None:
        self.words += text


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The folder that a small tour wrote."""
    out = tmp_path_factory.mktemp("tour")
    assert run_demo(out, tour=SMALL) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(tour):
    return Page((tour / "index.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_filled(page):
    assert page.open == []
    assert page.tags[0][0] == "html"
    assert "$" not in page.words


def test_the_page_needs_nothing_else(tour, page):
    text = (tour / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|file:", text)
    for tag, attributes in page.tags:
        assert all(not (value or "").startswith(("/", "http", ".")) for value in attributes.values()), (tag, attributes)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    with Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2]))) as picture:
        assert picture.size == (28, 28)


def test_both_models_are_shown_with_all_their_cells(tour, page):
    headings = re.findall(r"<h3>(.*?)</h3>", (tour / "index.html").read_text(encoding="utf-8"))
    assert headings == list(MODELS)
    cells = sum(tag == "td" for tag, _ in page.tags)
    assert cells == 2 * (7 + 8) * len(SMALL.times)  # trained and untrained; 7 and 8 blocks
    assert sum(attributes.get("class") == "chosen" for tag, attributes in page.tags if tag == "td") == 2
    assert "trained on 50 images and tested on 20 " in " ".join(page.words.split())


def test_pictures_are_of_all_parts(page):
    count = sum(tag == "img" for tag, _ in page.tags)
    assert count == 8 * (1 + 7) + 10 + 10 * (1 + 7)  # neighbours, verdicts, maps of 7 blocks under the images


def test_figures_on_the_page_are_those_of_the_stores(tour, page):
    from repkit.tasks.probe import probe_store

    for name in MODELS:
        for network in (name, f"{name}-untrained"):
            report = probe_store(FeatureStore(next((tour / "features").glob(f"{network}-????????"))))
            assert f"{report.test:.1%}" in page.words
            assert report.key in page.words


def test_a_second_run_keeps_the_features(tour, monkeypatch):
    before = hashes(tour / "features")
    monkeypatch.setattr("repkit.extractors.DiffusionExtractor.__call__", _not_again)
    monkeypatch.setattr(demo, "_colors", lambda *_: [])
    run_demo(tour, MODELS, SMALL)
    assert hashes(tour / "features") == before


def _not_again(*_: object) -> None:
    raise AssertionError("features were there already")


def test_the_command_says_where_the_page_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda out: out / "index.html")
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "-o", str(tmp_path)])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"


def test_a_tour_ends_well_where_no_temperature_can_be_fitted(tmp_path):
    """One labelled image is right or wrong at any temperature."""
    images = demo._write_images(tmp_path, Tour(train=1, test=1))
    small = Tour(train=1, test=1, evaluations=2, fitted=1)
    calibrated, verdicts = demo._verdicts(demo.load("mini-unet"), images, small, queries=2)
    assert not calibrated
    assert [sum(p for _, p in verdict.posterior) for verdict in verdicts] == pytest.approx([1, 1])
    assert "only their order counts" in demo._temperature(calibrated, 1)


def test_what_is_shown_is_escaped(tmp_path):
    picture, nasty = Image.new("RGB", (2, 2)), '<b>"&'
    table = Table(nasty, ["mid"], [1], {("mid", 1): Cell(0.5, 0.4)}, nasty, 0.5, (0.4, 0.6), 0.4, nasty, 0.3)
    facts = dict.fromkeys(
        ("train", "test", "pooling", "model", "evaluations", "temperature", "shown", "seconds", "threads"), nasty
    )
    path = write_page(
        tmp_path / "page.html",
        tables=[table],
        neighbours=[Neighbours(picture, nasty, [(picture, nasty, 0.9)])],
        verdicts=[Verdict(picture, nasty, [(nasty, 1.0)])],
        colors=[(nasty, [picture])],
        facts=facts,
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert nasty in page.words
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [nasty] * 4
