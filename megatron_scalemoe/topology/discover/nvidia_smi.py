"""Reads `nvidia-smi topo -m`: the matrix of how each GPU and NIC of one machine reaches the others.

        GPU0  GPU1  NIC0  CPU Affinity  NUMA Affinity       NV#   # bonded NVLinks          PHB   through a PCIe host bridge
  GPU0   X    NV4   PIX   0-31          0                   PIX   at most one PCIe bridge   NODE  between host bridges of one NUMA node
  GPU1  NV4    X    PHB   0-31          0                   PXB   several PCIe bridges      SYS   between NUMA nodes (sockets)

Any white space separates; colours, the legends and columns after the devices do no harm. The matrix does not name the GPU model: lines of
`nvidia-smi -L` in the same file do, or the caller.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.discover.layout import (
    GPU_MODELS,
    UNKNOWN_MODEL,
    GpuModel,
    NodeLayout,
    error_at,
    layout_of_parts,
    model_of_name,
    read_text,
)
from megatron_scalemoe.topology.discover.pcie_tree import MAX_DEVICES, add_nvlinks, add_pcie_tree

PCIE_CLASSES = ("PIX", "PXB", "PHB", "NODE", "SYS")
_ALIASES = {"SOC": "SYS"}  # drivers before 387
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CELL = re.compile(r"X|NV[1-9][0-9]?|" + "|".join(PCIE_CLASSES))
_GPU = re.compile(r"GPU[0-9]+")
_LISTED_GPU = re.compile(r"GPU [0-9]+: (.+?) \(UUID")
_MIG = re.compile(r"^\s+MIG .*\(UUID: MIG", re.MULTILINE)
_NUMA_COLUMN = 1  # counted after the devices: CPU affinity, NUMA affinity, GPU NUMA ID


@dataclasses.dataclass(frozen=True)
class TopoMatrix:
    """devices: GPUs and NICs in the matrix's order, by their names there. cells: square, `X` on the diagonal, symmetric.
    numa: NUMA node of each device, None where it is not given. models: product names that stand in the file."""

    devices: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    numa: tuple[int | None, ...]
    models: tuple[str, ...]


def read_nvidia_smi(path: Path, model: str | None = None) -> NodeLayout:
    """The machine that printed the file. model: a key of GPU_MODELS, if known. Raises `ScaleMoEError` naming file and line."""
    text = read_text(path)
    matrix = parse_matrix(path, text)
    notes = list(_hidden(matrix, text))
    figures = _figures(path, matrix, model, notes)
    parts, names = add_pcie_tree(matrix.devices, matrix.cells, matrix.numa, figures.pcie_GBps)
    add_nvlinks(parts, names, matrix.cells, figures)
    nics = [v.name for v in parts.vertices if v.kind == "nic"]
    if nics:
        notes.append(f"nvidia-smi does not tell how fast NICs are: taken {figures.nic_GBps * 8:g} Gb/s each (--nic-Gbps sets it)")
    return layout_of_parts(path, parts, dict.fromkeys(nics, figures.nic_GBps), notes)


def _hidden(matrix: TopoMatrix, text: str) -> Iterator[str]:
    """What the machine may have and the matrix does not show."""
    if "PIX  =" in text and "NV#" not in text:
        yield "the matrix is of `nvidia-smi topo -mp`, which hides NVLink: `nvidia-smi topo -m` shows it"
    if _MIG.search(text):
        yield "GPUs are partitioned (MIG): each is taken as one rank; partitions would share its links"
    if 2 * sum(not device.startswith("GPU") for device in matrix.devices) > len(matrix.devices):
        yield "more NICs than GPUs: each is counted as a port of its own, virtual functions and storage's too"


def parse_matrix(path: Path, text: str) -> TopoMatrix:
    """The matrix as it stands in the text. Raises `ScaleMoEError` unless it is whole, square and symmetric."""
    lines = [_ANSI.sub("", line).split() for line in text.splitlines()]
    header = next((number for number, words in enumerate(lines) if _is_header(words)), None)
    if header is None:
        raise error_at(path, 1, "no matrix of `nvidia-smi topo -m` in the file", try_="nvidia-smi topo -m > FILE")
    devices = _header_devices(lines[header])
    if len(set(devices)) < len(devices) or len(devices) > MAX_DEVICES:
        raise error_at(path, header + 1, f"expected a row of at most {MAX_DEVICES} different devices", found=" ".join(devices)[:80])
    cells: dict[str, list[str]] = {}
    numa: dict[str, int | None] = {}
    line_of: dict[str, int] = {}
    for number, words in enumerate(lines[header + 1 :], start=header + 2):
        if len(cells) == len(devices):
            break
        expected = devices[len(cells)]
        if not words or words[0] != expected:
            raise error_at(path, number, f"expected the row of {expected}", found=" ".join(words)[:80] or "an empty line")
        cells[expected] = _row_cells(path, number, devices, len(cells), words[1:])
        numa[expected] = _numa(words[1 + len(devices) :])
        line_of[expected] = number
    if len(cells) < len(devices):
        raise error_at(path, len(lines), f"the matrix ends before the row of {devices[len(cells)]}", try_="the whole output")
    for i, row in enumerate(devices):
        for j, column in enumerate(devices[:i]):
            if cells[row][j] != cells[column][i]:
                problem = f"{row} to {column} must be the same as {column} to {row}"
                raise error_at(path, line_of[row], problem, found=f"{cells[row][j]} and {cells[column][i]}")
    models = tuple(m.group(1) for line in text.splitlines() if (m := _LISTED_GPU.search(_ANSI.sub("", line))))
    return TopoMatrix(devices, tuple(tuple(cells[d]) for d in devices), tuple(numa[d] for d in devices), models)


def _is_header(words: list[str]) -> bool:
    return bool(words) and bool(_GPU.fullmatch(words[0])) and not (len(words) > 1 and _CELL.fullmatch(_ALIASES.get(words[1], words[1])))


def _header_devices(words: list[str]) -> tuple[str, ...]:
    titles = ("CPU", "NUMA", "Affinity")
    return tuple(words[: next((i for i, word in enumerate(words) if word in titles), len(words))])


def _row_cells(path: Path, line: int, devices: tuple[str, ...], row: int, words: list[str]) -> list[str]:
    cells = [_ALIASES.get(word, word) for word in words[: len(devices)]]
    for column, cell in enumerate(cells):
        if not _CELL.fullmatch(cell):
            problem = f"column {devices[column]}: expected one of X, NV#, {', '.join(PCIE_CLASSES)}"
            raise error_at(path, line, problem, found=repr(cell[:80]))
        if (cell == "X") != (column == row):
            problem = f"column {devices[column]}: X must stand on the diagonal, and only there"
            raise error_at(path, line, problem, found=f"{cell} in the row of {devices[row]}")
    if len(cells) < len(devices):
        raise error_at(path, line, f"expected {len(devices)} cells in the row of {devices[row]}", found=len(cells), try_="the whole output")
    return cells


def _numa(words: list[str]) -> int | None:
    """From the columns after the devices."""
    word = words[_NUMA_COLUMN] if len(words) > _NUMA_COLUMN else ""
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 6 else None


def _figures(path: Path, matrix: TopoMatrix, model: str | None, notes: list[str]) -> GpuModel:
    """Of the model that the caller names, else of the one that the file names, else what most models have."""
    if model is not None:
        return GPU_MODELS[model]
    found = {model_of_name(name) for name in matrix.models}
    if len(found) > 1:
        raise ScaleMoEError(f"{path}: expected GPUs of one model", found=", ".join(sorted(set(matrix.models))), try_="--gpu-model")
    (key,) = found or (None,)
    if key is None:
        has_nvlink = any(cell.startswith("NV") for row in matrix.cells for cell in row)
        nvlink = f"NVLinks of {UNKNOWN_MODEL.nvlink_GBps:g} GB/s (V100, A100, H100) and " if has_nvlink else ""
        model_name = f"no figures for {matrix.models[0]}" if matrix.models else "the file does not name the GPU model"
        notes.append(f"{model_name}: taken {nvlink}PCIe of {UNKNOWN_MODEL.pcie_GBps:g} GB/s (--gpu-model sets them)")
    return GPU_MODELS.get(key, UNKNOWN_MODEL)
