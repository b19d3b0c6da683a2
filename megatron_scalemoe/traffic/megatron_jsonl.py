"""Readers of the two routing records that Megatron-LM writes, one JSON Lines file per rank of the job.

Formats as of Megatron-LM main in August 2026 (commit d98e8a64):

* `--moe-routing-trace-path DIR` (megatron/core/transformer/moe/router_trace.py): `DIR/router_trace_rank{R}.jsonl`, a line per router
  call: {"step", "stage", "block": "decoder" or "mtp", "mtp_idx" (mtp only), "layer", "rank", "num_tokens", "topk",
  "top_indices": [[expert, ...] per token]}.
* `--save-tokens-per-expert-interval N` (megatron/training/activation_logging.py): `DIR/tokens_per_expert/rank{R}.jsonl`, a line per
  iteration and layer: {"iter", "block", "mtp_idx", "layer", "tpe": [[tokens of each local expert] per micro-batch]}. It counts what the
  rank received; from which ranks the tokens came is not recorded, so they are spread evenly over the sources.

Both name layers by their place in the pipeline stage. Ranks are in Megatron's default order (tp-cp-ep-dp-pp) with TP = CP = 1: stage by
stage, and in a stage one expert-parallel group after the other. The stages of a virtual pipeline cannot be told apart. With full
recomputation each micro-batch is recorded twice, which changes no average. Ranks of a stage without MoE layers write no file. The routing
trace leaves out router calls in which tokens were dropped.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import open_regular
from megatron_scalemoe.traffic.matrices import coactivation_fits
from megatron_scalemoe.traffic.memory import available_bytes, check_memory
from megatron_scalemoe.traffic.trace import MAX_EXPERTS, MOST_BYTES, RoutingTrace

TRACE_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl")
RECEIVED_FILE = re.compile(r"rank(\d+)\.jsonl")
# Files are read line by line; a line is parsed as a whole.
_FILE_BYTES, _LINE_BYTES = 1 << 40, 64 << 20
# Of arrays, at once, while the trace is put together.
_COPIES = 4
# (pipeline stage, "decoder" or "mtp", MTP head or -1, layer in the stage): sorted, decoder layers come first.
Layer = tuple[int, str, int, int]
# Of each iteration and layer: rank in the stage -> its micro-batches' counts.
Table = dict[int, dict[Layer, dict[int, list[np.ndarray]]]]


def read_megatron(
    directory: Path,
    *,
    num_ranks: int | None = None,
    num_experts: int | None = None,
    topk: int | None = None,
    pipeline_stages: int = 1,
    coactivation: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> RoutingTrace:
    """Reads whichever record `directory` holds. Each micro-batch of each expert-parallel group becomes a step.

    num_ranks: size of the expert-parallel group (default: all ranks of a stage). num_experts: needed for a routing trace, which does not
    name it. topk: needed for tokens per expert. coactivation: count it (exactly) from a routing trace; None: where it is not too large.
    pipeline_stages: of the job; stages without files have no MoE layers. Iterations that some rank or layer lacks are left out; `meta` says
    how many. Raises `ScaleMoEError` naming file, line and field.
    """
    traced = _rank_files(directory, TRACE_FILE)
    received = {} if traced else _rank_files(directory / "tokens_per_expert", RECEIVED_FILE) or _rank_files(directory, RECEIVED_FILE)
    if not traced and not received:
        problem = f"{directory}: must hold router_trace_rank0.jsonl, ... or tokens_per_expert/rank0.jsonl, ..."
        raise ScaleMoEError(problem, try_="the directory given to --moe-routing-trace-path, or to Megatron's --save")
    files = traced or received
    per_stage = _ranks_per_stage(directory, set(files), pipeline_stages, num_ranks)
    num_ranks = num_ranks or per_stage
    tell = progress or (lambda text: None)
    if empty := sorted(set(range(pipeline_stages)) - {rank // per_stage for rank in files}):
        tell(f"{per_stage} ranks in a pipeline stage; no files, so no MoE layers, in stage {', '.join(map(str, empty))}")
    if traced:
        if num_experts is None or num_experts < 1:
            raise ScaleMoEError("a routing trace does not say how many experts there are", try_="--experts with the model's number")
        if num_experts > MAX_EXPERTS:
            raise ScaleMoEError(f"at most {MAX_EXPERTS} experts", found=num_experts, try_="--experts with the model's number")
        return _from_routing_trace(files, per_stage, num_ranks, num_experts, coactivation, tell)
    if topk is None or topk < 1:
        raise ScaleMoEError("tokens per expert do not say how many experts a token chooses", try_="--topk with the model's number")
    return _from_received(files, per_stage, num_ranks, topk, tell)


def _ranks_per_stage(directory: Path, ranks: set[int], stages: int, num_ranks: int | None) -> int:
    """The smallest number, a multiple of `num_ranks`, for which the ranks that have files are whole stages."""
    if stages < 1 or (num_ranks is not None and num_ranks < 1):
        raise ScaleMoEError("pipeline stages and expert-parallel ranks must be 1 or more", found=f"{stages} stages, {num_ranks} ranks")
    multiple = num_ranks or 1
    for per_stage in range(multiple, len(ranks) + 1, multiple):
        held = {rank // per_stage for rank in ranks}
        if max(held) < stages and len(held) * per_stage == len(ranks):
            return per_stage
    missing = sorted(set(range(len(ranks))) - ranks)
    if missing:
        problem, try_ = (
            f"{directory}: there must be a file for every rank",
            "--pipeline-stages of the job, if some stages have no MoE layers",
        )
        raise ScaleMoEError(problem, found=f"none for rank {missing[0]}, but for {max(ranks)}", try_=try_)
    problem = "the expert-parallel ranks must divide the ranks of a pipeline stage"
    raise ScaleMoEError(problem, found=f"{num_ranks} expert-parallel ranks, {len(ranks)} ranks in {stages} stages")


def _rank_files(directory: Path, pattern: re.Pattern) -> dict[int, Path]:
    found = {int(match[1]): path for path in sorted(directory.glob("*.jsonl")) if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _from_routing_trace(
    files: dict[int, Path], per_stage: int, num_ranks: int, num_experts: int, coactivation: bool | None, tell: Callable[[str], None]
) -> RoutingTrace:
    table: Table = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    pairs: dict[Layer, np.ndarray] = {}
    topk, counts_left = None, available_bytes() // _COPIES
    for rank, path in files.items():
        tell(f"reading {path.name}")
        for place, record in _records(path):
            layer = _layer_of(record, place, rank // per_stage)
            chosen_TK = _chosen(record, place, num_experts)
            if topk not in (None, chosen_TK.shape[1]):
                raise ScaleMoEError(f"{place}: topk: must be the same in all records", found=f"{chosen_TK.shape[1]}, and {topk} before")
            topk = chosen_TK.shape[1]
            counts_E = np.bincount(chosen_TK.ravel(), minlength=num_experts).astype(np.int32)
            counts_left -= counts_E.nbytes
            if counts_left < 0:
                raise ScaleMoEError(f"{place}: the counts of {num_experts} experts do not fit in memory", try_="fewer iterations")
            table[_int(record, place, "step")][layer][rank % per_stage].append(counts_E)
            if coactivation is None and not coactivation_fits(len(pairs) + 1, num_experts):
                coactivation = False
            if coactivation and layer not in pairs:
                _check_coactivation(len(pairs) + 1, num_experts)
            if coactivation is not False:
                cells = (chosen_TK[:, :, None] * num_experts + chosen_TK[:, None, :]).ravel()
                counted_EE = np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)
                pairs[layer] = pairs.get(layer, 0) + counted_EE
    counts, meta = _assemble(
        table, per_stage, num_ranks, "tokens were dropped, and Megatron's tracer leaves such calls out: record without"
    )
    together = np.stack([pairs[layer] for layer in sorted(pairs)]).astype(np.float64) if coactivation is not False else None
    return RoutingTrace(counts, together, {"topk": topk, "source": "Megatron routing trace", **meta})


def _check_coactivation(num_layers: int, num_experts: int) -> None:
    num_bytes, sizes = 8 * num_layers * num_experts**2, f"co-activation of {num_layers} layers x {num_experts} x {num_experts} experts"
    if num_bytes > MOST_BYTES:
        raise ScaleMoEError(f"{sizes} would be more than {MOST_BYTES >> 30} GiB", try_="--no-coactivation")
    check_memory(_COPIES * num_bytes, sizes, try_="--no-coactivation")


def _from_received(files: dict[int, Path], per_stage: int, num_ranks: int, topk: int, tell: Callable[[str], None]) -> RoutingTrace:
    table: Table = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    num_local = None
    for rank, path in files.items():
        tell(f"reading {path.name}")
        for place, record in _records(path):
            layer, iteration = _layer_of(record, place, rank // per_stage), _int(record, place, "iter")
            counts_MP = _int_matrix(record, place, "tpe")
            if num_local not in (None, counts_MP.shape[1]):
                problem = f"{place}: tpe: every rank must have as many local experts as the first"
                raise ScaleMoEError(problem, found=f"{counts_MP.shape[1]}, and {num_local} before")
            num_local = counts_MP.shape[1]
            table[iteration][layer][rank % per_stage].extend(counts_MP)
    received, meta = _assemble(table, per_stage, num_ranks, "calls are missing: iterations of one run only")
    load_SLE = received.reshape(*received.shape[:2], -1).astype(np.int64)
    # Of n tokens rank g sends (n + offset + g) // G: the offsets pass the remainders around, so that ranks send about the same in total.
    offset_SLE = np.cumsum(load_SLE, axis=2) - load_SLE
    ranks_G = np.arange(num_ranks)[:, None]
    first_SLE = (load_SLE // num_ranks)[:, :, None]
    extra_SLGE = (ranks_G - offset_SLE[:, :, None]) % num_ranks < (load_SLE % num_ranks)[:, :, None]
    meta |= {"topk": topk, "source": "Megatron tokens per expert; source ranks unknown, spread evenly"}
    return RoutingTrace((first_SLE + extra_SLGE).astype(np.int64), None, meta)


def _assemble(table: Table, per_stage: int, num_ranks: int, if_uneven: str) -> tuple[np.ndarray, dict]:
    """int [steps, layers, ranks, counts] of the iterations that all ranks recorded in all layers, and their meta. if_uneven: why every rank
    may have records of every layer, but not equally many."""
    layers = sorted({layer for of_layer in table.values() for layer in of_layer})
    counts, iterations = [], []
    for iteration in sorted(table):
        lists = [table[iteration][layer][rank] for layer in layers for rank in range(per_stage)]
        micro_batches = len(lists[0])
        if not micro_batches or any(len(one) != micro_batches for one in lists):
            continue
        # [layers, groups, ranks, micro-batches, counts]
        block = np.array(lists).reshape(len(layers), per_stage // num_ranks, num_ranks, micro_batches, -1)
        counts.append(block.transpose(1, 3, 0, 2, 4).reshape(-1, len(layers), num_ranks, block.shape[-1]))
        iterations += [iteration] * len(counts[-1])
    if not counts:
        found = f"{len(table)} iterations, {len(layers)} layers" if table else "no records at all"
        recorded = {(layer, rank) for of_layer in table.values() for layer, ranks in of_layer.items() for rank, one in ranks.items() if one}
        whole = table and len(recorded) == len(layers) * per_stage
        try_ = if_uneven if whole else "--pipeline-stages: some rank has no records of some layer"
        raise ScaleMoEError("no iteration has the same number of records in every layer of every rank", found=found, try_=try_)
    staged = layers[-1][0] > 0
    names = [f"{f'stage{s}.' if staged else ''}{block}.{'' if head < 0 else f'{head}.'}{layer}" for s, block, head, layer in layers]
    incomplete = len(table) - len(set(iterations))
    return np.concatenate(counts), {"iterations": iterations, "layer_names": names, "incomplete_iterations": incomplete}


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """The records of one file, each with its `file:line`."""
    with open_regular(path, most=_FILE_BYTES) as file:
        for number in itertools.count(1):
            line = file.readline(_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _LINE_BYTES:
                raise ScaleMoEError(f"{path}:{number}: a line has at most {_LINE_BYTES >> 20} MiB")
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: bytes, place: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ScaleMoEError(f"{place}: not valid JSON", found=error, try_="delete the line, if the job was killed writing it") from error
    if not isinstance(record, dict):
        raise ScaleMoEError(f"{place}: must be a mapping of fields", found=repr(record)[:80])
    return record


def _int(record: dict, place: str, field: str) -> int:
    value = record.get(field)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ScaleMoEError(f"{place}: {field}: must be an integer, 0 or more", found=repr(value)[:80])
    return value


def _layer_of(record: dict, place: str, stage: int) -> Layer:
    block = record.get("block", "decoder")  # older versions wrote decoder layers only
    if block not in ("decoder", "mtp"):
        raise ScaleMoEError(f"{place}: block: must be 'decoder' or 'mtp'", found=repr(block)[:80])
    return stage, block, _int(record, place, "mtp_idx") if block == "mtp" else -1, _int(record, place, "layer")


def _int_matrix(record: dict, place: str, field: str) -> np.ndarray:
    """The list of equally long lists of integers from 0 in `field`, as int64 [rows, columns]."""
    value = record.get(field)
    try:
        matrix = np.array(value)
    except (ValueError, OverflowError):
        matrix = np.array(None)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "iu" or matrix.min() < 0 or matrix.max() >= 2**31:
        problem = f"{place}: {field}: must be a list of equally long lists of integers, 0 or more"
        raise ScaleMoEError(problem, found=repr(value)[:80])
    return matrix.astype(np.int64)


def _chosen(record: dict, place: str, num_experts: int) -> np.ndarray:
    """int64 [tokens, topk]: the experts of each token, checked."""
    tokens, topk = _int(record, place, "num_tokens"), _int(record, place, "topk")
    if topk < 1:
        raise ScaleMoEError(f"{place}: topk: must be 1 or more", found=topk)
    if tokens == 0 and record.get("top_indices") == []:
        return np.zeros((0, topk), dtype=np.int64)
    chosen_TK = _int_matrix(record, place, "top_indices")
    if chosen_TK.shape != (tokens, topk):
        problem = f"{place}: top_indices: must be num_tokens x topk = {tokens} x {topk}"
        raise ScaleMoEError(problem, found=f"{chosen_TK.shape[0]} x {chosen_TK.shape[1]}")
    if chosen_TK.max() >= num_experts:
        problem = f"{place}: top_indices: must be experts 0..{num_experts - 1}"
        raise ScaleMoEError(problem, found=f"expert {chosen_TK.max()}", try_="--experts with the model's number")
    ordered_TK = np.sort(chosen_TK, axis=1)
    twice = np.flatnonzero((ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(axis=1))
    if twice.size:
        raise ScaleMoEError(f"{place}: top_indices: a token must choose distinct experts", found=f"{chosen_TK[twice[0]].tolist()}")
    return chosen_TK
