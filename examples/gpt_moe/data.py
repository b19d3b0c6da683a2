"""Real text as bytes: no tokenizer, no download, and every batch a pure function of (seed, iteration)."""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.integration.live_sequences import LiveSequences

VOCAB_SIZE = 256
MAX_BYTES = 64 * 2**20
VALID_SHARE = 0.05


def load_text(data_path: list[str] | None) -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8 [bytes]: the given files and folders, or the Python standard library's own sources."""
    paths = [pathlib.Path(p) for p in data_path] if data_path else [pathlib.Path(sysconfig.get_paths()["stdlib"])]
    pattern = "**/*" if data_path else "*.py"
    files = [file for path in paths for file in (sorted(path.glob(pattern)) if path.is_dir() else [path]) if file.is_file()]
    content = bytearray()
    for file in files:
        content += file.read_bytes()[: MAX_BYTES - len(content)]
    if not content:
        raise ScaleMoEError("there is no text to train on", found=f"{len(files)} files, 0 bytes in {', '.join(map(str, paths))}")
    text = torch.frombuffer(content, dtype=torch.uint8)
    split = int(len(text) * (1 - VALID_SHARE))
    return text[:split], text[split:]


def batches(
    text: Tensor, seed: int, iteration: int, shape: BatchShape, device: torch.device, sequences: LiveSequences | None = None
) -> Iterator[dict[str, Tensor]]:
    """This data-parallel rank's micro-batches of one iteration: `tokens`, `labels` [micro batch, seq], the same for every TP and PP rank.

    Draws the whole global batch from (seed, iteration), so that a resumed run, and one with other parallel sizes, sees the same samples.
    sequences: which data-parallel rank computes which of them; it is asked at once, as the ranks of a pipeline do not read in step.
    """
    generator = torch.Generator().manual_seed(_hash(seed, iteration))
    starts = torch.randint(0, len(text) - shape.seq_length, (shape.global_batch_size,), generator=generator)
    mine = starts.reshape(shape.data_parallel_size, -1)[shape.data_parallel_rank]
    if sequences is not None:
        tokens = torch.stack([text[start : start + shape.seq_length] for start in mine.tolist()]).numpy()
        mine = torch.from_numpy(sequences.place(tokens, mine.numpy())).reshape(-1)
    return _windows(text, mine, shape, device)


def _windows(text: Tensor, starts: Tensor, shape: BatchShape, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for micro_batch in starts.split(shape.micro_batch_size):
        window = torch.stack([text[start : start + shape.seq_length + 1] for start in micro_batch.tolist()]).long().to(device)
        yield {"tokens": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}


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


def _hash(seed: int, iteration: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{iteration}".encode()).digest()[:8], "little") >> 1
