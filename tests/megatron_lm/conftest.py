"""Data that is made once for all tests here."""

import pytest

from tests.megatron_lm import script


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> tuple[str, ...]:
    return script.make_text_data(tmp_path_factory.mktemp("text") / "data")
