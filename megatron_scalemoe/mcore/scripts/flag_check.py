"""What Megatron-LM's own parser says to a command line: names, types and choices. A process of its own, for `scalemoe flags`.

python -m megatron_scalemoe.mcore.scripts.flag_check MEGATRON_LM_PATH < [words] > {"problem": text or null, "nearest": flag or null}
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_words(words: list[str]) -> dict[str, str | None]:
    """The first problem, and the most similar flag where there is none of that name. `megatron.training` must be importable."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_scalemoe.mcore.arguments import add_scalemoe_args

    parser = add_scalemoe_args(add_megatron_arguments(_Parser(allow_abbrev=False)))
    try:
        unknown = parser.parse_known_args(words)[1]
    except ValueError as error:
        return {"problem": str(error), "nearest": None}
    if not unknown:
        return {"problem": None, "nearest": None}
    flags = [name for action in parser._actions for name in action.option_strings]
    return {"problem": f"does not know {unknown[0]}", "nearest": next(iter(difflib.get_close_matches(unknown[0], flags, n=1)), None)}


def main() -> None:
    """Reads the words, prints the answer."""
    sys.path.append(sys.argv[1])  # an installed Megatron-Core goes first: its helpers are compiled
    words = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        if not torch.cuda.is_available():
            from megatron_scalemoe.mcore.scripts import cpu

            cpu.install()
        answer = check_words(words)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
