"""The page in a real browser, before a real service over Fashion-MNIST images as mini-unet sees them."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.page.browsing import Opener, hold, shown_ids, texts, until, wait_for_first, wait_for_others, wait_for_tiles
from tests.page.clothes import WIDE, Site, view

# The picture's next load, after which the page has heard of it too.
LOADED = """image => new Promise((done) => {
  image.addEventListener("load", done, { once: true });
  image.src = image.src;
})"""


def test_the_first_view_tells_what_made_the_index_and_offers_examples(open_page: Opener):
    page, _ = open_page()
    assert len(set(shown_ids(page))) == 18
    assert page.inner_text("h1") == "clothes"
    facts = page.inner_text("#facts").replace("\xa0", " ")
    assert facts.startswith("mini-unet · up.0@50 · 2x2 · 61 images · flat")
    page.click("summary:has(#facts)")
    assert "t 50, log-SNR 4.7862" in page.inner_text("#details")
    before = shown_ids(page)
    page.click("#others")
    wait_for_others(page, before)


def test_an_uploaded_picture_finds_its_like(open_page: Opener, site: Site):
    page, _ = open_page()
    shown_ids(page)
    page.set_input_files("#file", site.path(site.ids[7]))
    page.wait_for_selector(".score")
    assert shown_ids(page) == site.nearest(site.ids[7])
    assert page.inner_text("#found-title") == f"Most like {Path(site.ids[7]).name}"
    assert page.inner_text("#told").startswith("20 results.")
    assert "exact" in page.inner_text("#found-facts") and "61 vectors compared" in page.inner_text("#found-facts")
    assert texts(page, ".score")[0] == "1.000"
    bars = page.locator(".bar i").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.width) / 100)")
    assert np.allclose(bars, [float(text) for text in texts(page, ".score")], atol=6e-4)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(open_page: Opener, site: Site, way: str):
    page, _ = open_page()
    shown_ids(page)
    page.evaluate(
        """([way, bytes]) => {
          const carried = new DataTransfer();
          carried.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
          const given = { bubbles: true, cancelable: true };
          dispatchEvent(way === "drop" ? new DragEvent("drop", { ...given, dataTransfer: carried })
                                       : new ClipboardEvent("paste", { ...given, clipboardData: carried }));
        }""",
        [way, list(site.path(site.ids[3]).read_bytes())],
    )
    page.wait_for_selector(".score")
    assert shown_ids(page)[0] == site.ids[3]
    assert page.inner_text("#chosen-name") == "given.png"
    page.reload()  # a file is not in the address, so the first view comes back
    assert len(shown_ids(page)) == 18 and not page.is_visible("#chosen")


def test_a_click_on_a_result_searches_from_it_and_back_returns(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0]))
    assert shown_ids(page) == site.nearest(site.ids[0])
    other = site.nearest(site.ids[0])[4]
    page.focus(f'.tile[data-id="{other}"] .picture')
    page.keyboard.press("Enter")
    wait_for_first(page, other)
    assert shown_ids(page) == site.nearest(other)
    page.go_back()
    wait_for_first(page, site.ids[0])
    page.click("#clear")
    page.wait_for_function("() => document.querySelectorAll('.tile .score').length === 0")
    assert page.evaluate("location.hash") == ""


def test_filters_are_chips_that_come_off_and_parts_of_the_address(open_page: Opener, site: Site):
    page, _ = open_page(view(id=site.ids[0]))
    shown_ids(page)
    for label, count in (("bag", 7), ("coat", 13)):
        page.click(f'.toggle:has-text("{label}")')
        wait_for_tiles(page, count)
    assert shown_ids(page) == site.nearest(site.ids[0], allowed=lambda name: name.split("/")[0] in ("bag", "coat"))
    assert texts(page, ".chip") == ["label: bag", "label: coat"]
    assert page.get_attribute('.toggle:has-text("coat")', "aria-pressed") == "true"
    page.click('.chip:has-text("coat")')
    wait_for_tiles(page, 7)
    assert page.evaluate("new URLSearchParams(location.hash.slice(1)).get('where')") == '{"label":["bag"]}'
    page.goto(page.url.split("#")[0] + view(id=site.ids[0], where={"label": "nothing"}))
    page.wait_for_selector("#empty:not([hidden])")
    page.click("#empty button")
    wait_for_tiles(page, 20)


def test_a_bookmark_brings_the_whole_view_back(open_page: Opener, site: Site):
    bags = site.nearest(site.ids[0], 10, lambda name: name.startswith("bag/"))
    page, _ = open_page(view(id=site.ids[0], k=10, where={"label": "bag"}, compare=bags[1], at="0.25,0.75"))
    page.wait_for_selector("#answer:not(:empty)")
    assert shown_ids(page) == bags
    assert page.input_value("#k") == "10" and texts(page, ".chip") == ["label: bag"]
    assert (page.inner_text("#source-name"), page.inner_text("#target-name")) == (site.ids[0], bags[1])
    assert page.evaluate("document.querySelector('#source .cross').style.left") == "25%"
    page.go_back()
    page.go_forward()
    page.wait_for_selector("#compare[open] #answer:not(:empty)")


def test_nonsense_in_the_address_is_passed_over(open_page: Opener):
    page, _ = open_page("#k=7&where=[1&at=a,b&exact=x&other=%00")
    assert len(shown_ids(page)) == 18
    assert page.input_value("#k") == "20" and texts(page, ".chip") == []


def test_tiny_pictures_are_scaled_in_squares_and_large_ones_are_not(open_page: Opener, site: Site):
    page, _ = open_page()
    for name, how in ((WIDE, "auto"), (site.ids[0], "pixelated")):
        page.goto(page.url.split("#")[0] + view(id=name))
        wait_for_first(page, name)
        image = page.locator(f'.tile[data-id="{name}"] img')
        image.evaluate(LOADED)
        assert image.evaluate("image => getComputedStyle(image).imageRendering") == how


def test_the_count_and_the_filters_follow_changes(open_page: Opener, site: Site):
    page, _ = open_page()
    shown_ids(page)
    page.clock.install()
    page.reload()
    shown_ids(page)
    picture = {"file": site.path(site.ids[0]).read_bytes()}
    data = {"id": "new one", "metadata": json.dumps({"label": "a new kind"})}
    httpx.post(f"{site.origin}/v1/items/image", data=data, files=picture, timeout=60).raise_for_status()
    try:
        page.focus("#columns button")  # a filter that is in use is not drawn anew
        for _ in range(2):
            with page.expect_response("**/v1/columns") as answer:
                page.clock.fast_forward(11_000)
            answer.value.finished()
        assert page.inner_text("#count") == "62" and page.locator(".toggle", has_text="a new kind").count() == 0
        page.focus("#k")
        page.clock.fast_forward(11_000)
        page.click(".toggle:has-text('a new kind')")
        page.wait_for_selector(".chip:has-text('a new kind')")
        wait_for_tiles(page, 1)
        assert shown_ids(page) == ["new one"]
    finally:
        httpx.post(f"{site.origin}/v1/items/delete", json={"ids": ["new one"]}).raise_for_status()


def failing(page, status: int, message: str, code: str = "c", **headers: str) -> None:
    body = json.dumps({"error": {"code": code, "message": message}})
    page.route("**/v1/search*", lambda one: one.fulfill(status=status, body=body, headers=headers))


def test_a_busy_server_is_waited_for(open_page: Opener):
    page, watched = open_page()
    watched.expected.add(429)
    shown_ids(page)
    failing(page, 429, "64 searches wait already", **{"Retry-After": "3"})
    page.click("button.picture >> nth=0")
    page.wait_for_selector("#banner:not([hidden])")
    assert "64 searches wait already. Wait 3 seconds and try again." in page.inner_text("#banner")
    assert page.get_attribute("#banner", "role") == "alert"
    page.unroute("**/v1/search*")
    page.click("#banner button")
    page.wait_for_selector(".score")
    assert not page.is_visible("#banner")


@pytest.mark.parametrize(("status", "advice"), [(0, "still running"), (413, "smaller file"), (422, "another file")])
def test_a_failure_says_what_to_do(open_page: Opener, status: int, advice: str):
    page, watched = open_page()
    watched.expected.add(status)
    shown_ids(page)
    page.route("**/v1/search", lambda one: one.abort()) if status == 0 else failing(page, status, "so it is")
    page.click("button.picture >> nth=0")
    page.wait_for_selector("#banner:not([hidden])")
    assert advice in page.inner_text("#banner")
    assert page.is_visible("#banner button") == (status == 0)


def test_skeletons_stand_in_while_an_answer_takes_its_time(open_page: Opener):
    page, _ = open_page()
    shown_ids(page)
    held = hold(page, "/v1/search")
    page.click("button.picture >> nth=0")
    page.wait_for_selector(".tile.waiting")
    assert page.get_attribute("#grid", "aria-busy") == "true"
    until(page, lambda: held)
    held[0].continue_()
    page.wait_for_selector(".score")
    assert page.get_attribute("#grid", "aria-busy") is None and page.locator(".waiting").count() == 0


def test_an_older_search_never_overwrites_a_newer_one(open_page: Opener, site: Site):
    page, watched = open_page(view(id=site.ids[0]))
    watched.expected.add(0)  # the older request is given up
    shown_ids(page)
    held = hold(page, "/v1/search")
    page.evaluate("name => (location.hash = `id=${encodeURIComponent(name)}`)", site.ids[8])
    page.wait_for_selector(".waiting")
    page.evaluate("name => (location.hash = `id=${encodeURIComponent(name)}`)", site.ids[20])
    until(page, lambda: len(held) == 2)
    held[1].continue_()
    page.wait_for_selector(".score")
    assert shown_ids(page) == site.nearest(site.ids[20])
