"""Damaged files: whatever is wrong with one, its reader answers with a ScaleMoEError that names it, or with valid content."""

import argparse
import dataclasses
import io
import json
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cost.calibrate import fit_bench
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.job.checks import check_job
from megatron_scalemoe.job.flags import flag_words
from megatron_scalemoe.job.job_file import load_job
from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan, load_plan, save_plan
from megatron_scalemoe.report.collect import collect
from megatron_scalemoe.topology.discover.cluster import cluster_of
from megatron_scalemoe.topology.discover.nccl_xml import read_nccl_xml
from megatron_scalemoe.topology.discover.nvidia_smi import read_nvidia_smi
from megatron_scalemoe.topology.discover.slurm import read_slurm
from megatron_scalemoe.topology.topology_file import load_topology
from megatron_scalemoe.traffic.megatron_jsonl import read_megatron
from megatron_scalemoe.traffic.trace import load_trace, save_trace

SAMPLES = Path(__file__).resolve().parent / "topology" / "discover" / "samples"
AWKWARD = [
    *(b"-1", b"0", b"2", b"7", b"0.5", b"1e999", b"99999999999999999999", b".nan", b"NaN", b"null", b"true", b"{}", b"[]", b"[[]]"),
    *(b'"', b"'", b"\n", b"\t", b": ", b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"<", b"&#0;", b"<!DOCTYPE", b"\x00", b"\xff"),
]
# Errors that are about several files together.
OF_ALL_FILES = ("no iteration has the same number of records in every layer of every rank", "calibration needs exchanges of two or more")
NUMBER = re.compile(rb"-?\d+(\.\d+)?")

SHORT_TOPOLOGY = b"""schema_version: 1
builder: rail_optimized
parameters: {nodes: 2, gpus_per_node: 2, scale_out_GBps: 25.0}
overrides:
- {target: node1, scale: 0.5}
"""
FULL_TOPOLOGY = b"""schema_version: 1
name: two GPUs
vertices:
- {name: a, kind: gpu, node: 0}
- {name: b, kind: gpu, node: 0}
links:
- {source: a, target: b, bandwidth_GBps: 50, latency_us: 1}
- {source: b, target: a, bandwidth_GBps: 50, latency_us: 1.5}
overrides:
- {target: a->b, bandwidth_GBps: 25}
"""
TRACED = b"""{"step": 0, "stage": 0, "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 2, "topk": 2, "top_indices": [[0, 3], [1, 2]]}
{"step": 0, "stage": 0, "block": "mtp", "mtp_idx": 0, "layer": 1, "rank": 0, "num_tokens": 1, "topk": 2, "top_indices": [[2, 1]]}
"""
RECEIVED = b"""{"iter": 10, "block": "decoder", "layer": 1, "tpe": [[3, 0, 5, 1], [2, 2, 2, 2]]}
{"iter": 10, "block": "decoder", "layer": 2, "tpe": [[0, 0, 8, 1], [1, 2, 3, 4]]}
"""
TIMES = {"step_us": 9.5, "dispatch_us": 2.0, "combine_us": 2.0, "compute_us": 5.5, "max_over_mean_mean": 1.5}
COMPARED = {"rows": [{"policy": "contiguous", **TIMES, "gap": 0.2}, {"policy": "memetic", **TIMES, "cost_us": 9.0}]}
PLANNED = {"solver": "memetic", "cost_us": 9.5, "gap": 0.1, "layers": [{"lower_bound_us": 8.0, "history": [[0.0, 12.5], [0.25, 9.5]]}]}
BENCH_ROW = {"dispatcher": "scalemoe", "ranks": 4, "median_ms": 2.5, "ratio_to_stock": 0.5}
BENCHED = {"rows": [{**BENCH_ROW, "bytes_out": 1024}, {**BENCH_ROW, "bytes_out": 65536, "median_ms": 3.5}]}


def as_json(content: dict) -> bytes:
    return json.dumps(content, indent=1).encode()


