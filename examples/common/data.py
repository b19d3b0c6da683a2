"""Real text as bytes: no download, and every batch a pure function of (seed, iteration)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sources import is_indexed, text_files
from task import Task
from torch import Tensor

from megatron_scalemoe.balance.sequences.learned_placement import LearnedPlacement
from megatron_scalemoe.errors import ScaleMoEError

NUM_BYTES = 256
MAX_BYTES = 64 * 2**20
VALID_SHARE = 0.05


def load_text(data_path: list[str] | None) -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8 [bytes]: of text files and folders, of Megatron's indexed datasets with a token for each byte
    (by prefix), or the Python standard library's own sources. Raises `ScaleMoEError` where there is none."""
    paths = data_path or []
    texts = [_indexed_bytes(prefix) for prefix in paths if is_indexed(prefix)]
    plain = [path for path in paths if not is_indexed(path)]
    if plain or not paths:
        texts.append(_file_bytes(plain))
    text = torch.from_numpy(np.concatenate(texts)[:MAX_BYTES])
    if not len(text):
        raise ScaleMoEError("there is no text to train on", found=f"0 bytes in {', '.join(paths)}")
    split = int(len(text) * (1 - VALID_SHARE))
    return text[:split], text[split:]


def _file_bytes(paths: list[str]) -> np.ndarray:
    content = bytearray()
    for file in text_files(paths):
        content += file.read_bytes()[: MAX_BYTES - len(content)]
    return np.frombuffer(content, dtype=np.uint8)


def _indexed_bytes(prefix: str) -> np.ndarray:
    try:
        dtype = IndexedDataset(prefix).index.dtype
        tokens = np.fromfile(f"{prefix}.bin", dtype=dtype, count=MAX_BYTES)
    except (AssertionError, ValueError, OSError) as error:
        raise ScaleMoEError(f"{prefix}.idx and .bin are no indexed dataset of Megatron's", found=error) from error
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < NUM_BYTES:
        raise ScaleMoEError(f"{prefix}.bin must have a token for each byte", found=f"token {tokens.max()}", try_="get_data.sh")
    return tokens.astype(np.uint8)


def batches(
    text: Tensor, seed: int, iteration: int, shape: BatchShape, task: Task, device: torch.device, sequences: LearnedPlacement | None = None
) -> Iterator[dict[str, Tensor]]:
    """This data-parallel rank's micro-batches of one iteration, as `task` makes them, the same for every TP and PP rank.

    Draws the whole global batch from (seed, iteration), so that a resumed run, and one with other parallel sizes, sees the same samples.
    sequences: which data-parallel rank computes which of them; it is asked at once, as the ranks of a pipeline do not read in step.
    """
    generator = torch.Generator().manual_seed(_hash(seed, iteration))
    starts = torch.randint(0, len(text) - shape.seq_length, (shape.global_batch_size,), generator=generator)
    mine = starts.reshape(shape.data_parallel_size, -1)[shape.data_parallel_rank]

    def make_batch(starts_B: Tensor) -> dict[str, Tensor]:
        window = torch.stack([text[start : start + shape.seq_length + 1] for start in starts_B.tolist()]).long()
        return task.make_batch(window, [_hash(seed, iteration, start) for start in starts_B.tolist()])

    if sequences is not None:
        mine = torch.from_numpy(sequences.place(make_batch(mine)["tokens"].numpy(), mine.numpy())).reshape(-1)
    return ({name: tensor.to(device) for name, tensor in make_batch(part).items()} for part in mine.split(shape.micro_batch_size))


class BatchShape:
    """Sizes of a global batch and this rank's place in it. Raises `ScaleMoEError` when it does not divide."""

    def __init__(self, args, data_parallel_rank: int, data_parallel_size: int, text: Tensor):
        self.seq_length = args.seq_length
        self.micro_batch_size = args.micro_batch_size
        self.global_batch_size = args.global_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        if self.global_batch_size % (self.micro_batch_size * data_parallel_size):
            raise ScaleMoEError(
                "--global-batch-size must be a multiple of --micro-batch-size x data-parallel size",
                found=f"{self.global_batch_size} and {self.micro_batch_size} x {data_parallel_size}",
            )
        if len(text) <= self.seq_length:
            raise ScaleMoEError("the text is shorter than one sequence", found=f"{len(text)} bytes, --seq-length {self.seq_length}")

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(":".join(map(str, numbers)).encode()).digest()[:8], "little") >> 1
