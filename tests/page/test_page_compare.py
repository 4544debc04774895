"""The page's compare view in a real browser: points by mouse and keyboard, heat maps, answers in any order."""

from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest

from tests.page.browsing import Opener, asked, hold, shown_ids, until
from tests.page.clothes import WIDE, WIDE_SIZE, Site, view

# Read from a copy: a canvas that is read again and again makes Chromium complain.
HEAT = """canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return Array.from(copy.getImageData(0, 0, canvas.width, canvas.height).data);
}"""


def answer_of(site: Site, source: str, target: str, point: tuple[float, float]) -> dict[str, Any]:
    """The service's answer to the same question, asked without the page."""
    fields = {"source_id": source, "target_id": target, "point": f"{point[0]},{point[1]}"}
    form = {name: (None, text) for name, text in fields.items()}
    return httpx.post(f"{site.origin}/v1/match", files=form, timeout=60).raise_for_status().json()


def cross(page: Any, side: str) -> np.ndarray:
    """Where the cross is, as fractions of the picture, by what is on the screen."""
    mark, picture = (page.locator(f"#{side} {one}").bounding_box() for one in (".cross svg", "img"))
    return np.array(
        [
            (mark[edge] + mark[length] / 2 - picture[edge]) / picture[length]
            for edge, length in (("x", "width"), ("y", "height"))
        ]
    )


def heat(page: Any) -> np.ndarray:
    """The colours [h w 4] of the heat map."""
    canvas = page.locator("#target canvas")
    size = canvas.evaluate("canvas => [canvas.height, canvas.width]")
    return np.array(canvas.evaluate(HEAT)).reshape(*size, 4)


def answered(page: Any, old: str = "") -> str:
    """The line of the answer, once it is another than `old`."""
    page.wait_for_function(
        "old => ![old, ''].includes(document.getElementById('answer').textContent) "
        "&& !document.getElementById('target').hasAttribute('aria-busy')",
        arg=old,
    )
    return page.inner_text("#answer")


