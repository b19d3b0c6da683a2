"""Refuses a Megatron-Core that this package is not tested with."""

from __future__ import annotations

from megatron_scalemoe.environment import MEGATRON_CORE_BELOW, MEGATRON_CORE_FROM, installed_version, is_supported_megatron
from megatron_scalemoe.errors import ScaleMoEError


def check_megatron_core() -> str:
    """The installed megatron-core version. Raises `ScaleMoEError` when it is missing or outside the tested range."""
    version = installed_version("megatron-core")
    if version is None or not is_supported_megatron(version):
        raise ScaleMoEError(
            f"ScaleMoE replaces modules inside megatron-core and is tested with >={MEGATRON_CORE_FROM},<{MEGATRON_CORE_BELOW}",
            found=f"megatron-core {version}" if version else "no megatron-core is installed",
            try_=f"pip install megatron-core=={MEGATRON_CORE_FROM}",
        )
    return version
