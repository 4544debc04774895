"""What the tests of the page share: a browser, and a service before which it stands.

The browser lasts for one module: as long as it runs, asyncio.run fails in this thread, which other tests need.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.browsing import Opener, chromium, opener
from tests.page.clothes import Clothes, Site, build
from tests.service_cases import running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Clothes:
    return build(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def site(browser: Any, clothes: Clothes) -> Iterator[Site]:
    """Nothing may change it but a test that leaves it as it was."""
    with running(clothes.settings()) as (origin, _):
        yield Site(origin, clothes.store)


@pytest.fixture
def open_page(browser: Any, site: Site) -> Iterator[Opener]:
    with opener(browser, site.origin) as open_page:
        yield open_page