def pixels(at: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fractions of a picture's sides as pixels, of which the first one's centre is 0."""
    return at * np.array(size) - 0.5


def check(page: Any, site: Site, source: str, target: str, at: np.ndarray, size: tuple[int, int] = (28, 28)) -> None:
    """What is shown for a point is what the service answers: the cross, the score and the hottest cell."""
    found = answer_of(site, source, target, tuple(pixels(at, size)))
    place = np.array([found["best"]["place"]["x"], found["best"]["place"]["y"]])
    target_size = found["target"]["width"], found["target"]["height"]
    assert np.allclose(pixels(cross(page, "target"), target_size), place, atol=0.05 * max(target_size) / 28)
    assert f"cosine {found['best']['score']:.3f}" in page.inner_text("#answer")
    grid, shown = np.array(found["heat"]["grid"]), heat(page)
    assert shown.shape == (*grid.shape, 4)
    light = shown[..., :3] @ [0.2126, 0.7152, 0.0722]
    assert np.unravel_index(light.argmax(), grid.shape) == np.unravel_index(grid.argmax(), grid.shape)
    assert np.corrcoef(light.ravel(), grid.ravel())[0, 1] > 0.9


def test_a_click_shows_where_the_point_is_in_the_other_picture(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0]))
    other = shown_ids(page)[2]
    page.click(f'.tile[data-id="{other}"] .compare')
    first = answered(page)
    check(page, site, site.ids[0], other, np.array([0.5, 0.5]))
    before = heat(page)
    box = page.locator("#source img").bounding_box()
    count = len(asked(watched, "/v1/match"))
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.7 * box["height"])
    answered(page, first)
    assert np.allclose(cross(page, "source"), [0.25, 0.7], atol=0.005)
    check(page, site, site.ids[0], other, cross(page, "source"))
    assert (heat(page) != before).any(2).mean() > 0.5
    assert len(asked(watched, "/v1/match")) == count + 1


def test_arrow_keys_move_the_cross_and_enter_asks(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0]))
    other = shown_ids(page)[1]
    page.focus(f'.tile[data-id="{other}"] .compare')
    page.keyboard.press("Enter")
    first = answered(page)
    assert page.evaluate("document.activeElement.id") == "source"
    count = len(asked(watched, "/v1/match"))
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+ArrowDown"):
        page.keyboard.press(key)
    at = np.array([0.5 - 2 / 28, 0.5 + 4 / 28])
    assert np.allclose(cross(page, "source"), at, atol=0.002) and page.inner_text("#answer") == first
    assert len(asked(watched, "/v1/match")) == count
    page.keyboard.press("Enter")
    answered(page, first)
    check(page, site, site.ids[0], other, at)
    page.keyboard.press("Escape")
    page.wait_for_function("() => !location.hash.includes('compare=')")
    assert not page.is_visible("#compare")
    assert page.evaluate("document.activeElement.className").split() == ["quiet", "compare"]


def test_the_sides_can_be_swapped_and_the_point_goes_along(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0], compare=site.ids[9], at="0.3,0.3"))
    answered(page)
    there = cross(page, "target")
    page.click("#swap")
    page.wait_for_function("name => document.getElementById('source-name').textContent === name", arg=site.ids[9])
    answered(page)
    assert np.allclose(cross(page, "source"), there, atol=0.005)
    check(page, site, site.ids[9], site.ids[0], cross(page, "source"))


def test_the_heat_map_can_be_faded_and_put_out(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0], compare=site.ids[9]))
    answered(page)
    page.fill("#opacity", "30")
    assert page.locator("#target canvas").evaluate("canvas => getComputedStyle(canvas).opacity") == "0.3"
    page.click("#heat")
    assert not page.is_visible("#target canvas") and page.is_disabled("#opacity")


def test_the_next_result_takes_the_place_of_this_one(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0]))
    ids = shown_ids(page)
    page.click(f'.tile[data-id="{ids[1]}"] .compare')
    answered(page)
    page.click("#next")
    page.wait_for_function("name => document.getElementById('target-name').textContent === name", arg=ids[2])
    answered(page)
    check(page, site, ids[0], ids[2], np.array([0.5, 0.5]))


def test_only_the_last_of_many_points_is_asked_and_shown(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0], compare=site.ids[9]))
    first = answered(page)
    held = hold(page, "/v1/match", most=1)
    box = page.locator("#source img").bounding_box()
    for part in (0.1, 0.3, 0.6, 0.85):
        page.mouse.click(box["x"] + part * box["width"], box["y"] + part * box["height"])
    until(page, lambda: held)
    assert len(asked(watched, "/v1/match")) == 2
    held[0].continue_()
    page.wait_for_function("() => !document.getElementById('target').hasAttribute('aria-busy')")
    assert page.inner_text("#answer") != first
    assert len(asked(watched, "/v1/match")) == 3
    check(page, site, site.ids[0], site.ids[9], cross(page, "source"))
    assert np.allclose(cross(page, "source"), 0.85, atol=0.005)


def test_an_answer_for_other_pictures_is_dropped(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0]))
    watched.expected.add(0)  # the request for the first picture is given up
    ids = shown_ids(page)
    held = hold(page, "/v1/match", most=1)
    page.click(f'.tile[data-id="{ids[1]}"] .compare')
    until(page, lambda: held)
    page.click("#next")
    answered(page)
    check(page, site, ids[0], ids[2], np.array([0.5, 0.5]))


def test_points_are_pixels_of_the_picture_and_not_of_what_is_shown_of_it(open_page: Opener, site: Site):
    page, _ = open_page(view(id=WIDE, compare=site.ids[0], at="0.6,0.25"))
    answered(page)
    check(page, site, WIDE, site.ids[0], np.array([0.6, 0.25]), WIDE_SIZE)


def test_what_the_model_does_not_see_has_no_heat_and_no_match(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0], compare=WIDE))
    watched.expected.add(422)
    first = answered(page)
    canvas, picture = (page.locator(f"#target {one}").bounding_box() for one in ("canvas", "img"))
    assert (canvas["x"] - picture["x"]) / picture["width"] == pytest.approx(0.25, abs=0.01)  # the crop of 2:1 to 1:1
    assert canvas["width"] / picture["width"] == pytest.approx(0.5, abs=0.01)
    page.click("#swap")
    page.wait_for_function("name => document.getElementById('source-name').textContent === name", arg=WIDE)
    answered(page)
    box = page.locator("#source img").bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    page.wait_for_selector("#answer.failed")
    assert "crop" in page.inner_text("#answer") and not page.is_visible("#target canvas")
    assert first != page.inner_text("#answer")


def test_an_upload_can_be_compared_whatever_its_name(open_page: Opener, site: Site):
    page, _ = open_page()
    shown_ids(page)
    name, content = '<img src=x onerror="window.hacked = 1">', site.path(site.ids[30]).read_bytes()
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
    page.wait_for_selector(".score")
    other = shown_ids(page)[3]
    page.click(f'.tile[data-id="{other}"] .compare')
    answered(page)
    check(page, site, site.ids[30], other, np.array([0.5, 0.5]))
    assert page.inner_text("#source-name") == name and page.inner_text("#target-name") == other
    assert page.evaluate("window.hacked") is None


def test_the_colours_of_the_heat_map_get_lighter_evenly(open_page: Opener):
    page, _ = open_page()
    colours = np.array(page.evaluate("import('/static/heat.js').then((heat) => heat.COLOURS)"))
    assert colours.shape == (256, 3) and colours.min() >= 0 and colours.max() <= 255
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, 24389 / 27 * y)  # CIE L*, 0 to 100
    steps = np.array([later - earlier for earlier, later in pairwise(lightness[::15])])
    assert lightness[0] < 8 and lightness[-1] > 90
    assert steps.min() > 0.6 * steps.mean() and steps.max() < 1.5 * steps.mean()
