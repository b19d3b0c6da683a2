"""The CUDA kernels' logic, without a GPU: the same sources, compiled by g++, run by emulated threads under random schedules.

All ranks live in this process and launch everything before anything runs, so that only the kernels' own flags synchronise them.
"""

import dataclasses
import os
import re
import shutil
import subprocess

import pytest
import torch

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.transports.cuda import Limits
from tests.ops.transports.emulated import SOURCES, build_library, compile_object, interleaved, link, load_library, open_ranks
from tests.ops.transports.exchange_cases import Case, differing, expected_outputs, make_inputs, place_rows, run_operations

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")

STEPS = 3
CASES = {
    "one rank": Case(ranks=1, tokens=(40,)),
    "two ranks": Case(),
    "four ranks, top 4": Case(ranks=4, top_k=4, tokens=(33, 20, 7, 26), columns=16),
    "bf16": Case(ranks=2, top_k=4, dtype=torch.bfloat16, probs_dtype=torch.float32),
    "fp16, probs bf16": Case(top_k=4, dtype=torch.float16, probs_dtype=torch.bfloat16),
    "probs fp64": Case(probs_dtype=torch.float64),
    "32 experts of a token": Case(top_k=32, num_local=20, tokens=(9, 5), wanted=2.0, columns=8),
    "a rank without tokens": Case(ranks=4, tokens=(21, 0, 13, 0)),
    "no token wants anything": Case(wanted=0.0),
    "most tokens dropped": Case(ranks=4, tokens=(30, 30), wanted=0.3),
    "aligned": Case(alignment=16, num_local=5, top_k=3),
    "more tokens than threads": Case(top_k=2, tokens=(150, 70), columns=4),
    "rows of several chunks": Case(columns=1032, tokens=(6, 5)),
    "more local experts than threads": Case(num_local=70, top_k=3, columns=4, tokens=(12, 9)),
    "bounded rows": Case(max_rows=80, tokens=(20, 20), wanted=0.5),
}
# What is changed in csrc/cuda, and what notices: the comparison of `check`, or ThreadSanitizer, as x86 orders more than a GPU does.
MISTAKES = {
    "waits for the operation before": ("sync.h", "(&line->epoch) - epoch) < 0", "(&line->epoch) - epoch) < -1", "result"),
    "compares epochs unsigned": (
        "sync.h",
        "static_cast<int32_t>(load_acquire_system(&line->epoch) - epoch) < 0",
        "load_acquire_system(&line->epoch) < epoch",
        "result",
    ),
    "epoch does not move on": ("sync.h", "ex.state->epoch = epoch;", "", "result"),
    "arrivals are not reset": ("sync.h", "ex.state->blocks_arrived = 0;", "", "result"),
    "the first block releases the flags": ("sync.h", "1) == gridDim.x - 1", "1) == 0", "result"),
    "flag is a plain store": (
        "sync.h",
        "store_release_system(&flag_line(ex, threadIdx.x, ex.rank)->epoch, epoch)",
        "flag_line(ex, threadIdx.x, ex.rank)->epoch = epoch",
        "race",
    ),
    "flag is a relaxed load": ("sync.h", "load_acquire_system(&line->epoch)", "load_relaxed(&line->epoch)", "race"),
    "no barrier before the arrival": ("sync.h", "fence_system();\n  __syncthreads();", "fence_system();", "race"),
    "one half for all operations": ("layout.h", "(epoch & 1) * ex.half_bytes", "0 * ex.half_bytes", "race"),
    "rows land in the receiver's slot": (
        "push.h",
        "store_to(rows_at(ex, peer, epoch, ex.rank)",
        "store_to(rows_at(ex, peer, epoch, peer)",
        "result",
    ),
    "peers rotated wrongly": ("push.h", "first_peer + i - ex.num_ranks;", "first_peer + i - ex.num_ranks + 1;", "result"),
    "experts summed in descending order": (
        "rows.h",
        "for (; bits != 0; bits &= bits - 1) f(__ffs(static_cast<int>(bits)) - 1);",
        "for (int bit = 31; bit >= 0; --bit) if (bits >> bit & 1) f(bit);",
        "result",
    ),
    "counters not cleared in time": ("build_map.h", "count_L[e] = 0;\n  __syncthreads();", "count_L[e] = 0;", "race"),
    "counters read too early": (
        "build_map.h",
        "add_shared(&count_L[e], 1);\n  }\n  __syncthreads();",
        "add_shared(&count_L[e], 1);\n  }",
        "race",
    ),
    "votes read too early": ("build_map.h", "__popc(wanted);\n    __syncthreads();", "__popc(wanted);", "race"),
    "votes overwritten too early": ("build_map.h", "= row;\n    __syncthreads();", "= row;", "race"),
    "sources in another order": ("build_map.h", "if (other < s) rows_before", "if (other > s) rows_before", "result"),
    "padding is not zeroed": ("local.h", "fill_row(rows_RD + int64_t{r} * num_words, num_words, Word{0, 0, 0, 0});", "", "result"),
    "too many rows are let through": ("build_map.h", "segments.num_rows > row_capacity", "false", "result"),
    "absent experts are not marked": ("build_map.h", "e == 0 && (local < 0", "false && (local < 0", "result"),
    "rounds after every row": (
        "rows.h",
        "Row::add(sums[u], words[u]);",
        "Row::add(sums[u], words[u]), words[u] = Row::round(sums[u]), __builtin_memset(sums[u], 0, sizeof(sums[u])), "
        "Row::add(sums[u], words[u]);",
        "result",
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return load_library(build_library(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """All but the launchers, compiled without and with ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("objects")
    check, fibers = SOURCES / "emulation" / "check.cpp", SOURCES / "emulation" / "fibers.cpp"
    return {
        "result": [compile_object(check, folder / "check.o"), compile_object(fibers, folder / "fibers.o")],
        "race": [
            compile_object(check, folder / "check_tsan.o", "-fsanitize=thread"),
            compile_object(fibers, folder / "fibers_tsan.o", "-DSCALEMOE_TSAN"),
        ],
    }


def run_check(objects, sources, folder, by: str, configurations: int, seed: int) -> subprocess.CompletedProcess:
    flags = ["-fsanitize=thread"] if by == "race" else []
    # unoptimised it compiles in a third of the time, which is what most of these programs take
    launch = compile_object(sources / "launch.cu", folder / "launch.o", *(flags or ["-O0"]))
    program = link(folder / "check", [launch, *objects[by]], *flags)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, str(configurations), str(seed)], capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_exact(library, name):
    case = CASES[name]
    transports = open_ranks(library, case.ranks, case.limits)
    inputs = [[make_inputs(case, rank, seed) for rank in range(case.ranks)] for seed in range(STEPS)]
    with interleaved(library, seed=len(name)):
        outputs = [[run_operations(*rank, case) for rank in zip(transports, of_step, strict=True)] for of_step in inputs]
    for step, (of_step, got) in enumerate(zip(inputs, outputs, strict=True)):
        for rank, expected in enumerate(expected_outputs(of_step, case)):
            transports[rank].check()
            assert not differing(got[rank], expected), f"step {step}, rank {rank}"


def test_several_dispatches_may_be_in_flight(library):
    """As in Megatron: forward of all layers, then backward of all layers."""
    case = Case(top_k=3)
    transports = open_ranks(library, case.ranks, case.limits)
    layers = [[make_inputs(case, rank, layer) for rank in range(case.ranks)] for layer in range(3)]
    got = [[None] * case.ranks for _ in layers]
    with interleaved(library, seed=5):
        for rank, transport in enumerate(transports):
            maps = [transport.dispatch(layer[rank].x, layer[rank].experts, layer[rank].probs, case.num_local, 1)[3] for layer in layers]
            for i in reversed(range(len(layers))):
                got[i][rank] = transport.combine(layers[i][rank].expert_out, maps[i], layers[i][rank].experts, case.num_local)
    for layer, outputs in zip(layers, got, strict=True):
        for y, expected in zip(outputs, expected_outputs(layer, case), strict=True):
            assert torch.equal(y, expected.y)


def test_the_halves_of_all_ranks_run_on_one_stream(library):
    """Pushes wait for nobody, so several ranks can share a GPU and a stream if all push before any receives."""
    case = Case(ranks=4, tokens=(20, 11))
    transports = open_ranks(library, case.ranks, case.limits)
    inputs = [make_inputs(case, rank) for rank in range(case.ranks)]
    calls = [(i.x, i.experts, i.probs, case.num_local) for i in inputs]
    # At once, one launch after another: a kernel that waits for a later one would fail with a timeout.
    for transport, call in zip(transports, calls, strict=True):
        transport.dispatch_push(*call)
    dispatched = [transport.dispatch_receive(*call, 1) for transport, call in zip(transports, calls, strict=True)]
    for transport, i, (*_, map) in zip(transports, inputs, dispatched, strict=True):
        transport.combine_push(i.expert_out, map, i.experts, case.num_local)
    ys = [t.combine_receive(i.expert_out, i.experts, case.num_local)[0] for t, i in zip(transports, inputs, strict=True)]
    for y, (rows, *_), expected in zip(ys, dispatched, expected_outputs(inputs, case), strict=True):
        assert torch.equal(y, expected.y)
        assert torch.equal(rows[: len(expected.rows)], expected.rows)


def run_rank(transport, case: Case, rank: int):
    return run_operations(transport, make_inputs(case, rank), case)


def error_of(transport) -> str:
    with pytest.raises(ScaleMoEError) as caught:
        transport.check()
    return str(caught.value)


def test_a_missing_rank_is_named_and_nothing_waits_any_more(library):
    case = Case(ranks=4)
    transports = open_ranks(library, case.ranks, case.limits, timeouts_s=1e-3)
    with interleaved(library, seed=1):
        outputs = [run_rank(transports[rank], case, rank) for rank in (0, 1, 3)]
    for rank in (0, 1, 3):
        assert "ranks [2] did not get to the same operation in time" in error_of(transports[rank])
    for output in outputs:
        assert output.grad_x.isnan().all() and output.y.isnan().all() and output.grad_probs.isnan().all()
        assert not output.tokens_per_expert.any() and not output.gathered.any()
    with pytest.raises(ScaleMoEError, match=r"ranks \[2\]"):
        transports[0].gather_counts(torch.zeros(4, dtype=torch.int64))


def test_a_rank_that_fails_tells_the_others(library):
    """Rank 0 gives up on rank 2 soon; rank 1 would wait for much longer, but hears of it."""
    case = Case(ranks=3)
    transports = open_ranks(library, case.ranks, case.limits, timeouts_s=[1e-3, 1e3, 1e3])
    with interleaved(library, seed=1):
        for rank in (0, 1):
            run_rank(transports[rank], case, rank)
    message = error_of(transports[1])
    assert "ranks [2] did not get to the same operation" in message and "noticed by rank 0" in message


def test_more_rows_than_max_rows_are_an_error_everywhere(library):
    case = Case(ranks=2, top_k=2, wanted=4.0, max_rows=12)
    transports = open_ranks(library, case.ranks, case.limits)
    with interleaved(library, seed=2):
        outputs = [run_rank(transport, case, rank) for rank, transport in enumerate(transports)]
    inputs = [make_inputs(case, rank) for rank in range(2)]
    counts = [int(place_rows(inputs, case, rank)[1].sum()) for rank in range(2)]
    fullest = counts.index(max(counts))
    assert counts[fullest] > 12
    assert re.search(rf"rank {fullest} got more rows than it has room for: {counts[fullest]}", error_of(transports[fullest]))
    assert "got more rows" in error_of(transports[1 - fullest])
    assert all(output.grad_x.isnan().all() for output in outputs)


def test_ranks_that_call_with_other_sizes_are_named(library):
    case = Case(ranks=3, num_local=2, tokens=(5,))
    other = dataclasses.replace(case, num_local=3)
    transports = open_ranks(library, case.ranks, case.limits)
    with interleaved(library, seed=3):
        for rank, transport in enumerate(transports):
            run_rank(transport, other if rank == 1 else case, rank)
    assert "ranks [1] called another operation than rank 0, or with other sizes" in error_of(transports[0])


@pytest.mark.parametrize("experts", [[[1, 0]], [[-1, 0]], [[2, 2]], [[0, 4]]])
def test_experts_must_ascend_and_exist(library, experts):
    case = Case(tokens=(1,))
    transports = open_ranks(library, case.ranks, case.limits)
    with interleaved(library, seed=4):
        for rank, transport in enumerate(transports):
            inputs = make_inputs(case, rank)
            if rank == 1:
                inputs = dataclasses.replace(inputs, experts=torch.tensor(experts, dtype=torch.int32))
            run_operations(transport, inputs, case)
    for transport in transports:
        assert "rank 1 gave experts that are not ascending, or out of range" in error_of(transport)


def test_rows_cut_off_too_early_are_an_error(library):
    case = Case(wanted=4.0)
    transports = open_ranks(library, case.ranks, case.limits)
    with interleaved(library, seed=6):
        for rank, transport in enumerate(transports):
            i = make_inputs(case, rank)
            *_, map = transport.dispatch(i.x, i.experts, i.probs, case.num_local, 1)
            transport.combine(i.expert_out[:3] if rank == 1 else i.expert_out, map, i.experts, case.num_local)
    for transport in transports:
        assert "rank 1 gave fewer rows than the map of their dispatch has" in error_of(transport)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 33, "dtype": torch.bfloat16}, "a multiple of 16 bytes"),
        ({"dtype": torch.float64, "columns": 16}, "fp32, bf16 or fp16"),
        ({"columns": 64}, "at most 128 bytes"),
        ({"tokens": (25,)}, "at most 24 tokens"),
        ({"top_k": 3}, "1 to 2 experts per token"),
        ({"num_local": 1025}, "1 to 1024 experts on a rank"),
    ],
)
def test_calls_beyond_the_limits_are_refused(library, change, message):
    transports = open_ranks(library, 2, Case().limits)
    inputs = make_inputs(dataclasses.replace(Case(), **change), rank=0)
    with pytest.raises(ScaleMoEError, match=message):
        transports[0].dispatch(inputs.x, inputs.experts, inputs.probs, change.get("num_local", 2), 1)


def test_too_many_experts_per_token_or_ranks_are_refused(library):
    with pytest.raises(ScaleMoEError, match="at most 32 experts per token"):
        open_ranks(library, 2, Limits(1, 33, 16))
    with pytest.raises(ScaleMoEError, match="at most 32 ranks"):
        open_ranks(library, 33, Limits(1, 1, 16))


def test_a_closed_transport_says_so(library):
    transports = open_ranks(library, 1, Case(ranks=1).limits)
    transports[0].close()
    transports[0].close()
    with pytest.raises(ScaleMoEError, match="closed"):
        transports[0].gather_counts(torch.zeros(2, dtype=torch.int64))


def test_no_race_and_no_difference(objects, tmp_path):
    for by, configurations in (("result", 24), ("race", 3)):
        result = run_check(objects, SOURCES / "cuda", tmp_path, by, configurations, seed=3)
        assert result.returncode == 0 and f"{configurations} configurations agree" in result.stdout, result.stderr[-4000:]


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_found(objects, tmp_path, name):
    file, right, wrong, by = MISTAKES[name]
    shutil.copytree(SOURCES / "cuda", tmp_path / "cuda")
    (tmp_path / "emulation").symlink_to(SOURCES / "emulation")
    source = (tmp_path / "cuda" / file).read_text()
    assert source.count(right) == 1, "the mistake does not fit the source any more"
    (tmp_path / "cuda" / file).write_text(source.replace(right, wrong))
    result = run_check(objects, tmp_path / "cuda", tmp_path, by, 3 if by == "race" else 12, seed=1)
    assert result.returncode != 0, "not found"
    assert ("is wrong: rank" if by == "result" else "ThreadSanitizer: data race") in result.stderr
