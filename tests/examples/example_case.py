"""The examples' own modules at work inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tests.mcore.megatron_case import initialize  # first: it installs the CPU ranks

# isort: split
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megatron_scalemoe.mcore.live_model import live_balance

ROOT = Path(__file__).resolve().parents[2]
for folder in ("common", "bert_moe"):
    sys.path.insert(0, str(ROOT / "examples" / folder))

from arguments import parse_args  # noqa: E402
from bert import BERT, MASK, make_batch  # noqa: E402
from data import load_text  # noqa: E402
from model import Training, build_training, transformer_config  # noqa: E402
from preprocess_data import write_indexed  # noqa: E402
from steps import train_step  # noqa: E402
from training import make_data  # noqa: E402

TINY = f"""--data-path {ROOT / "README.md"} --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --num-experts 8 --micro-batch-size 2 --global-batch-size 8 --lr-warmup-iters 2 --train-iters 50""".split()


def bert_losses(flags: list[str], first: int, last: int, load: Path | None = None, save: Path | None = None) -> list[float]:
    """Losses of iterations `first` to `last`. load: the checkpoint directory to go on from. save: where to leave one at the end."""
    args, training = _bert([*TINY, *flags])
    data = make_data(args, BERT)
    live = _live(args, training, data.shape) if args.scalemoe else None
    if live is not None and live.sequences is not None:
        data = dataclasses.replace(data, sequences=live.sequences)
    if load is not None:
        assert load_checkpoint(load, [training.model], training.optimizer, training.scheduler).iteration == first - 1
    losses = []
    for iteration in range(first, last + 1):
        losses.append(train_step(training, data, iteration)[0])
        if live is not None:
            live.step_done(iteration)
    if live is not None:
        live.close()
    if save is not None:
        save_checkpoint(save, last, [training.model], training.optimizer, training.scheduler)
    return losses


def _bert(flags: list[str]) -> tuple[argparse.Namespace, Training]:
    args = parse_args(flags)
    parallel = args.tensor_model_parallel_size, args.expert_model_parallel_size, args.expert_tensor_parallel_size or 1
    initialize(*parallel, pp=args.pipeline_model_parallel_size)
    return args, build_training(args, BERT, args.scalemoe)


def _live(args: argparse.Namespace, training: Training, shape) -> LiveBalance:
    sizes = {"micro_batches": shape.num_micro_batches, "micro_batch_size": shape.micro_batch_size}
    return live_balance([training.model], training.optimizer, training.config, args.scalemoe, **sizes, say=lambda _: None)


def bert_refusal(flags: list[str]) -> str:
    """The message with which BERT's layers are refused."""
    args = parse_args([*TINY, *flags])
    try:
        BERT.layer_spec(args, transformer_config(args, "alltoall"))
    except ScaleMoEError as error:
        return str(error)
    return ""


def masking(seeds: list[int], window: list[list[int]]) -> dict[str, list]:
    batch = make_batch(torch.tensor(window), seeds)
    return {"mask": MASK, **{name: tensor.tolist() for name, tensor in batch.items()}}


def texts(folder: Path, prefix: Path) -> dict:
    """What an indexed dataset made of the folder's files holds, to the examples and to Megatron."""
    documents, tokens = write_indexed(str(prefix), [str(folder)])
    from_files, from_dataset = ([bytes(part.tolist()) for part in load_text([str(path)])] for path in (folder, prefix))
    dataset = IndexedDataset(str(prefix))
    return {
        "written": (documents, tokens),
        "from_files": from_files,
        "from_dataset": from_dataset,
        "megatrons": [bytes(dataset[index].tolist()) for index in range(len(dataset))],
        "documents": dataset.document_indices.tolist(),
    }


def text_error(paths: list[Path]) -> str:
    try:
        load_text([str(path) for path in paths])
    except ScaleMoEError as error:
        return str(error)
    return ""
