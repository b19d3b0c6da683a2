"""Write text as one of Megatron's indexed datasets, PREFIX.bin and PREFIX.idx: a document for each file, a token for each byte.

Megatron-LM's own scripts read it with `--tokenizer-type NullTokenizer --vocab-size 256 --data-path PREFIX`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from sources import INDEXED_ENDINGS, text_files

from megatron_scalemoe.errors import ScaleMoEError


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="the dataset to write")
    parser.add_argument("paths", metavar="PATH", nargs="*", help="text files or folders (default: the Python standard library's sources)")
    args = parser.parse_args()
    try:
        documents, tokens = write_indexed(args.prefix, args.paths)
    except (ScaleMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.prefix}.bin, .idx: {documents:,} documents, {tokens:,} tokens")
    return 0


def write_indexed(prefix: str, paths: list[str]) -> tuple[int, int]:
    """Documents and tokens written. Raises `ScaleMoEError` where there is no text, or a dataset of that name already."""
    targets = [pathlib.Path(prefix + ending) for ending in INDEXED_ENDINGS]
    there = [str(target) for target in targets if target.exists()]
    if there:
        raise ScaleMoEError("this dataset is there already", found=", ".join(there), try_="another name, or remove it")
    files = [file for file in text_files(paths) if file.stat().st_size]
    if not files:
        raise ScaleMoEError("there is no text to read", found="no file with a byte in it", try_="a text file or a folder of them")
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    unfinished = [target.with_name(f".{target.name}.tmp") for target in targets]
    builder = IndexedDatasetBuilder(str(unfinished[0]), dtype=DType.optimal_dtype(256))
    for file in files:
        builder.add_item(torch.from_numpy(np.fromfile(file, dtype=np.uint8)))
        builder.end_document()
    builder.finalize(str(unfinished[1]))
    for old, new in zip(unfinished, targets, strict=True):
        old.replace(new)
    return len(files), sum(builder.sequence_lengths)


if __name__ == "__main__":
    sys.exit(main())
