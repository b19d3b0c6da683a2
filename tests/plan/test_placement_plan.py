"""PlacementPlan: its rules, its file, and that no expert can be lost or doubled."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan, load_plan, save_plan


@st.composite
def plans(draw) -> PlacementPlan:
    """Any valid plan: shuffled homes, replicas anywhere but beside another copy."""
    ranks, homes, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    replica_slots = draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    home_rank = np.stack([rng.permutation(np.repeat(np.arange(ranks), homes)) for _ in range(layers)])
    hosts = home_rank[:, :, None] == np.arange(ranks)
    for layer in range(layers):
        for rank in range(ranks):
            others = np.flatnonzero(~hosts[layer, :, rank])
            hosts[layer, rng.choice(others, min(rng.integers(0, replica_slots + 1), others.size), replace=False), rank] = True
    return PlacementPlan.from_hosts(home_rank, hosts, replica_slots_per_rank=replica_slots, provenance={"solver": "drawn"})


@given(plans())
def test_every_expert_has_exactly_one_home_and_at_least_one_slot(plan):
    for layer in range(plan.num_layers):
        assert plan.hosts(layer).sum(axis=1).min() >= 1
        assert np.array_equal(plan.physical_to_logical[layer, plan.home[layer]], np.arange(plan.num_logical_experts))
        assert np.array_equal(np.bincount(plan.home_rank[layer]), np.full(plan.num_ranks, plan.homes_per_rank))
        assert plan.hosts(layer).sum() == plan.num_logical_experts + plan.num_replicas[layer]


@given(plans())
def test_a_plan_is_rebuilt_from_its_hosts(plan):
    hosts = np.stack([plan.hosts(layer) for layer in range(plan.num_layers)])
    replica_slots = plan.slots_per_rank - plan.homes_per_rank
    again = PlacementPlan.from_hosts(plan.home_rank, hosts, replica_slots_per_rank=replica_slots)
    assert again.content_hash == plan.content_hash


@given(plans())
def test_a_file_gives_the_plan_back(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(plan, path)
    again = load_plan(path)
    assert np.array_equal(again.physical_to_logical, plan.physical_to_logical)
    assert (again.content_hash, again.provenance) == (plan.content_hash, {"solver": "drawn"})
    assert json.loads(path.read_text()) == plan.to_json()


def test_contiguous_is_megatrons_placement():
    plan = PlacementPlan.contiguous(2, 2, 4, replica_slots_per_rank=1)
    assert plan.physical_to_logical.tolist() == [[0, 1, EMPTY, 2, 3, EMPTY]] * 2
    assert plan.home.tolist() == [[0, 1, 3, 4]] * 2
    assert plan.num_replicas.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("slots", "ranks", "experts", "message"),
    [
        ([[0, 1, 2, 2]], 2, 4, "every expert exactly once"),
        ([[0, 1, 2, 3], [0, 1, 3, 3]], 2, 4, "layer 1: the home slots"),
        ([[0, 1, 0, 2, 3, 0]], 2, 4, "rank 0 must not hold an expert twice"),
        ([[0, -1, 1, 2, 3, 1]], 2, 4, "every expert exactly once"),
        ([[0, 1, 2, 4]], 2, 4, "experts 0..3"),
        ([[0, 1, 2]], 2, 3, "multiples of its ranks"),
        ([[0, 1]], 2, 4, "a slot for each expert"),
        ([], 2, 4, "layers x slots"),
    ],
)
def test_a_plan_that_loses_or_doubles_an_expert_is_refused(slots, ranks, experts, message):
    with pytest.raises(ScaleMoEError, match=message):
        PlacementPlan(np.array(slots), ranks, experts)


def test_too_many_replicas_for_the_slots_are_refused():
    hosts = np.ones((1, 2, 2), dtype=bool)
    with pytest.raises(ScaleMoEError, match="layer 0: rank 0 has room for 0 replicas"):
        PlacementPlan.from_hosts(np.array([[0, 1]]), hosts, replica_slots_per_rank=0)
    with pytest.raises(ScaleMoEError, match="rank 0 has room for 1 homes"):
        PlacementPlan.from_hosts(np.array([[0, 0]]), np.array([[[True, False], [True, False]]]), replica_slots_per_rank=0)


def test_a_plan_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        PlacementPlan.contiguous(1, 2, 2).physical_to_logical[0, 0] = 1


def edited(tmp_path, edit) -> object:
    path = tmp_path / "plan.json"
    save_plan(PlacementPlan.contiguous(2, 2, 4), path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=1))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(schema_version=2), r"plan.json:2: schema_version: must be 1"),
        (lambda c: c.update(slots=3), r"slots: unknown field"),
        (lambda c: c.pop("num_ranks"), r"'num_ranks' is missing"),
        (lambda c: c["physical_to_logical"][1].pop(), r"physical_to_logical.1: must have as many slots as layer 0 \(4\)"),
        (lambda c: c["physical_to_logical"][1].__setitem__(2, 0.5), r"plan.json:16: physical_to_logical.1.2: must be an integer"),
        (lambda c: c["physical_to_logical"][1].__setitem__(2, 0), r"physical_to_logical: layer 1: the home slots"),
        (lambda c: c["home"][0].reverse(), r"home: must be the first slots of each rank"),
    ],
)
def test_a_bad_plan_file_names_line_and_field(tmp_path, edit, message):
    path = edited(tmp_path, edit)
    with pytest.raises(ScaleMoEError, match=message):
        load_plan(path)
