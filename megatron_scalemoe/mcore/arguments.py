"""Our command-line flags, made from the fields of `ScaleMoEConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import yaml

from megatron_scalemoe.config import ScaleMoEConfig, config_from_dict, field_help, flag_name
from megatron_scalemoe.errors import ScaleMoEError


def add_scalemoe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--moe-dispatcher` and one `--scalemoe-*` flag per config field; returns the parser, as Megatron's extra_args_provider does."""
    group = parser.add_argument_group("scalemoe")
    group.add_argument(
        "--moe-dispatcher",
        choices=("scalemoe", "stock"),
        default="stock",
        help="stock: Megatron-Core's own MoE layer, untouched. scalemoe: the same layer, loss and checkpoints with ScaleMoE's dispatcher.",
    )
    group.add_argument("--scalemoe-config", metavar="YAML", help="Read the options below from a file (names with underscores); flags win.")
    helps = field_help()
    for field in dataclasses.fields(ScaleMoEConfig):
        default = "" if field.default in (None, False) else f" Default: {field.default}."
        kind = field.metadata.get("type", str)
        how = {"action": "store_true"} if kind == "flag" else {"type": kind, "choices": field.metadata.get("choices")}
        group.add_argument(flag_name(field.name), default=None, help=helps[field.name] + default, **how)
    return parser


def scalemoe_config_from_args(args: argparse.Namespace) -> ScaleMoEConfig | None:
    """The config that the flags (and `--scalemoe-config`) describe, or None with `--moe-dispatcher stock`.

    Raises `ScaleMoEError` for `--scalemoe-*` flags without `--moe-dispatcher scalemoe` and for unreadable or wrong options.
    """
    names = [field.name for field in dataclasses.fields(ScaleMoEConfig)]
    flags = {name: value for name in names if (value := getattr(args, f"scalemoe_{name}")) is not None}
    if args.moe_dispatcher == "stock":
        given = [flag_name(name) for name in flags] + (["--scalemoe-config"] if args.scalemoe_config else [])
        if given:
            raise ScaleMoEError(f"{', '.join(given)} needs --moe-dispatcher scalemoe", found="--moe-dispatcher stock")
        return None
    from_file = read_yaml_mapping("--scalemoe-config", args.scalemoe_config) if args.scalemoe_config else {}
    return config_from_dict({**from_file, **flags}, source=args.scalemoe_config or "flags")


def read_yaml_mapping(flag: str, path: str) -> dict:
    """The mapping in the YAML file that `flag` names. Raises `ScaleMoEError` when it cannot be read or is something else."""
    try:
        values = yaml.safe_load(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScaleMoEError(f"{flag} {path} cannot be read", found=error) from error
    if not isinstance(values, dict):
        raise ScaleMoEError(f"{flag} {path} must be a mapping of option names to values", found=type(values).__name__)
    return values
