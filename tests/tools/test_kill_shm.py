"""tools/kill_shm.py: a short campaign, what it draws, and that each of its checks can fail."""

import collections
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the transport needs the train extra")
from megatron_scalemoe.ops import native

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import kill_shm

KILLED = kill_shm.Kill(ranks=3, victim=1, signal=signal.SIGKILL, when_ready=True, delay_s=0.0, seed=0)
NAMED = {"error": "ScaleMoEError: rank 1 died; rows can no longer be exchanged", "time_s": 0.0, "left": []}


def test_kills_are_seeded_and_of_all_kinds():
    kills = [kill_shm.choose_kill(seed) for seed in range(200)]
    assert kills == [kill_shm.choose_kill(seed) for seed in range(200)]
    assert {(kill.ranks, kill.victim) for kill in kills} == {(ranks, victim) for ranks in (2, 3, 4) for victim in range(ranks)}
    assert collections.Counter(kill.signal for kill in kills)[signal.SIGSTOP] == 20
    assert 0.6 < sum(kill.when_ready for kill in kills) / 200 < 0.8


def test_a_survivor_must_name_the_victim_and_leave_nothing():
    assert kill_shm.survivor_faults(0, NAMED, KILLED) == []
    assert kill_shm.survivor_faults(0, None, KILLED) == ["rank 0 did not end in time"]
    assert kill_shm.survivor_faults(0, NAMED | {"error": "ScaleMoEError: rank 2 died"}, KILLED)
    assert kill_shm.survivor_faults(0, NAMED | {"error": "OSError: rank 1 died"}, KILLED)
    assert kill_shm.survivor_faults(0, NAMED | {"error": "ScaleMoEError: rank 1 did not come"}, KILLED)
    assert kill_shm.survivor_faults(0, NAMED | {"left": ["/memfd:scalemoe-rows"]}, KILLED)


@pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not("cpu")))
def test_a_short_campaign():
    # in a process of its own: it forks, and this one has threads
    command = [sys.executable, kill_shm.__file__, "--kills", "8", "--seed", "2", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr
    kills = json.loads(result.stdout)["kills"]
    assert [kill["seed"] for kill in kills] == list(range(2, 10))
    assert {kill["signal"] for kill in kills} == {signal.SIGKILL, signal.SIGSTOP}
    assert all(kill["noticed_s"] is not None and not kill["faults"] for kill in kills)
