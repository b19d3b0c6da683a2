"""The examples' text: plain files, and Megatron's indexed datasets of the same bytes."""

import pytest

from tests.rank_pool import pool


def on_rank(name: str, *args):
    return pool(2).run(_call, name, args)[0]


def _call(name: str, args: tuple):
    import torch.distributed as dist

    from tests.examples import example_case

    return getattr(example_case, name)(*args) if dist.get_rank() == 0 else None


@pytest.fixture
def folder(tmp_path):
    texts = {"a.txt": b"one line\n" * 30, "empty.txt": b"", "sub/b.bin": bytes(range(256))}
    for name, content in texts.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    return tmp_path / "texts"


def test_an_indexed_dataset_is_the_same_text(folder, tmp_path):
    found = on_rank("texts", folder, tmp_path / "data" / "text")
    documents = [b"one line\n" * 30, bytes(range(256))]
    assert found["megatrons"] == documents
    assert found["documents"] == [0, 1, 2]
    assert found["written"] == (2, 526)
    assert found["from_dataset"] == found["from_files"]
    assert b"".join(found["from_dataset"]) == b"".join(documents)


def test_wrong_data_is_told(folder, tmp_path):
    prefix = tmp_path / "data" / "text"
    on_rank("texts", folder, prefix)
    assert "no such/text" in on_rank("text_error", ["no such/text"])
    assert "an indexed dataset is named by its prefix" in on_rank("text_error", [prefix.with_suffix(".bin")])
    assert "an indexed dataset is named by its prefix" in on_rank("text_error", [prefix.parent])
    assert "0 bytes" in on_rank("text_error", [folder / "empty.txt"])
    tokens = prefix.with_suffix(".bin")
    tokens.write_bytes(b"\xff\xff" + tokens.read_bytes()[2:])
    assert "must have a token for each byte" in on_rank("text_error", [prefix])
    prefix.with_suffix(".idx").write_bytes(b"no index")
    assert "are no indexed dataset" in on_rank("text_error", [prefix])
