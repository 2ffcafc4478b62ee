"""Fixtures that the tests of every widget share."""

import pytest
from widget_pages import chromium, opened


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, path):
    """The page at ``path``, a fixture of the module; closed again."""
    with opened(browser, path) as page:
        yield page
