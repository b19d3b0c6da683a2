"""The index of a `torch_dist` checkpoint, `.metadata`: a pickle, which could run anything; here it can only be what torch puts there."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes

_FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
# What torch and Megatron-Core put into it, besides dtypes.
_NAMES = {
    f"{_CHECKPOINT}.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties StorageMeta"
        " _MEM_FORMAT_ENCODING"
    ),
    f"{_CHECKPOINT}.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    f"{_CHECKPOINT}.filesystem": "_StorageInfo",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch": "Size device",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "pathlib": "Path PosixPath",
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} in it, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """Which tensors and objects lie where in its files. Raises `ScaleMoEError` for a file that is missing, damaged, or holds code."""
    path = checkpoint / _FILE
    try:
        metadata = _Restricted(io.BytesIO(read_bytes(path))).load()
    except ScaleMoEError:
        raise
    except Exception as error:  # unpickling a damaged file can raise anything
        raise ScaleMoEError(
            "must be the index of a torch_dist checkpoint", found=f"{type(error).__name__}: {error}"[:200], place=str(path)
        ) from error
    if not isinstance(metadata, Metadata):
        raise ScaleMoEError("must be the index of a torch_dist checkpoint", found=type(metadata).__name__, place=str(path))
    return metadata
