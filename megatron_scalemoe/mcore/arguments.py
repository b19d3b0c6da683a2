"""Our command-line flags, made from the fields of `ScaleMoEConfig`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_scalemoe.config import ScaleMoEConfig, flag_name
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document
from megatron_scalemoe.typed import check, plain_kind


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
    for name, field in ScaleMoEConfig.model_fields.items():
        default = "" if field.default in (None, False) else f" Default: {field.default}."
        group.add_argument(flag_name(name), default=None, help=" ".join(field.description.split()) + default, **_how(field))
    return parser


def _how(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field's value."""
    kind = plain_kind(field.annotation)
    if kind is bool:
        return {"action": "store_true"}
    return {"choices": kind} if isinstance(kind, tuple) else {"type": kind}


def scalemoe_config_from_args(args: argparse.Namespace) -> ScaleMoEConfig | None:
    """The config that the flags (and `--scalemoe-config`) describe, or None with `--moe-dispatcher stock`.

    Raises `ScaleMoEError` for `--scalemoe-*` flags without `--moe-dispatcher scalemoe` and for unreadable or wrong options.
    """
    flags = {name: value for name in ScaleMoEConfig.model_fields if (value := getattr(args, f"scalemoe_{name}")) is not None}
    if args.moe_dispatcher == "stock":
        given = [flag_name(name) for name in flags] + (["--scalemoe-config"] if args.scalemoe_config else [])
        if given:
            raise ScaleMoEError(f"{', '.join(given)} needs --moe-dispatcher scalemoe", found="--moe-dispatcher stock")
        return None
    document = read_document(Path(args.scalemoe_config)) if args.scalemoe_config else None
    try:
        return check(ScaleMoEConfig, {**(document.data if document else {}), **flags})
    except ScaleMoEError as error:
        if document is None or error.field[0] in flags:
            raise error.at(flag_name(error.field[0]), ()) from error
        raise document.located(error) from error