def npz(**arrays: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


PLAN = as_json(PlacementPlan.contiguous(2, 2, 4, replica_slots_per_rank=1).to_json())
META = json.dumps({"schema_version": 1, "topk": 2, "iterations": [0, 10]})
TRACE = npz(counts=np.arange(16, dtype=np.int32).reshape(2, 1, 2, 4), coactivation=np.ones((1, 4, 4)), meta=np.array(META))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to three edits: a byte changed, a stretch cut, doubled or replaced by something awkward, a number by another, the end missing."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 64)))
        kind = rng.randrange(8)
        if kind == 0:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:end] + content[at:end] + content[end:]
        elif kind == 3:
            content = content[:at] + rng.choice(AWKWARD) + content[end:]
        elif kind == 4 and rng.random() < 0.3:
            content = content[:at]
        elif numbers := list(NUMBER.finditer(content)):
            number = rng.choice(numbers)
            content = content[: number.start()] + rng.choice(AWKWARD) + content[number.end() :]
    return content


def mutated_npz(content: bytes, rng: random.Random) -> bytes:
    """Half of them as any file; but then the checksums give most away, so the others are damaged inside and packed again."""
    if rng.random() < 0.5:
        return mutated(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    members[name] = mutated(members[name], rng)
    if rng.random() < 0.1:
        members[rng.choice(("counts.npy", "meta.npy", "other"))] = members.pop(name)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return packed.getvalue()


@dataclasses.dataclass(frozen=True)
class Format:
    """content: of a valid file. read: takes the path. name: of the file, in a directory of its own. cases: how many damaged files."""

    name: str
    content: bytes
    read: Callable[[Path], object]
    cases: int
    mutate: Callable[[bytes, random.Random], bytes] = mutated


def fuzz(form: Format, directory: Path) -> tuple[int, int]:
    """(accepted, refused) of `form.cases` damaged files. AssertionError for the first with another error or with a warning."""
    path, accepted, refused = directory / form.name, 0, 0
    path.write_bytes(form.content)
    form.read(path)
    for seed in range(form.cases):
        damaged = form.mutate(form.content, random.Random(seed))
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                form.read(path)
        except ScaleMoEError as error:
            if not any(text in str(error) for text in (form.name, *OF_ALL_FILES)):
                raise AssertionError(f"{form.name}, case {seed}: the error must name the file") from error
            refused += 1
        except Exception as error:
            raise AssertionError(f"{form.name}, case {seed}: {type(error).__name__}: {error}; the file:\n{damaged!r}") from error
        else:
            accepted += 1
    return accepted, refused


def read_plan(path: Path) -> None:
    """What was accepted must keep the rules of a plan, and survive being written."""
    plan = load_plan(path)
    for slots in plan.physical_to_logical.reshape(plan.num_layers, plan.num_ranks, -1).tolist():
        homes = [expert for own in slots for expert in own[: plan.num_logical_experts // plan.num_ranks]]
        assert sorted(homes) == list(range(plan.num_logical_experts))
        for own in slots:
            held = [expert for expert in own if expert != EMPTY]
            assert len(set(held)) == len(held)
            assert set(held) <= set(homes)
    again = path.with_name("again.json")
    save_plan(plan, again, force=True)
    assert load_plan(again).content_hash == plan.content_hash


def read_trace(path: Path) -> None:
    trace = load_trace(path)
    assert trace.counts.min() >= 0
    assert trace.coactivation is None or trace.coactivation.min() >= 0
    assert np.isfinite(trace.layer(0).counts).all()
    again = path.with_name("again.npz")
    save_trace(trace, again, force=True)
    assert load_trace(again).content_hash == trace.content_hash


def read_topology(path: Path) -> None:
    topology = load_topology(path)
    assert topology.bandwidth_GBps.min() > 0
    assert np.isfinite(topology.latency_us).all()


def read_run(path: Path) -> None:
    """The collector lists damaged files instead of raising; there it must say why."""
    path.with_name("trace.npz").write_bytes(TRACE)
    run = collect(path.parent)
    if run.damaged or run.unrecognised:
        raise ScaleMoEError(f"{path.name}: {run.damaged or run.unrecognised}")
    [row] = [rows for kind in run.results.values() for rows in kind]
    assert all(np.isfinite(value) for one in row.rows for value in one.values() if isinstance(value, float))


def read_calibration(path: Path) -> None:
    fit = fit_bench([path])
    assert fit.overhead_us >= 0
    assert np.isfinite(fit.residuals).all()


def read_fabric(path: Path) -> None:
    fabric = read_slurm(path)
    cluster_of(read_nvidia_smi(SAMPLES / "nvidia_smi_pcie_l40s.txt"), fabric, hosts=fabric.hosts[:2])


JOB = (SAMPLES.parents[3] / "examples" / "configs" / "tiny_cpu.yaml").read_bytes()
OPTIONS = b"dispatch: ragged\nmax_rows_factor: 2.5\nreplicas: 4\nmigrate: true\ntrace_interval: 10\n"


def read_options(path: Path) -> None:
    args = add_scalemoe_args(argparse.ArgumentParser()).parse_args(["--moe-dispatcher", "scalemoe", "--scalemoe-config", str(path)])
    assert scalemoe_config_from_args(args).trace_interval >= 1


def read_job(path: Path) -> None:
    job = load_job(path)
    assert check_job(job)["ranks"] >= 1
    assert all(isinstance(word, str) for word in flag_words(job))


# The most cases where files come from outside, or are read most often.
FORMATS = (
    Format("plan.json", PLAN, read_plan, 400),
    Format("trace.npz", TRACE, read_trace, 400, mutated_npz),
    Format("topology.yaml", SHORT_TOPOLOGY, read_topology, 250),
    Format("topology_full.yaml", FULL_TOPOLOGY, read_topology, 250),
    Format("job.yaml", JOB, read_job, 250),
    Format("options.yaml", OPTIONS, read_options, 200),
    Format("router_trace_rank0.jsonl", TRACED, lambda path: read_megatron(path.parent, num_experts=4), 200),
    Format("rank0.jsonl", RECEIVED, lambda path: read_megatron(path.parent, topk=2), 150),
    Format("compare.json", as_json(COMPARED), read_run, 100),
    Format("planned.json", as_json(PLANNED), read_run, 100),
    Format("bench.json", as_json(BENCHED), read_run, 100),
    Format("calibration.json", as_json(BENCHED), read_calibration, 100),
    Format("smi.txt", (SAMPLES / "nvidia_smi_pcie_l40s.txt").read_bytes(), read_nvidia_smi, 100),
    Format("nccl.xml", (SAMPLES / "nccl_pcie_a6000.xml").read_bytes(), read_nccl_xml, 100),
    Format("slurm.conf", (SAMPLES / "slurm_tree.conf").read_bytes(), read_fabric, 100),
)


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_a_damaged_file_is_refused_by_name_or_valid(form, tmp_path):
    accepted, refused = fuzz(form, tmp_path)
    assert accepted >= form.cases // 100, "too few of the damaged files are still valid: the readers' later checks are not reached"
    assert refused >= form.cases // 5, "too few are refused: the damage does none"


def read_without_checks(path: Path) -> None:
    int(path.read_text(errors="replace").split()[1])


def read_with_a_nameless_error(path: Path) -> None:
    if path.read_bytes() != SHORT_TOPOLOGY:
        raise ScaleMoEError("something is wrong")


@pytest.mark.parametrize(("reader", "noticed"), [(read_without_checks, "ValueError"), (read_with_a_nameless_error, "must name the file")])
def test_a_planted_bug_is_noticed(reader, noticed, tmp_path):
    with pytest.raises(AssertionError, match=noticed):
        fuzz(Format("f.yaml", SHORT_TOPOLOGY, reader, 200), tmp_path)
