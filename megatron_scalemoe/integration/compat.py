"""Which Megatron-Core this package is tested against."""

from __future__ import annotations

import importlib.metadata

from megatron_scalemoe.errors import ScaleMoEError

TESTED_MEGATRON_CORE = ("0.16.1",)


def check_megatron_core() -> str:
    """The installed megatron-core version. Raises `ScaleMoEError` when it is missing or outside the tested range."""
    wanted = " or ".join(TESTED_MEGATRON_CORE)
    fix = f"pip install megatron-core=={TESTED_MEGATRON_CORE[-1]}"
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ScaleMoEError(f"ScaleMoE needs megatron-core {wanted}", found="no megatron-core is installed", try_=fix) from None
    if version.split("+")[0] not in TESTED_MEGATRON_CORE:
        raise ScaleMoEError(
            f"ScaleMoE replaces modules inside megatron-core and is tested with {wanted} only", found=f"megatron-core {version}", try_=fix
        )
    return version
