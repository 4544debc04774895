"""The page's files: self-contained, allowed by its content security policy, legible in both colour schemes."""

import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "repkit" / "service" / "page"
STYLE = (PAGE / "style.css").read_text()
TOKENS = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)}


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def markup() -> list[tuple[str, dict[str, str | None]]]:
    parser = _Markup()
    parser.feed((PAGE / "index.html").read_text())
    return parser.found


def test_nothing_is_inline_and_every_file_is_here():
    for tag, given in markup():
        assert "style" not in given and not [name for name in given if name.startswith("on")], tag
        assert tag != "style" and (tag != "script" or given.get("src")), tag
        for name in ("src", "href"):
            if (given.get(name) or "#").startswith("/static/"):
                assert (PAGE / given[name].removeprefix("/static/")).is_file()
            else:
                assert (given.get(name) or "#").startswith("#")


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_no_file_names_another_host_or_makes_markup_of_text(path: Path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    for name in re.findall(r'from "([^"]+)"', text):
        assert (PAGE / name.removeprefix("/static/")).is_file()


def test_ids_are_unique_and_every_reference_has_its_target():
    ids = [given["id"] for _, given in markup() if "id" in given]
    assert len(ids) == len(set(ids))
    wanted = [given.get(name) for _, given in markup() for name in ("for", "aria-labelledby", "aria-describedby")]
    assert {one for one in wanted if one} <= set(ids)
    for path in PAGE.glob("*.js"):
        assert set(re.findall(r'\$\("([\w-]+)"\)', path.read_text())) <= set(ids) | {"count"}  # which page.js makes


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio, 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_contrast_of_black_on_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_contrasts_with_what_it_stands_on(scheme: int):
    for text, ground in product(("ink", "soft", "accent", "bad"), ("page", "card", "well")):
        assert contrast(TOKENS[text][scheme], TOKENS[ground][scheme]) >= 4.5, (text, ground)
    assert contrast(TOKENS["on-accent"][scheme], TOKENS["accent"][scheme]) >= 4.5
    for ground in ("page", "card"):  # the edges of controls
        assert contrast(TOKENS["edge"][scheme], TOKENS[ground][scheme]) >= 3


def test_no_colour_of_text_is_named_beside_the_tokens():
    rules = re.sub(r":root \{[^}]*\}", "", STYLE) + (PAGE / "compare.css").read_text()
    for value in re.findall(r"(?<![-\w])color: ([^;]+);", rules):
        assert re.fullmatch(r"var\(--[\w-]+\)|inherit", value), value
