"""What Megatron-LM's own parser says to the options of `megatron_scalemoe.job` and to whole jobs. A process of its own: it imports much.

python megatron_parser.py /path/to/Megatron-LM < {"flags": {flag: kind}, "jobs": {name: [words, ranks]}} > {"flags": {...}, "jobs": {...}}
"""

import argparse
import enum
import io
import json
import os
import sys
import types
from contextlib import redirect_stderr, redirect_stdout

TYPES = {"count": int, "int": int, "float": float, "str": str}


def disagreement(action: argparse.Action | None, kind) -> str:
    """Why Megatron's parser would not take values of this kind, or an empty text."""
    if action is None:
        return "no such flag"
    if kind == "bool":
        return "" if action.nargs == 0 else "takes a value"
    if isinstance(kind, dict):
        return disagreement(action, kind["each"]) if action.nargs in ("*", "+") else "takes one value"
    if isinstance(kind, list):
        # an enum's parser takes its members' names
        choices = {choice.name if isinstance(choice, enum.Enum) else choice for choice in action.choices or ()}
        unknown = sorted(set(kind) - choices)
        return f"does not know {unknown}" if unknown else ""
    if action.nargs == 0:
        return "takes no value"
    wanted = action.type or str
    return "" if wanted is TYPES[kind] or wanted.__name__ == "moe_freq_type" else f"is of type {wanted.__name__}"


def refusal(words: list[str], ranks: int) -> str:
    """What Megatron prints when it refuses the command line, or an empty text."""
    from megatron.training import arguments

    from megatron_scalemoe.mcore.arguments import add_scalemoe_args

    os.environ.update(WORLD_SIZE=str(ranks), RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.argv = ["pretrain_gpt.py", *words]
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            arguments.validate_args(arguments.parse_args(add_scalemoe_args), {"tokenizer_type": "GPT2BPETokenizer"})
    except (SystemExit, AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__} {error}: {said.getvalue()[-300:]}"
    return ""


def main() -> None:
    sys.path.append(sys.argv[1])  # an installed Megatron-Core goes first: its helpers are compiled
    kernels = types.ModuleType("megatron.core.transformer.custom_layers.batch_invariant_kernels")
    kernels.is_batch_invariant_mode_enabled = kernels.enable_batch_invariant_mode = kernels.set_batch_invariant_mode = None
    sys.modules[kernels.__name__] = kernels  # they import triton
    import torch

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    from megatron.training.arguments import add_megatron_arguments

    asked = json.load(sys.stdin)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    with redirect_stdout(sys.stderr):
        add_megatron_arguments(parser)
        known = {name: action for action in parser._actions for name in action.option_strings}
        answer = {
            "flags": {flag: disagreement(known.get(flag), kind) for flag, kind in asked["flags"].items()},
            "jobs": {name: refusal(*job) for name, job in asked["jobs"].items()},
        }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
