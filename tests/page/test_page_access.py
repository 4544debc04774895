"""The page for every eye and hand: names, focus, landmarks, colour schemes, narrow screens, motion."""

from typing import Any

import pytest

from tests.page.browsing import Opener, hold, shown_ids
from tests.page.clothes import Site, view

SIZES = {"narrow": {"width": 360, "height": 740}, "wide": {"width": 1280, "height": 800}}

# What assistive software would call each control: aria-label, aria-labelledby, a label, or the text inside.
NAMES = """() => [...document.querySelectorAll("button, input, select, summary, a, dialog, [tabindex='0']")]
  .filter((one) => one.checkVisibility({ visibilityProperty: true }) || one.matches("dialog"))
  .map((one) => [one.outerHTML.slice(0, 80), (one.getAttribute("aria-label") ??
    (document.getElementById(one.getAttribute("aria-labelledby"))?.textContent || one.labels?.[0]?.textContent) ??
    one.textContent).trim()])"""

# Whether the focused element, or the box that stands for it, has an outline that can be seen, and where it is.
FOCUS = """() => {
  const one = document.activeElement;
  const seen = [one, one.closest(".drop")].find((box) => box && parseFloat(getComputedStyle(box).outlineWidth) >= 2
    && getComputedStyle(box).outlineStyle !== "none");
  const box = one.getBoundingClientRect();
  return [one.id || one.className || one.tagName, Boolean(seen), box.right > 0 && box.bottom > 0];
}"""


@pytest.fixture(params=["first", "search", "compare"])
def shown(request: pytest.FixtureRequest, site: Site) -> str:
    """The address of a view."""
    views = {"first": "", "search": view(id=site.ids[0], where={"label": ["bag", "coat"]})}
    return views.get(request.param, view(id=site.ids[0], compare=site.ids[9]))


def ready(page: Any) -> None:
    shown_ids(page)
    if "compare=" in page.url:
        page.wait_for_selector("#answer:not(:empty)")


def test_every_control_has_a_name_and_every_picture_a_text(open_page: Opener, shown: str):
    page, _ = open_page(shown)
    ready(page)
    names = page.evaluate(NAMES)
    assert len(names) > 10 and [html for html, name in names if not name] == []
    spoken = page.locator(".tile .picture").evaluate_all("all => all.map((one) => one.ariaLabel)")
    assert all(one.startswith("Search from ") for one in spoken) and len(set(spoken)) == len(spoken)
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("canvas:not([role=img][aria-label]):not([aria-hidden=true])").count() == 0


def test_landmarks_headings_and_what_is_read_aloud(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0]))
    ready(page)
    assert page.get_attribute("html", "lang") == "en" and page.title() == "clothes · repkit search"
    assert page.locator("main").count() == page.locator("body > header").count() == page.locator("h1").count() == 1
    assert page.locator("section:not([aria-labelledby])").count() == 0
    assert page.get_attribute("#told", "aria-live") == page.get_attribute("#answer", "aria-live") == "polite"
    assert page.inner_text("#told").startswith("20 results.")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(open_page: Opener, shown: str):
    page, _ = open_page(shown)
    ready(page)
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        name, seen, inside = page.evaluate(FOCUS)
        assert name == "BODY" or (seen and inside), name  # BODY: the browser's own controls come in between
        reached.append(name)
    wanted = {"": ("skip", "theme", "file", "k", "others"), "#id": ("skip", "theme", "file", "clear", "k", "toggle")}
    compare = ("swap", "close", "next", "source", "heat", "opacity")
    assert set(compare if "compare=" in shown else wanted[shown[:3]]) <= set(reached)


def test_the_first_tab_leads_past_everything_to_the_results(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0]))
    ready(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results" and "id=" in page.url


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_screen(open_page: Opener, shown: str, size: str):
    page, _ = open_page(shown, viewport=SIZES[size])
    ready(page)
    width = SIZES[size]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    edges = page.locator("button, select, .tile, .stage").evaluate_all(
        "all => all.filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect())"
        ".map((box) => [box.left, box.right])"
    )
    assert all(left >= -0.5 and right <= width + 0.5 for left, right in edges)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_follow_the_system_until_a_theme_is_chosen(open_page: Opener, scheme: str):
    page, _ = open_page("", color_scheme=scheme)
    ready(page)
    grounds = {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 23, 28)"}
    ground = "getComputedStyle(document.body).backgroundColor"
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate(ground) == grounds[scheme]
    assert page.get_attribute("#theme", "aria-pressed") == str(scheme == "dark").lower()
    page.click("#theme")
    assert page.evaluate(ground) == grounds[other]
    page.reload()
    assert page.evaluate(ground) == grounds[other]


def test_nothing_moves_for_those_who_ask_for_that(open_page: Opener, site: Site):
    page, _ = open_page("", reduced_motion="reduce")
    shown_ids(page)
    hold(page, "/v1/search")
    page.click("button.picture >> nth=0")
    page.wait_for_selector(".tile.waiting")
    assert page.evaluate("document.getAnimations().length") == 0
