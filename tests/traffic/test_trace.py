"""Traces: their rules, their mean traffic, and their file."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace, save_trace

COUNTS = np.arange(2 * 1 * 2 * 3).reshape(2, 1, 2, 3)
PAIRS = np.array([[[6.0, 2, 1], [2, 8, 3], [1, 3, 10]]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"counts": COUNTS.astype(float)}, "counts must be integers .steps, layers, ranks, experts.\n  found: float64"),
        ({"counts": COUNTS[0]}, "counts must be integers"),
        ({"counts": COUNTS[:0]}, "counts must be integers"),
        ({"counts": COUNTS - 1}, "counts must be 0 or more, and fit int32\n  found: -1"),
        ({"counts": COUNTS + 2**31}, "fit int32"),
        ({"coactivation": PAIRS[0]}, r"coactivation must be numbers \[layers, experts, experts\] = \(1, 3, 3\)"),
        ({"coactivation": PAIRS * [1, 1, np.nan]}, "symmetric, finite and 0 or more"),
        ({"coactivation": -PAIRS}, "symmetric, finite and 0 or more"),
        ({"coactivation": PAIRS * [1, 2, 3]}, "symmetric"),
        ({"meta": {"topk": 4}}, "meta: topk: must be 1 to the 3 experts"),
        ({"meta": {"topk": "2"}}, "meta: topk: must be an integer"),
        ({"meta": {"topk": 0}}, "meta: topk: must be 1 or more"),
        ({"meta": {"iterations": [1]}}, "meta: iterations: must name one iteration"),
        ({"meta": {"iterations": [1, 2.5]}}, "meta: iterations.1: must be an integer"),
    ],
)
def test_a_trace_that_breaks_a_rule_is_refused(parts, message):
    with pytest.raises(ScaleMoEError, match=message):
        RoutingTrace(**{"counts": COUNTS, **parts})


def test_a_trace_knows_its_shape_and_defaults():
    trace = RoutingTrace(COUNTS)
    assert (trace.num_steps, trace.num_layers, trace.num_ranks, trace.num_experts) == (2, 1, 2, 3)
    assert trace.counts.dtype == np.int32
    assert trace.topk == 1
    assert trace.iterations == [0, 1]
    assert RoutingTrace(COUNTS, meta={"iterations": [5, 9], "topk": 2}).iterations == [5, 9]


def test_the_mean_traffic_of_a_layer_is_over_the_steps_asked_for():
    trace = RoutingTrace(COUNTS, PAIRS, {"topk": 2})
    both = trace.layer(0)
    np.testing.assert_array_equal(both.counts, COUNTS[:, 0].mean(axis=0))
    np.testing.assert_array_equal(both.loads, COUNTS[:, 0].sum(axis=1))
    assert both.topk == 2
    last = trace.layer(0, slice(1, 2))
    np.testing.assert_array_equal(last.counts, COUNTS[1, 0])
    assert last.loads.shape == (1, 3)
    assert RoutingTrace(COUNTS).layer(0).coactivation is None


@pytest.mark.parametrize("sample", [0.25, 1.0, 40.0])
def test_only_the_size_of_the_pairs_against_their_diagonal_matters(sample):
    pairs = RoutingTrace(COUNTS, PAIRS * sample, {"topk": 2}).layer(0).coactivation
    assert (pairs.diagonal() == 0).all()
    # 33 selections per step, 24 in the sample.
    assert pairs[1, 2] == pytest.approx(3 * 33 / 24)
    np.testing.assert_array_equal(pairs, pairs.T)


def test_pairs_without_a_diagonal_were_counted_over_all_steps():
    pairs = RoutingTrace(COUNTS, PAIRS * (1 - np.eye(3)), {"topk": 2}).layer(0).coactivation
    assert pairs[1, 2] == 1.5


def test_equal_traces_have_equal_hashes_whatever_made_them():
    trace = RoutingTrace(COUNTS, PAIRS, {"topk": 2})
    assert trace.content_hash == RoutingTrace(COUNTS.astype(np.int32), PAIRS.copy(), {"topk": 1, "source": "x"}).content_hash
    others = [
        RoutingTrace(COUNTS),
        RoutingTrace(COUNTS + 1, PAIRS),
        RoutingTrace(COUNTS, PAIRS * 2),
        RoutingTrace(COUNTS.reshape(1, 2, 2, 3)),
    ]
    assert len({trace.content_hash, *(other.content_hash for other in others)}) == 5


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.booleans(), st.integers(0, 99))
def test_what_is_written_is_what_is_read(tmp_path_factory, steps, layers, ranks, experts, pairs, seed):
    trace = synthesize(ranks=ranks, experts=experts, layers=layers, steps=steps, tokens_per_rank=30, coactivation=pairs, seed=seed, drift=0)
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    save_trace(trace, path)
    again = load_trace(path)
    assert again.content_hash == trace.content_hash
    assert again.meta == {**trace.meta, "schema_version": 1}
    assert again.topk == trace.topk


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.npz: not a readable npz file"),
        (npz(counts=COUNTS)[:-30], "t.npz: not a readable npz file"),
        (npz(count=COUNTS), r"t.npz: counts: the array is missing\n  found: arrays \['count'\]"),
        (npz(counts=COUNTS.astype(float)), "t.npz: counts must be integers"),
        (npz(counts=COUNTS, coactivation=PAIRS[:, :2]), "t.npz: coactivation must be numbers"),
        (npz(counts=COUNTS, meta=np.array("{")), "t.npz: meta: must be JSON text"),
        (npz(counts=COUNTS, meta=np.array("[]")), "t.npz: meta: must be a JSON mapping"),
        (npz(counts=COUNTS, meta=np.array(json.dumps({"schema_version": 2}))), "meta: schema_version: must be 1"),
        (npz(counts=COUNTS, meta=np.array(json.dumps({"topk": 9}))), "t.npz: meta: topk: must be"),
        (npz(counts=np.array([object()])), "t.npz: counts: must be numbers"),
    ],
)
def test_errors_name_the_file_and_the_array(tmp_path, content, message):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(ScaleMoEError, match=message):
        load_trace(path)


def with_member(path: Path, name: str, declared: tuple[int, ...], held: int) -> Path:
    """A trace with one more member, or another one, whose header declares a shape of int32 and that holds so many bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": declared})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if name != "counts":
            counts = io.BytesIO()
            np.save(counts, COUNTS)
            archive.writestr("counts.npy", counts.getvalue())
        archive.writestr(f"{name}.npy", header.getvalue() + b"\0" * held)
    return path


def test_an_array_is_unpacked_only_if_it_has_the_size_that_it_declares(tmp_path):
    for declared, held in (((1, 1, 1 << 40, 1), 0), ((1, 1, 2, 3), 20), ((1, 1, 2, 3), 28)):
        with pytest.raises(ScaleMoEError, match="counts: must have the size that it declares"):
            load_trace(with_member(tmp_path / "t.npz", "counts", declared, held))


def test_other_arrays_are_not_unpacked(tmp_path):
    assert load_trace(with_member(tmp_path / "t.npz", "huge", (1 << 40,), 0)).num_experts == 3
