"""Our figures in Megatron's own writers, and the table in its log."""

import json

from tests.megatron_lm.script import OURS, needs_checkout, run

pytestmark = needs_checkout

# Stands in for Weights & Biases: writes what it is given to a file.
WANDB = """
import json, types
config = types.SimpleNamespace(update=lambda values: None)
run = None
init = lambda **options: None
finish = lambda: None
def log(values, step=None):
    with open({path!r}, "a") as file:
        file.write(json.dumps([{{name: float(value) for name, value in values.items() if isinstance(value, (int, float))}}, step]) + "\\n")
"""
FLAGS = ("--expert-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--train-iters", 8, "--moe-expert-capacity-factor", 1.0)
LIVE = ("--scalemoe-replicas", 2, "--scalemoe-replan-interval", 4, "--scalemoe-trace-interval", 2, "--scalemoe-table-interval", 4)


def test_writers_and_table(tmp_path):
    """Layers of both pipeline stages are written by the last rank, which is in the second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "wandb.py").write_text(WANDB.format(path=str(tmp_path / "wandb.jsonl")))
    writers = ("--tensorboard-dir", tmp_path / "tensorboard", "--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", tmp_path)
    log = run(4, *FLAGS, *OURS, *LIVE, *writers, "--tensorboard-log-interval", 2, modules=str(tmp_path)).log
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("max_over_mean", "max_over_mean/layer_1", "max_over_mean/layer_2", "sent_bytes", "local_share", "drop_rate", "replicas"):
        assert [event.step for event in written.Scalars(f"scalemoe/{name}")] == [2, 4, 6, 8], name
    assert all(event.value >= 1 for event in written.Scalars("scalemoe/max_over_mean/layer_1"))
    assert 0 < written.Scalars("scalemoe/drop_rate")[-1].value < 0.5
    assert 0 < written.Scalars("scalemoe/local_share")[-1].value < 1
    assert "scalemoe/drop_rate/layer_1" not in written.Tags()["scalars"]
    assert [event.step for event in written.Scalars("scalemoe/interval")] == [4, 8]
    assert "scalemoe/events/text_summary" in written.Tags()["tensors"]
    lines = [json.loads(line) for line in (tmp_path / "wandb.jsonl").read_text().splitlines()]
    in_wandb = {(name, step): value for values, step in lines for name, value in values.items()}
    for event in written.Scalars("scalemoe/sent_bytes"):
        assert abs(in_wandb["scalemoe/sent_bytes", event.step] - event.value) < 1
    tables = [log.partition(f"scalemoe: MoE layers until iteration {last}\n")[2].splitlines()[:4] for last in (4, 8)]
    for header, _, first, second in tables:
        assert header.startswith("layer  max/mean")
        assert (first.split()[0], second.split()[0]) == ("1", "2")
