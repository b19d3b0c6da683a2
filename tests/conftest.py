"""The order of the tests, and which are marked `ranks`."""

import pytest


def pytest_collection_modifyitems(items):
    """Tests on rank pools come last: their ranks stay, and poll, which would slow all tests after them. Of these the first are those of
    `ops`, which look at what is left in memory: a transport stays open for as long as its ranks."""
    for item in items:
        if _uses_a_pool(item.module):
            item.add_marker(pytest.mark.ranks)
    items.sort(key=lambda item: (item.get_closest_marker("ranks") is not None, "ops" not in item.path.parts))


def _uses_a_pool(module) -> bool:
    return any(getattr(value, "__module__", "") == "tests.rank_pool" for value in vars(module).values())
