"""The page in a real browser, before a service that asks for a key, has no pictures and holds hostile text."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

import repkit
from repkit.service.keys import Keys
from repkit.service.settings import Settings
from tests.page.browsing import Opener, asked, opener, shown_ids, texts, until, wait_for_first, wait_for_tiles
from tests.page.clothes import Clothes, view
from tests.service_cases import running

KEY = "a key of the tests, long enough"
KEYS = Keys(read=frozenset([hashlib.sha256(KEY.encode()).digest()]))
SCRIPT = "<script>window.hacked = 1</script>"
PICTURE = '<img src=x onerror="window.hacked = 1">\'"&amp;'
ODD = ["..", "a/../b", "what?x=1#y", "50%2Fhalf", "ünï çode 漢字", "javascript:alert(1)", PICTURE, SCRIPT]
PLAIN = [f"item {row}" for row in range(40)]


@pytest.fixture(scope="module")
def origin(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("index") / SCRIPT.replace("/", "")
    ids, rng = PLAIN + ODD, np.random.default_rng(0)
    columns = {
        "label": [PICTURE if name in ODD else "plain" for name in ids],
        SCRIPT: [SCRIPT, "other"] * (len(ids) // 2),
        "weight": [float(row) / 2 for row in range(len(ids))],
        "fresh": [row % 3 == 0 for row in range(len(ids))],
    }
    repkit.Index.build(rng.standard_normal((len(ids), 8)), ids=ids, metadata=columns).save(folder)
    with running(Settings(index=folder, keys=KEYS)) as (origin, _):
        yield origin


@pytest.fixture
def open_page(browser: object, origin: str) -> Iterator[Opener]:
    """Opens the page with the key given."""
    with opener(browser, origin) as open_bare:

        def open_page(view: str = "", key: bool = True):
            page, watched = open_bare(view)
            watched.expected.add(401)
            page.wait_for_selector("#key:not([hidden])")
            if key:
                give_key(page, KEY)
                page.wait_for_selector("#key", state="hidden")
            return page, watched

        yield open_page


def give_key(page, key: str) -> None:
    page.fill("#key-field", key)
    page.keyboard.press("Enter")


def test_the_key_is_asked_for_and_kept_for_the_tab(open_page: Opener, origin: str):
    page, watched = open_page(key=False)
    assert not page.is_visible("main") and page.evaluate("document.activeElement.id") == "key-field"
    give_key(page, "not the key")
    page.wait_for_selector("#key-note.failed")
    assert "does not know this key" in page.inner_text("#key-note") and not page.is_visible("main")
    give_key(page, KEY)
    assert shown_ids(page)
    page.reload()
    assert shown_ids(page) and not page.is_visible("#key")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert not any(KEY.split()[-1] in one.url for one in watched.requests)


def test_pictures_are_asked_for_with_the_key(browser: object, clothes: Clothes):
    settings = clothes.settings(keys=KEYS, model="none")
    with running(settings) as (origin, _), opener(browser, origin) as open_page:
        page, watched = open_page()
        watched.expected.add(401)
        page.wait_for_selector("#key:not([hidden])")
        give_key(page, KEY)
        page.wait_for_function("() => document.querySelector('.tile img')?.naturalWidth > 0")
        sent = asked(watched, "/v1/thumbnails")
        assert sent and {one.headers.get("authorization") for one in sent} == {f"Bearer {KEY}"}
        assert page.locator(".tile .compare").count() == 0  # there is no model
        assert "Search from a picture of the index" in page.inner_text("#drop-note")


def test_hostile_text_is_shown_as_text(open_page: Opener):
    page, _ = open_page(view(id=PICTURE, k=50, where={SCRIPT: SCRIPT}))
    ids = shown_ids(page)
    assert {"..", "what?x=1#y"} <= set(ids) == set(texts(page, ".tile .name"))
    assert PICTURE in texts(page, ".label")
    assert texts(page, "#chosen-name") == [PICTURE] and texts(page, ".chip") == [f"{SCRIPT}: {SCRIPT}"]
    assert SCRIPT in texts(page, "legend") and page.inner_text("h1") == SCRIPT.replace("/", "")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], body script").count() == 0


def test_any_id_can_be_searched_from_and_left_and_come_back_to(open_page: Opener):
    page, _ = open_page(view(id="item 3", k=50))
    for name in ODD:
        wait_for_first(page, "item 3")
        page.locator(".tile .picture").nth(shown_ids(page).index(name)).click()
        wait_for_first(page, name)
        page.goto(page.url.split("#")[0] + view(id="item 3", k=50))
    wait_for_first(page, "item 3")
    page.go_back()
    wait_for_first(page, ODD[-1])


def test_an_index_of_vectors_offers_what_can_be_done_with_them(open_page: Opener):
    page, watched = open_page(view(id="item 1", compare="item 2"))
    wait_for_first(page, "item 1")
    assert page.is_disabled("#file") and not page.is_visible(".invite")
    assert "Search from an item of the index" in page.inner_text("#drop-note")
    assert page.inner_text("#facts").replace("\xa0", " ").startswith("vectors · 48 items · flat")
    assert not page.is_visible("#compare") and page.locator(".tile .compare, .tile img").count() == 0
    assert not page.is_visible("#drop img") and texts(page, ".self") == ["query"]
    page.click('.tile[data-id="item 1"] ~ .tile .picture >> nth=0')
    until(page, lambda: len(asked(watched, "/v1/search")) == 2)
    assert asked(watched, "/v1/thumbnails") == []


def test_numbers_are_filtered_by_a_range_and_truths_by_toggles(open_page: Opener):
    page, _ = open_page(view(id="item 4", k=100))
    assert len(shown_ids(page)) == 48
    weights = page.locator('fieldset[data-column="weight"] input')
    assert [one.get_attribute("placeholder") for one in weights.all()] == ["0", "23.5"]
    weights.nth(0).fill("2.5")
    weights.nth(1).fill("10")
    weights.nth(1).press("Enter")
    wait_for_tiles(page, 16)
    assert set(shown_ids(page)) == set(PLAIN[5:21])
    page.click('fieldset[data-column="fresh"] button:has-text("true")')
    wait_for_tiles(page, 5)
    assert set(shown_ids(page)) == {f"item {row}" for row in (6, 9, 12, 15, 18)}
    assert texts(page, ".chip") == ["weight from 2.5 to 10", "fresh: true"]
    page.click('.chips button:has-text("Clear all")')
    wait_for_tiles(page, 48)
    assert [one.input_value() for one in weights.all()] == ["", ""]
