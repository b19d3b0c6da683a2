"""The description of the machine beside every measured number."""

import json
import platform

import pytest

from megatron_scalemoe import environment
from megatron_scalemoe.units import format_bytes


def test_supported_versions_of_megatron():
    """Releases: tests/test_structure.py."""
    assert all(map(environment.is_supported_megatron, ("0.16.1rc0", "0.16.9+local")))
    assert not any(map(environment.is_supported_megatron, ("0.15.3", "0.17", "0.17.0rc0", "1.0", "1.19.0")))


def test_description_is_json_and_anonymous():
    described = environment.describe_environment(["scalemoe", "bench"])
    text = json.dumps(described)
    assert platform.node() not in text
    assert described["command"] == ["scalemoe", "bench"]
    assert described["cores"] >= 1
    assert described["cpu"]


def test_first_installed_distribution_wins():
    assert environment.installed_version("no-such-distribution", "numpy") == environment.installed_version("numpy")
    assert environment.installed_version("no-such-distribution") is None


def test_an_installed_copy_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "megatron_scalemoe" / "environment.py"))
    assert environment.git_commit() is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (64 << 20, "64.0 MiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
