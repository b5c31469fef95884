"""A browser for each file of tests."""

from collections.abc import Iterator

import pytest

from tests.diff.browser import ABSENT, PROGRAM, Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.fail(ABSENT)
    made = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield made
    made.close()
