"""The pure parts of tools/kill_campaign.py: what it draws, and that each of its checks can fail."""

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.plan.placement_plan import PlacementPlan

pytest.importorskip("torch", reason="kill_hooks.py needs the train extra")
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import kill_checks as checks
import kill_hooks as hooks

ITERATION = " iteration {:8d}/     100 | consumed samples: 8 | learning rate: 1.0E-03 | lm loss: {:.6E} | grad norm: 1.0 |\n"
RESUMED = " loaded checkpoint from /tmp/x at iteration 10\n" + "".join(ITERATION.format(i, 5 - i / 100) for i in range(11, 15))


def test_kills_cover_every_moment_and_are_seeded():
    kills = checks.choose_kills(50, 2, 0)
    assert kills == checks.choose_kills(50, 2, 0)
    assert kills != checks.choose_kills(50, 2, 1)
    assert {kill.moment for kill in kills} == set(checks.MOMENTS)
    assert {kill.rank for kill in kills} == {0, 1}
    assert all(1 <= kill.occurrence <= checks.MOMENTS[kill.moment] for kill in kills)
    assert sum(kill.moment == checks.ANYWHERE for kill in kills) == 15


def test_moments_of_loading_wait_for_a_checkpoint():
    load, other = checks.Kill(0, "checkpoint read", 1, 0.0), checks.Kill(1, "plan taken", 2, 0.0)
    kills = [load, other]
    assert checks.take_kill(kills, resumes=False) == other
    assert checks.take_kill(kills, resumes=True) == load
    assert kills == []


def test_the_log_is_read():
    log = checks.read_log(RESUMED + " scalemoe: iteration 16: new plan: 8 homes moved, 4 replicas added\n")
    assert log == checks.Log({11: 4.89, 12: 4.88, 13: 4.87, 14: 4.86}, 10, 8)


def test_a_survivor_must_name_the_victim_once():
    named = "[rank 1] error: rank 0 died or hangs: no sign of life for 5 s"
    assert checks.survivor_faults({0: "", 1: named}, victim=0) == []
    assert checks.survivor_faults({0: "", 1: "[rank 1] error: rank 0 died; rows can no longer be exchanged"}, victim=0) == []
    assert checks.survivor_faults({0: "", 1: named.replace("rank 0", "rank 10")}, victim=0)
    assert checks.survivor_faults({0: "", 1: "Connection closed by peer"}, victim=0)
    assert checks.survivor_faults({0: "", 1: named * 2}, victim=0)
    assert checks.survivor_faults({0: "", 1: named, 2: ""}, victim=0)


def test_a_restart_must_go_on_from_the_tracker():
    log = checks.read_log(RESUMED)
    assert checks.resume_faults(log, 10) == []
    assert checks.resume_faults(log, 20)
    assert checks.resume_faults(log, None)
    assert checks.resume_faults(checks.Log({11: 1.0, 13: 1.0}, 10, 0), 10)
    assert checks.resume_faults(checks.Log({1: 1.0, 2: 1.0}, None, 0), None) == []
    assert checks.resume_faults(checks.Log({1: 1.0}, None, 0), 10)
    assert checks.resume_faults(checks.Log({}, None, 0), 10) == [], "killed while loading"


def test_the_tracker_names_the_last_whole_checkpoint():
    for last, now, fine in [(19, 10, True), (20, 10, True), (20, 20, True), (21, 10, False), (21, 20, True)]:
        log = checks.Log(dict.fromkeys(range(11, last + 1), 1.0), 10, 0)
        assert (checks.tracker_faults(10, now, log, 10) == []) == fine, (last, now)
    assert checks.tracker_faults(10, None, checks.Log({}, 10, 0), 10)
    assert checks.tracker_faults(10, 20, checks.Log({11: 1.0}, 10, 0), 10)
    assert checks.tracker_faults(None, None, checks.Log({}, None, 0), 10) == []


def test_losses_must_be_the_references():
    reference = {1: 5.0, 2: 4.9}
    assert checks.loss_faults({1: 5.00009, 2: 4.9}, reference, 1e-4) == []
    assert "iteration 2" in checks.loss_faults({1: 5.0, 2: 4.8998}, reference, 1e-4)[0]
    assert checks.loss_faults({1: float("nan")}, reference, 1e-4)


def test_chunks_must_hold_every_expert_once():
    chunks = [((layer, expert, 0), (1, 1, 3)) for layer in range(2) for expert in range(4)]
    assert checks.tiling_faults("w", (2, 4, 3), chunks) == []
    assert checks.tiling_faults("w", (2, 4, 3), chunks[:-1]) == ["w: layer 1 expert 3 is not stored exactly once"]
    assert checks.tiling_faults("w", (2, 4, 3), [*chunks, chunks[1]]) == ["w: layer 0 expert 1 is not stored exactly once"]


def test_experts_must_differ_and_be_the_references():
    weights_LEN = np.random.default_rng(0).normal(size=(2, 4, 5))
    doubled_LEN, swapped_LEN = weights_LEN.copy(), weights_LEN.copy()
    doubled_LEN[1, 2] = doubled_LEN[1, 0]
    swapped_LEN[0, [1, 3]] = swapped_LEN[0, [3, 1]]
    assert checks.duplicate_faults("w", weights_LEN) == []
    assert checks.duplicate_faults("w", doubled_LEN) == ["w: layer 1 has 3 different experts"]
    assert checks.distance_faults("w", weights_LEN * (1 + 1e-6), weights_LEN, 1e-3) == []
    assert "layer 0 expert 1" in checks.distance_faults("w", swapped_LEN, weights_LEN, 1e-3)[0]


def test_random_plans_move_homes_and_are_valid():
    old = PlacementPlan.contiguous(2, 2, 8, replica_slots_per_rank=2)
    first, second = (hooks.random_plan(old, np.random.default_rng(seed)) for seed in (0, 1))
    assert len({old.content_hash, first.content_hash, second.content_hash}) == 3
    assert (first.home_rank != old.home_rank).any()
    assert first.num_replicas.tolist() == [4, 4]


def test_a_killer_waits_for_its_occurrence(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(hooks.os, "kill", lambda *arguments: killed.append(arguments))
    killer = hooks.Killer(3, 0.0, tmp_path / "marker")
    victim = type("Victim", (), {"work": lambda self: len(killed)})
    hooks.before(victim, "work", killer.comes)
    assert [victim().work() for _ in range(4)] == [0, 0, 1, 1]
    assert (tmp_path / "marker").exists()
