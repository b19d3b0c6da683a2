"""A checkpoint's directory: what is left of others, what lies beside it, and what in it must not be believed."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.directory import find_damage, latest_iteration, publish, start_writing
from megatron_scalemoe.mcore.checkpoint.metadata import check_objects, read_metadata


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_half_checkpoints_of_runs_that_died_go_with_the_next_one(tmp_path):
    start_writing(tmp_path, 5)
    written = start_writing(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [written]


def test_what_cannot_be_written_beside_a_checkpoint_does_not_cost_it(tmp_path):
    written = start_writing(tmp_path, 5)
    (written / "plan.json").mkdir()
    with pytest.warns(UserWarning, match=r"plan.json is missing"):
        path = publish(written, tmp_path, 5, {"plan.json": "{}", "other.txt": "x"})
    assert latest_iteration(tmp_path) == 5
    assert (path / "other.txt").read_text() == "x"


@pytest.mark.parametrize("text", ["", "abc", "9" * 5000, "1.5"])
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path, text):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ScaleMoEError, match="number of an iteration"):
        latest_iteration(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", '{"a":' * 5000, '{"sharded_backend": []}', None])
def test_other_metadata_is_damage(tmp_path, text):
    if text is None:
        (tmp_path / "metadata.json").mkdir()
    else:
        (tmp_path / "metadata.json").write_text(text)
    assert find_damage(tmp_path)


def test_code_in_an_index_is_not_run(tmp_path):
    for number, content in enumerate((Code(tmp_path / "ran"), Metadata({"x": Code(tmp_path / "ran")}), {})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(ScaleMoEError, match="index of a torch_dist checkpoint"):
            read_metadata(folder)
    assert not (tmp_path / "ran").exists()


def test_code_among_the_tensors_is_not_run(tmp_path):
    rng_state = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # what Megatron has there
    for name, content in (("good", rng_state), ("bad", Code(tmp_path / "ran"))):
        dcp.save({"weight": torch.zeros(2), "rng_state": content}, checkpoint_id=tmp_path / name, no_dist=True)
    check_objects(tmp_path / "good", read_metadata(tmp_path / "good"))
    with pytest.raises(ScaleMoEError, match="rng_state must be plain data"):
        check_objects(tmp_path / "bad", read_metadata(tmp_path / "bad"))
    assert not (tmp_path / "ran").exists()


def test_every_dtype_and_layout_of_torch_is_read(tmp_path):
    kinds = [kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)]
    properties = {str(kind): TensorProperties(dtype=kind, layout=torch.strided) for kind in kinds}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(properties)))
    assert read_metadata(tmp_path).state_dict_metadata == properties
