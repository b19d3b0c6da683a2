"""Refuses a Megatron-Core that this package is not tested with."""

from __future__ import annotations

import megatron.core

from megatron_scalemoe.environment import MEGATRON_CORE_RELEASES, is_supported_megatron
from megatron_scalemoe.errors import ScaleMoEError


def check_megatron_core() -> str:
    """The version of megatron.core that is in use, installed or a checkout's. Raises `ScaleMoEError` outside the tested range."""
    version = megatron.core.__version__
    if not is_supported_megatron(version):
        raise ScaleMoEError(
            f"ScaleMoE replaces modules inside megatron-core and is tested with {' and '.join(MEGATRON_CORE_RELEASES)}",
            found=f"megatron-core {version} in {next(iter(megatron.core.__path__))}",
            try_=f"pip install megatron-core=={MEGATRON_CORE_RELEASES[0]}, or Megatron-LM at its tag core_v{MEGATRON_CORE_RELEASES[0]}",
        )
    return version
