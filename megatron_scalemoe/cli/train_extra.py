"""The optional packages that commands with ranks need."""

from megatron_scalemoe.environment import installed_version
from megatron_scalemoe.errors import ScaleMoEError


def require_train_extra(command: str) -> None:
    """Raises `ScaleMoEError` naming what of the train extra is not installed; `command` is who needs it."""
    missing = [name for name in ("torch", "megatron-core", "psutil") if installed_version(name) is None]
    if missing:
        raise ScaleMoEError(
            f"{command} needs the train extra",
            found=f"not installed: {', '.join(missing)}",
            try_="pip install 'megatron-scalemoe[train]'",
        )
