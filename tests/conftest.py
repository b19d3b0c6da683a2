"""The order of the tests."""

RANKS_STAY = {"distributed", "integration"}


def pytest_collection_modifyitems(items):
    """Tests on rank pools come last: their ranks stay, and poll, which would slow all tests after them."""
    items.sort(key=lambda item: item.path.parent.name in RANKS_STAY)
