"""The pickles of a `torch_dist` checkpoint, which could run anything: its index, `.metadata`, and objects among the tensors. Here they can
only be what torch and Megatron-Core put there."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes

_FILE = ".metadata"
# How a pickle makes an array: a function of numpy's, which has moved between its versions.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
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


def check_objects(checkpoint: Path, metadata: Metadata) -> None:
    """Raises `ScaleMoEError` if an object among the tensors holds code: torch's planner would run it when it loads."""
    known = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), io.BytesIO, _RECONSTRUCT]
    with torch.serialization.safe_globals(known):
        for index, place in metadata.storage_data.items():
            if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                continue
            path = checkpoint / place.relative_path
            with path.open("rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            try:
                torch.load(content, weights_only=True)
            except Exception as error:
                found = next((line for line in str(error).splitlines() if "GLOBAL" in line), type(error).__name__)
                raise ScaleMoEError(f"{index.fqn} must be plain data", found=found.strip(), place=str(path)) from error
