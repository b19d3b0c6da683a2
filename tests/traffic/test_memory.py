"""What is available, and what is refused."""

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic import memory


def test_a_cgroups_limit_counts(tmp_path, monkeypatch):
    assert memory.available_bytes() > 2**20
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5\n")
    assert memory.available_bytes() > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available_bytes() == 4000
    memory.check_memory(4000, "arrays", try_="fewer")
    with pytest.raises(ScaleMoEError, match="arrays must fit in memory"):
        memory.check_memory(4001, "arrays", try_="fewer")
