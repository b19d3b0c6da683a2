"""Tests of the CUDA transport that need a GPU, and our CUDA library. Without them each is skipped, with the reason."""

import pytest
import torch

from megatron_scalemoe.ops import native


def pytest_collection_modifyitems(items):
    reason = native.why_not("cuda") if torch.cuda.is_available() else "no GPU here: these kernels have only been compiled and emulated"
    if reason is not None:
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def library():
    return native.cuda()
