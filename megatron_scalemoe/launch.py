"""Runs a training script of Megatron-LM, unmodified, with ScaleMoE's flags.

torchrun --nproc_per_node 8 -m megatron_scalemoe.launch /path/to/Megatron-LM/pretrain_gpt.py --moe-dispatcher scalemoe <Megatron's flags>

Without `--moe-dispatcher scalemoe` the script runs as it would without us: nothing of Megatron is touched. Where there is no GPU, Megatron
runs on CPU ranks, with or without that flag.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

from megatron_scalemoe.environment import refusal
from megatron_scalemoe.errors import ScaleMoEError, as_raised
from megatron_scalemoe.faults.told import tell_once

_HELP = {"-h", "--help"}
_NO_CHECKOUT = "the script in its checkout; a script of your own needs no launcher: docs/megatron-lm.md#in-your-own-script"


def main(argv: list[str] | None = None) -> int:
    """Runs the script that `argv` names first, with the rest as its flags; 1 for a user's error, 2 without a script."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stdout if _HELP & set(argv) else sys.stderr)
        return 0 if _HELP & set(argv) else 2
    try:
        run_script(Path(argv[0]), argv[1:])
    except ScaleMoEError as error:
        return tell_once(as_raised(error))
    except (OSError, MemoryError, ImportError) as error:
        return tell_once(refusal(error))
    return 0


def run_script(script: Path, flags: list[str]) -> None:
    """As `python SCRIPT FLAGS`, in this process. Raises `ScaleMoEError` for flags of ours that are wrong or do not fit."""
    if not script.is_file():
        raise ScaleMoEError("the first argument must be a training script of Megatron-LM", found=script, try_="/path/to/pretrain_gpt.py")
    from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args

    parser = add_scalemoe_args(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    ours, others = parser.parse_known_args(flags)
    scalemoe = scalemoe_config_from_args(ours)
    sys.argv = [str(script), *(others if scalemoe is None else flags)]
    _put_first(script.resolve().parent)
    import torch

    on_cpu, hooked = not torch.cuda.is_available(), scalemoe is not None or bool(_HELP & set(flags))
    if (on_cpu or hooked) and importlib.util.find_spec("megatron.training") is None:
        raise ScaleMoEError(f"no Megatron-LM beside {script}", found="no package megatron.training", try_=_NO_CHECKOUT)
    if on_cpu:
        from megatron_scalemoe.mcore.scripts import cpu as cpu_script

        cpu_script.install()
    if hooked:
        from megatron_scalemoe.mcore.scripts import megatron_lm

        megatron_lm.hook_parser()
    runpy.run_path(str(script), run_name="__main__")


def _put_first(folder: Path) -> None:
    """On `sys.path`, where Python has the folder of the script that it runs; there it has the current one, for `-m`."""
    if sys.path and Path(sys.path[0] or ".").resolve() == Path.cwd():
        del sys.path[0]
    sys.path.insert(0, str(folder))
    if not (folder / "megatron").is_dir() and (folder.parent / "megatron").is_dir():
        sys.path.insert(1, str(folder.parent))  # as Megatron's tools do themselves, when they have started


if __name__ == "__main__":
    sys.exit(main())
