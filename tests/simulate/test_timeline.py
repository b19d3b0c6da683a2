import itertools
import json

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.simulate.engine import Replay, replay
from megatron_scalemoe.simulate.timeline import drawn_layers, timeline_events, write_timeline
from tests.simulate.test_engine import COST, LINKS, plan_with_replicas, small_trace

NODES = LINKS.node_of_rank


def replayed(overlap: float = 0.0, gpu_TFLOPs: float = 0.01) -> Replay:
    cost = COST.replaced(overlap=overlap, gpu_TFLOPs=gpu_TFLOPs)
    return replay(small_trace(), plan_with_replicas(1), LINKS, cost)


def events_by_rank(events: list[dict]) -> dict[int, list[dict]]:
    drawn = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["tid"], e["ts"]))
    return {rank: list(group) for rank, group in itertools.groupby(drawn, key=lambda e: e["tid"])}


# The second speed makes compute the shorter part, so that the other one is cut.
@pytest.mark.parametrize(("overlap", "gpu_TFLOPs"), [(0.0, 0.01), (0.5, 0.01), (1.0, 0.01), (0.7, 100.0), (1.0, 100.0)])
def test_each_ranks_events_follow_each_other_and_end_with_the_step(overlap, gpu_TFLOPs):
    result = replayed(overlap, gpu_TFLOPs)
    for events in events_by_rank(timeline_events(result, NODES, 2)).values():
        for a, b in itertools.pairwise(events):
            assert a["ts"] + a["dur"] == pytest.approx(b["ts"], abs=0.01)
        assert events[0]["ts"] == 0
        assert events[-1]["ts"] + events[-1]["dur"] == pytest.approx(result.total_us[2].sum(), abs=0.05)


def test_parts_take_the_time_of_the_replay():
    result = replayed()
    for rank, events in events_by_rank(timeline_events(result, NODES, 0)).items():
        for part, expected in (
            ("dispatch", result.dispatch_us[0].sum()),
            ("combine", result.combine_us[0].sum()),
            ("wait", result.wait_us[0, :, rank].sum()),
            ("compute", result.load[0, :, rank].sum() * COST.compute_us_per_row),
            ("replicas", result.replica_us[0].sum()),
        ):
            assert sum(e["dur"] for e in events if e["cat"].startswith(part)) == pytest.approx(expected, abs=0.05), part


def test_backward_goes_through_the_layers_in_reverse_and_starts_with_combine():
    events = events_by_rank(timeline_events(replayed(), NODES, 0))[0]
    order = [e["name"] for e in events if e["cat"].split(",")[0] in ("dispatch", "combine")]
    forward = [f"{part} {layer}" for layer in range(3) for part in ("dispatch", "combine")]
    assert order == forward + forward[::-1]


def test_tracks_are_named_by_node_and_rank():
    events = timeline_events(replayed(), NODES, 4)
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names[1, None] == "node 1 (recorded step 4)"
    assert [names[int(NODES[rank]), rank] for rank in range(4)] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert all(e["pid"] == NODES[e["tid"]] for e in events if e["ph"] == "X")


def test_a_large_step_is_cut_after_the_layers_that_fit():
    result = replayed()
    events = timeline_events(result, NODES, 0, max_events=2 * 8 * 4)
    assert drawn_layers(result, 2 * 8 * 4) == 2
    assert {e["name"].split()[-1] for e in events if e["ph"] == "X"} == {"0", "1", "replicas"}
    assert drawn_layers(result) == 3


def test_the_file_is_json_of_numbers_and_is_not_overwritten(tmp_path):
    path = tmp_path / "timeline.json"
    write_timeline(replayed(), NODES, 0, path)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["displayTimeUnit"] == "ms"
    assert content["traceEvents"] == timeline_events(replayed(), NODES, 0)
    assert all(e["dur"] > 0 and np.isfinite(e["ts"]) for e in content["traceEvents"] if e["ph"] == "X")
    with pytest.raises(ScaleMoEError, match="exists"):
        write_timeline(replayed(), NODES, 1, path)
    assert json.loads(path.read_text()) == content
