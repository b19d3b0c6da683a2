"""The whole command line, and an argument parser that says which flag or command was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from megatron_scalemoe.cli import doctor, flags, launch, report, trace
from megatron_scalemoe.cli.bench import command as bench
from megatron_scalemoe.cli.planning import compare, diff, plan, simulate
from megatron_scalemoe.cli.topology import command as topology
from megatron_scalemoe.version import __version__

_BAD_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)$")
_COMMANDS = (doctor, bench, topology, trace, plan, diff, simulate, compare, report, flags, launch)


def build_parser() -> argparse.ArgumentParser:
    """Each sub-command sets `handler(args) -> exit code`."""
    parser = Parser(prog="scalemoe", description="Tools around ScaleMoE for Megatron-Core.", allow_abbrev=False, epilog=epilog("scalemoe"))
    parser.add_argument("--version", action="version", version=f"scalemoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


class Parser(argparse.ArgumentParser):
    """Names the nearest flag or command in its errors, and leaves words that a sub-command does not know to no other."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.epilog = self.epilog or epilog(self.prog)
        self.formatter_class = argparse.RawDescriptionHelpFormatter if self.epilog else self.formatter_class
        self._words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        if args is not None:
            self._words = args
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        meant = []
        if bad := _BAD_CHOICE.search(message):
            meant += _nearest(bad[1], re.findall(r"[^\s',]+", bad[2]))
        if self._subparsers is None:
            known = list(self._option_string_actions)
            for word in (word.partition("=")[0] for word in self._words):
                if word.startswith("--") and word not in known:
                    meant += _nearest(word, known)
        super().error(f"{message}\n  try:   {', '.join(dict.fromkeys(meant))}" if meant else message)


def _nearest(word: str, known: list[str]) -> list[str]:
    return [f"{close} for {word}" for close in difflib.get_close_matches(word, known, n=1)]


def epilog(prog: str) -> str | None:
    """The examples of a command's --help."""
    lines = _EXAMPLES.get(prog)
    return "example:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


_PLANNED = "--topology cluster.yaml --trace routing.npz"
_EXAMPLES = {
    "scalemoe": ("scalemoe doctor", "scalemoe plan --help"),
    "scalemoe doctor": ("scalemoe doctor --json",),
    "scalemoe bench": ("scalemoe bench dispatch --ranks 2",),
    "scalemoe bench dispatch": ("scalemoe bench dispatch --ranks 2 --tokens 1024 -o bench.json",),
    "scalemoe bench kernels": ("scalemoe bench kernels --sizes 1 16",),
    "scalemoe bench live": ("scalemoe bench live --ranks 2 --steps 30",),
    "scalemoe bench solvers": ("scalemoe bench solvers --json -o solvers.json",),
    "scalemoe bench split": ("scalemoe bench split --ranks 64 --experts 256",),
    "scalemoe topology": ("scalemoe topology build dgx_h100 --nodes 4 -o cluster.yaml", "scalemoe topology show cluster.yaml"),
    "scalemoe topology build": ("scalemoe topology build dgx_h100 --nodes 4 -o cluster.yaml",),
    "scalemoe topology show": ("scalemoe topology show cluster.yaml",),
    "scalemoe topology check": ("scalemoe topology check cluster.yaml",),
    "scalemoe topology discover": ("scalemoe topology discover --nccl-xml node.xml --slurm topology.conf -o cluster.yaml",),
    "scalemoe topology measure": ("scalemoe topology measure --ranks 2", "scalemoe topology measure --probe probe.json -o measured.yaml"),
    "scalemoe trace": ("scalemoe trace synth --ranks 16 --experts 64 -o routing.npz", "scalemoe trace summary routing.npz"),
    "scalemoe trace synth": ("scalemoe trace synth --ranks 16 --experts 64 --skew 1.2 -o routing.npz",),
    "scalemoe trace convert": ("scalemoe trace convert records/ --experts 64 -o routing.npz",),
    "scalemoe trace summary": ("scalemoe trace summary routing.npz --plot routing.svg",),
    "scalemoe plan": (f"scalemoe plan {_PLANNED} --replicas 16 -o plan.json",),
    "scalemoe diff": (f"scalemoe diff old.json new.json {_PLANNED}",),
    "scalemoe simulate": (f"scalemoe simulate {_PLANNED} --plan plan.json",),
    "scalemoe compare": (f"scalemoe compare {_PLANNED} --replicas 16",),
    "scalemoe report": ("scalemoe report run/ -o report.html",),
    "scalemoe flags": ("scalemoe flags job.yaml --explain",),
    "scalemoe launch": ("scalemoe launch job.yaml --dry-run",),
}
