"""The page in a real browser, before a service that asks for a key, has no model and holds hostile text."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

import repkit
from repkit.service.keys import Keys
from repkit.service.settings import Settings
from tests.page_serving import Opener, chromium, opener, served, shown_ids, texts
from tests.page_site import view

KEY = "a key of the tests, long enough"
SCRIPT = "<script>window.hacked = 1</script>"
PICTURE = '<img src=x onerror="window.hacked = 1">\'"&amp;'
ODD = ["..", "a/../b", "what?x=1#y", "50%2Fhalf", "ünï çode 漢字", "javascript:alert(1)", PICTURE, SCRIPT]
PLAIN = [f"item {row}" for row in range(40)]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as browser:
        yield browser


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
    keys = Keys(read=frozenset([hashlib.sha256(KEY.encode()).digest()]))
    with served(Settings(index=folder, keys=keys)) as origin:
        yield origin


@pytest.fixture
def open_page(browser: object, origin: str) -> Iterator[Opener]:
    """Opens the page with the key given; no item has a picture."""
    with opener(browser, origin) as open_bare:

        def open_page(view: str = "", key: bool = True):
            page, watched = open_bare(view)
            watched.expected |= {401, 404}
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
    sent = [one.headers.get("authorization") for one in watched.requests if "/v1/thumbnails" in one.url]
    assert sent and set(sent) == {f"Bearer {KEY}"}
    assert not any(KEY.split()[-1] in one.url for one in watched.requests)


def test_hostile_text_is_shown_as_text(open_page: Opener):
    page, watched = open_page(view(id=PICTURE, k=50, where={SCRIPT: SCRIPT}, compare=SCRIPT))
    watched.expected.add(503)  # there is no model that could match
    ids = shown_ids(page)
    assert {"..", "what?x=1#y"} <= set(ids)
    page.wait_for_selector("#compare[open]")
    assert page.inner_text("#source-name") == PICTURE and page.inner_text("#target-name") == SCRIPT
    page.wait_for_selector("#answer.failed")
    page.keyboard.press("Escape")
    assert PICTURE in texts(page, ".label") and PICTURE in texts(page, ".under .id")
    assert texts(page, "#chosen-name") == [PICTURE] and texts(page, ".chip") == [f"{SCRIPT}: {SCRIPT}"]
    assert SCRIPT in texts(page, "legend") and page.inner_text("h1") == SCRIPT.replace("/", "")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], body script").count() == 0


def test_any_id_can_be_searched_from_and_left_and_come_back_to(open_page: Opener):
    page, _ = open_page(view(id="item 3", k=50))
    first = "name => document.querySelector('.tile')?.dataset.id === name"
    for name in ODD:
        page.wait_for_function(first, arg="item 3")
        page.locator(".tile .picture").nth(shown_ids(page).index(name)).click()
        page.wait_for_function(first, arg=name)
        page.goto(page.url.split("#")[0] + view(id="item 3", k=50))
    page.wait_for_function(first, arg="item 3")
    page.go_back()
    page.wait_for_function(first, arg=ODD[-1])


def test_without_a_model_files_are_refused_and_ids_still_work(open_page: Opener):
    page, watched = open_page()
    watched.expected.add(503)
    assert page.is_disabled("#file") and "Search from a picture of the index" in page.inner_text("#drop-note")
    shown_ids(page)
    page.click("button.picture >> nth=0")
    page.wait_for_selector(".score")
    page.click(".tile .compare >> nth=0")
    page.wait_for_selector("#answer.failed")
    assert page.is_visible("#compare") and page.inner_text("#answer").endswith(".")


def test_numbers_are_filtered_by_a_range_and_truths_by_toggles(open_page: Opener):
    page, _ = open_page(view(id="item 4", k=100))
    assert len(shown_ids(page)) == 48
    weights = page.locator('fieldset[data-column="weight"] input')
    assert [one.get_attribute("placeholder") for one in weights.all()] == ["0", "23.5"]
    weights.nth(0).fill("2.5")
    weights.nth(1).fill("10")
    weights.nth(1).press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.tile').length === 16")
    assert set(shown_ids(page)) == set(PLAIN[5:21])
    page.click('fieldset[data-column="fresh"] button:has-text("true")')
    page.wait_for_function("() => document.querySelectorAll('.tile').length === 5")
    assert set(shown_ids(page)) == {f"item {row}" for row in (6, 9, 12, 15, 18)}
    assert texts(page, ".chip") == ["weight from 2.5 to 10", "fresh: true"]
    page.click('.chips button:has-text("Clear all")')
    page.wait_for_function("() => document.querySelectorAll('.tile').length === 48")
    assert [one.input_value() for one in weights.all()] == ["", ""]
