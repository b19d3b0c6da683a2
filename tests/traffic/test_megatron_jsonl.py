"""Megatron's JSON Lines, written by hand after the documented formats, against counts made from the same tokens another way."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic import megatron_jsonl
from megatron_scalemoe.traffic.megatron_jsonl import read_megatron

EXPERTS, TOPK = 6, 2


def record(step: int, layer: int, rank: int, chosen: list[list[int]], **more: object) -> dict:
    head = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return {**head, "num_tokens": len(chosen), "topk": TOPK, "top_indices": chosen, **more}


def tokens(seed: object, count: int = 5) -> list[list[int]]:
    rng = random.Random(str(seed))
    return [rng.sample(range(EXPERTS), TOPK) for _ in range(count)]


def write(folder: Path, rank: int, records: list[dict], name: str = "router_trace_rank{}.jsonl") -> Path:
    path = folder / name.format(rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def write_job(folder: Path, ranks: int, iterations: list[int], layers: list[int], micro_batches: int = 1) -> dict:
    """A whole job; returns the tokens by (iteration, layer, rank, micro-batch)."""
    said = {}
    for rank in range(ranks):
        records = []
        for iteration in iterations:
            for micro_batch in range(micro_batches):
                for layer in layers:
                    key = iteration, layer, rank, micro_batch
                    said[key] = tokens(key)
                    records.append(record(iteration, layer, rank, said[key]))
        write(folder, rank, records)
    return said


def count(chosen: list[list[int]]) -> list[int]:
    return [sum(e in token for token in chosen) for e in range(EXPERTS)]


def test_counts_and_coactivation_are_those_of_the_tokens(tmp_path):
    said = write_job(tmp_path, ranks=3, iterations=[0, 10], layers=[1, 3])
    trace = read_megatron(tmp_path, num_experts=EXPERTS)
    assert trace.counts.shape == (2, 2, 3, EXPERTS)
    for (iteration, layer, rank, _), chosen in said.items():
        assert trace.counts[[0, 10].index(iteration), [1, 3].index(layer), rank].tolist() == count(chosen)
    assert trace.topk == TOPK
    assert trace.iterations == [0, 10]
    assert trace.meta["layer_names"] == ["decoder.1", "decoder.3"]
    for index, layer in enumerate([1, 3]):
        together = np.zeros((EXPERTS, EXPERTS))
        for (_, of_layer, _, _), chosen in said.items():
            for a, b in chosen if of_layer == layer else []:
                together[a, b] += 1
                together[b, a] += 1
                together[a, a] += 1
                together[b, b] += 1
        np.testing.assert_array_equal(trace.coactivation[index], together)


def test_micro_batches_and_expert_parallel_groups_are_steps(tmp_path):
    said = write_job(tmp_path, ranks=4, iterations=[7], layers=[0], micro_batches=3)
    trace = read_megatron(tmp_path, num_ranks=2, num_experts=EXPERTS, coactivation=False)
    assert trace.coactivation is None
    assert trace.counts.shape == (6, 1, 2, EXPERTS)
    assert trace.iterations == [7] * 6
    expected = [[count(said[7, 0, group * 2 + rank, m]) for rank in range(2)] for group in range(2) for m in range(3)]
    assert trace.counts[:, 0].tolist() == expected


def test_pipeline_stages_are_further_layers(tmp_path):
    said = write_job(tmp_path, ranks=4, iterations=[0], layers=[0, 1])
    trace = read_megatron(tmp_path, pipeline_stages=2, num_experts=EXPERTS)
    assert trace.meta["layer_names"] == ["stage0.decoder.0", "stage0.decoder.1", "stage1.decoder.0", "stage1.decoder.1"]
    expected = [[count(said[0, layer, stage * 2 + rank, 0]) for rank in range(2)] for stage in range(2) for layer in range(2)]
    assert trace.counts[0].tolist() == expected


def test_mtp_layers_come_after_the_decoder(tmp_path):
    write(tmp_path, 0, [record(0, 1, 0, [[4, 5]], block="mtp", mtp_idx=0), record(0, 1, 0, [[0, 1]])])
    trace = read_megatron(tmp_path, num_experts=EXPERTS)
    assert trace.meta["layer_names"] == ["decoder.1", "mtp.0.1"]
    assert trace.counts[0, :, 0].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_an_iteration_that_a_rank_lacks_is_left_out(tmp_path):
    write_job(tmp_path, ranks=2, iterations=[0, 1], layers=[0])
    path = write(tmp_path, 1, [record(0, 0, 1, tokens("a"))])
    trace = read_megatron(tmp_path, num_experts=EXPERTS)
    assert trace.iterations == [0]
    assert trace.meta["incomplete_iterations"] == 1
    path.write_text("")
    with pytest.raises(ScaleMoEError, match="no iteration has the same number of records"):
        read_megatron(tmp_path, num_experts=EXPERTS)


def test_a_rank_without_tokens_counts_zero(tmp_path):
    write(tmp_path, 0, [record(0, 0, 0, [[0, 1]])])
    write(tmp_path, 1, [record(0, 0, 1, [])])
    assert read_megatron(tmp_path, num_experts=3).counts[0, 0].tolist() == [[1, 1, 0], [0, 0, 0]]


def write_received(folder: Path) -> None:
    for rank, counts in enumerate([[[7, 0], [3, 2]], [[1, 4], [0, 9]]]):
        mtp = {"iter": 100, "block": "mtp", "mtp_idx": 0, "layer": 0, "tpe": counts[::-1]}
        write(folder, rank, [{"iter": 100, "block": "decoder", "layer": 2, "tpe": counts}, mtp], "tokens_per_expert/rank{}.jsonl")


@pytest.mark.parametrize("inside", ["", "tokens_per_expert"])
def test_tokens_per_expert_are_spread_evenly_over_the_sources(tmp_path, inside):
    write_received(tmp_path)
    trace = read_megatron(tmp_path / inside, topk=2)
    load = trace.counts.sum(axis=2)
    assert load[:, 0].tolist() == [[7, 0, 1, 4], [3, 2, 0, 9]]
    assert load[:, 1].tolist() == [[3, 2, 0, 9], [7, 0, 1, 4]]
    assert np.ptp(trace.counts, axis=2).max() == 1
    assert np.ptp(trace.counts.sum(axis=3), axis=2).max() <= 1
    assert trace.topk == 2
    assert trace.iterations == [100, 100]
    assert trace.meta["layer_names"] == ["decoder.2", "mtp.0.0"]


@pytest.mark.parametrize(
    ("ranks", "stages", "num_ranks", "held"),
    [
        ([2, 3], 2, None, [1]),
        ([0, 1], 2, 2, [0]),
        ([0, 1, 2, 3], 3, None, [0, 1]),
        ([2, 3, 4, 5], 4, None, [1, 2]),
        ([4, 5, 6, 7], 2, 2, [1]),
    ],
)
def test_stages_without_moe_layers_write_no_files(tmp_path, ranks, stages, num_ranks, held):
    for rank in ranks:
        write(tmp_path, rank, [{"iter": 1, "layer": 0, "tpe": [[rank, 1]]}], "rank{}.jsonl")
    trace = read_megatron(tmp_path, topk=1, pipeline_stages=stages, num_ranks=num_ranks)
    assert trace.meta["layer_names"] == [f"stage{stage}.decoder.0" if held[-1] else "decoder.0" for stage in held]
    assert trace.counts.sum() == sum(ranks) + len(ranks)


@pytest.mark.parametrize(("missing", "cause"), [("call", "dropped"), ("layer", "--pipeline-stages")])
def test_the_cause_of_uneven_records_is_the_one_that_it_can_be(tmp_path, missing, cause):
    write(tmp_path, 0, [record(0, layer, 0, tokens("a")) for layer in (0, 0, 1, 1)])
    write(tmp_path, 1, [record(0, layer, 1, tokens("b")) for layer in ((0, 0, 1) if missing == "call" else (0, 0))])
    with pytest.raises(ScaleMoEError, match="no iteration has the same number") as caught:
        read_megatron(tmp_path, num_experts=EXPERTS)
    assert cause in caught.value.try_


def test_a_line_without_end_and_a_pipe_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_jsonl, "_LINE_BYTES", 300)
    path = write(tmp_path, 0, [record(0, 0, 0, [[0, 1]]), record(0, 0, 0, tokens("x", 60))])
    with pytest.raises(ScaleMoEError, match=r"rank0.jsonl:2: a line has at most"):
        read_megatron(tmp_path, num_experts=EXPERTS)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ScaleMoEError, match="must be a regular file"):
        read_megatron(tmp_path, num_experts=EXPERTS)


GOOD = record(0, 0, 0, [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"router_trace_rank0.jsonl:2: not valid JSON"),
        ("[1]", r"rank0.jsonl:2: must be a mapping"),
        ({**GOOD, "block": "encoder"}, r":2: block: must be 'decoder' or 'mtp'\n  found: 'encoder'"),
        ({**GOOD, "block": "mtp"}, r":2: mtp_idx: must be an integer"),
        ({**GOOD, "step": -1}, r":2: step: must be an integer"),
        ({**GOOD, "num_tokens": 3}, r":2: top_indices: must be num_tokens x topk = 3 x 2\n  found: 2 x 2"),
        ({**GOOD, "top_indices": [[0, 1], [2]]}, r":2: top_indices: must be a list of equally long lists"),
        ({**GOOD, "top_indices": [[0, 1.5], [2, 3]]}, r":2: top_indices: must be a list of equally long lists of integers"),
        ({**GOOD, "top_indices": [[0, -1], [2, 3]]}, r":2: top_indices: must be"),
        ({**GOOD, "top_indices": [[0, 6], [2, 3]]}, r":2: top_indices: must be experts 0..5\n  found: expert 6\n  try:   --experts"),
        ({**GOOD, "top_indices": [[0, 1], [3, 3]]}, r":2: top_indices: a token must choose distinct experts\n  found: \[3, 3\]"),
        ({**GOOD, "topk": 1, "top_indices": [[0], [1]]}, r":2: topk: must be the same in all records\n  found: 1, and 2 before"),
        ({**GOOD, "topk": 0, "num_tokens": 0, "top_indices": []}, r":2: topk: must be 1 or more"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path, 0, [GOOD])
    with open(path, "a", encoding="utf-8") as file:
        file.write(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ScaleMoEError, match=message):
        read_megatron(tmp_path, num_experts=EXPERTS)


def test_errors_of_the_whole_job_say_what_to_do(tmp_path):
    with pytest.raises(ScaleMoEError, match="must hold router_trace_rank0"):
        read_megatron(tmp_path / "nowhere", num_experts=EXPERTS)
    write(tmp_path, 0, [GOOD])
    write(tmp_path, 2, [GOOD])
    with pytest.raises(ScaleMoEError, match="a file for every rank\n  found: none for rank 1, but for 2"):
        read_megatron(tmp_path, num_experts=EXPERTS)
    write(tmp_path, 1, [GOOD])
    with pytest.raises(ScaleMoEError, match="--experts with the model's number"):
        read_megatron(tmp_path)
    with pytest.raises(ScaleMoEError, match="expert-parallel ranks must divide"):
        read_megatron(tmp_path, num_experts=EXPERTS, num_ranks=2)
    with pytest.raises(ScaleMoEError, match="must be 1 or more"):
        read_megatron(tmp_path, num_experts=EXPERTS, pipeline_stages=0)
    with pytest.raises(ScaleMoEError, match="at most 65536 experts"):
        read_megatron(tmp_path, num_experts=100_000)
    with pytest.raises(ScaleMoEError, match="co-activation of 1 layers"):
        read_megatron(tmp_path, num_experts=65_536, coactivation=True)
    (tmp_path / "job").mkdir()
    write_received(tmp_path / "job")
    with pytest.raises(ScaleMoEError, match="--topk with the model's number"):
        read_megatron(tmp_path / "job")
