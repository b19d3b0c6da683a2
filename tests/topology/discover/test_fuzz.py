"""Damaged files of every format: read, or refused with a `ScaleMoEError`; nothing else, and never slowly."""

import random
from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.discover.cluster import cluster_of
from megatron_scalemoe.topology.discover.nccl_xml import read_nccl_xml
from megatron_scalemoe.topology.discover.nvidia_smi import read_nvidia_smi
from megatron_scalemoe.topology.discover.slurm import read_slurm

SAMPLES = sorted((Path(__file__).parent / "samples").iterdir())
MUTANTS = 150
CLUSTER_ERRORS = ("a cluster of at most",)
SNIPPETS = [
    b"",
    b"\0",
    b"\xff",
    b"[",
    b"]",
    b"=",
    b"-",
    b"\n",
    b"\t",
    b"X",
    b"NV99",
    b"GPU0",
    b"GPU 1: B200 (UUID",
    b"9" * 400,
    b"-1",
    b"1e999",
]
SNIPPETS += [
    b"<pci>",
    b"</pci>",
    b"<gpu dev='0'/>",
    b"&x;",
    b"<!--",
    b'"',
    b"'",
    b"[0-99999999]",
    b",",
    b"\\\n",
    b"#",
    b"nan",
    "é".encode(),
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few cuts, copies, swaps of words, changed bytes."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        short = content[at : min(to, at + 40)]
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at] + rng.choice(SNIPPETS) + content[at:]
        elif kind == 1:
            content = content[:at] + content[at + len(short) :]
        elif kind == 2:
            content = content[:to] + short + content[to:]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            words = content.split(b" ")
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            words[i], words[j] = words[j], words[i]
            content = b" ".join(words)
        else:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content


def read(path: Path, kind: str) -> None:
    if kind.startswith("slurm"):
        layout = read_nccl_xml(next(p for p in SAMPLES if p.name == "nccl_pcie_a6000.xml"))
        fabric = read_slurm(path)
        cluster_of(layout, fabric, hosts=fabric.hosts[:8])
    elif kind.startswith("nccl"):
        read_nccl_xml(path)
    else:
        read_nvidia_smi(path)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda p: p.name)
def test_a_damaged_file_is_read_or_refused(tmp_path, sample):
    rng = random.Random(sample.name)
    content = sample.read_bytes()
    messages = []
    for _ in range(MUTANTS):
        path = tmp_path / sample.name
        path.write_bytes(mutated(content, rng))
        try:
            read(path, sample.name)
        except ScaleMoEError as error:
            messages.append(str(error))
    assert len(messages) > MUTANTS / 5
    assert [m for m in messages if sample.name not in m and not m.startswith(CLUSTER_ERRORS)] == []


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda p: p.name)
def test_a_file_cut_off_anywhere_is_read_or_refused(tmp_path, sample):
    content = sample.read_bytes()
    path = tmp_path / sample.name
    for end in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:end])
        try:
            read(path, sample.name)
        except ScaleMoEError:
            continue
        assert end > len(content) / 20, "so little of the file cannot be enough"
