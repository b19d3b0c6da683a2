"""The probe on ranks that exist: every pair, plausible times, the same result everywhere."""

import json
import time

import torch.distributed as dist

from megatron_scalemoe.bench import link_probe
from megatron_scalemoe.cli.topology.discover import WORKER
from megatron_scalemoe.cli.torchrun import run_ranks
from megatron_scalemoe.topology.measured import read_measurement
from tests.rank_pool import pool

SIZES = [1 << 10, 1 << 20, 1 << 23]


def probe(iters: int) -> dict:
    return link_probe.probe_pairs(SIZES, iters=iters, warmup=1)


def probe_with_slow_messages() -> dict:
    """Sends from rank 1 to rank 0 take 5 ms more; the answers, one byte, do not."""
    real = dist.send

    def slow_send(tensor, destination):
        if dist.get_rank() == 1 and tensor.numel() > link_probe.ACK_BYTES:
            time.sleep(5e-3)
        real(tensor, destination)

    dist.send = slow_send
    try:
        return probe(10)
    finally:
        dist.send = real


def test_all_ranks_get_every_pair_in_both_directions():
    results = pool(4).run(probe, 3)
    assert results[0] == results[3]
    ends = [(pair["source"], pair["destination"]) for pair in results[0]["pairs"]]
    assert ends == [(i, j) for i in range(4) for j in range(4) if i != j]
    assert results[0]["node_of_rank"] == [0, 0, 0, 0]
    assert (results[0]["backend"], results[0]["device"]) == ("gloo", "cpu")
    for pair in results[0]["pairs"]:
        assert pair["bytes"] == SIZES
        assert min(pair["time_us"]) > 0
        assert pair["time_us"][0] < pair["time_us"][-1]


def test_the_directions_of_a_pair_are_told_apart():
    there, back = pool(2).run(probe_with_slow_messages)[0]["pairs"]
    assert (there["source"], back["source"]) == (0, 1)
    assert back["time_us"][0] > 5e3
    assert there["time_us"][0] < 5e3


def test_the_worker_writes_a_file_that_reads_back(tmp_path):
    path = tmp_path / "probe.json"
    sizes = ["--sizes", "1024", "8388608"]
    run_ranks(WORKER, [*sizes, "--iters", "1", "--result-file", str(path)], ranks=2, timeout=120, quiet=True)
    measurement = read_measurement(path)
    assert [(p.source, p.target) for p in measurement.pairs] == [(0, 1), (1, 0)]
    assert json.loads(path.read_text())["device"] == "cpu"
