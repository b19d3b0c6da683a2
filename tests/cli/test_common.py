"""Tables and output flags."""

import argparse
from typing import Literal

import pytest
from pydantic import Field

from megatron_scalemoe.cli.common import add_option_flags, format_table, options_from_args
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.typed import Options
from megatron_scalemoe.units import format_table as format_table_of_width


class Example(Options):
    gpu_TFLOPs: float = Field(default=2.0, gt=0)
    """speed"""

    exchange: Literal["flat", "1dh"] = "flat"
    """how"""

    gated: bool = True
    """or not"""

    ranks: int = Field(default=8, ge=1)
    """how many"""


def options(*arguments: str) -> Example:
    parser = argparse.ArgumentParser()
    add_option_flags(parser, Example, ranks=64)
    assert "how many (64)" in parser.format_help()
    return options_from_args(parser.parse_args(arguments), Example)


def test_table_without_rows():
    assert format_table(["a", "bb"], []) == "a  bb\n-  --"


def test_a_narrow_terminal_shortens_texts_and_then_leaves_columns_out():
    headers, row = ["policy", "step ms", "why"], ["local_search + 16 replicas, every 2", "12.345", "a reason of some length, wrapped"]
    for width in (60, 45, 24):
        table = format_table_of_width(headers, [row], width=width)
        assert max(map(len, table.splitlines()[:3])) <= width
        assert "12.345" in table
    assert "why" in table.splitlines()[-1]
    assert "leng…" not in format_table_of_width(headers, [row], width=60)


def test_what_is_no_character_is_escaped():
    assert format_table(["name"], [["\ud800\x1b[31m"]]).splitlines()[-1] == "\\ud800\\x1b[31m"


def test_each_option_has_a_flag_whose_default_may_be_the_commands_own():
    assert options() == Example(ranks=64)
    given = options("--gpu-tflops", "3", "--exchange", "1dh", "--no-gated", "--ranks", "1")
    assert given == Example(gpu_TFLOPs=3.0, exchange="1dh", gated=False, ranks=1)


def test_a_bad_option_is_named_by_its_flag():
    with pytest.raises(ScaleMoEError, match=r"^--gpu-tflops: must be above 0"):
        options("--gpu-tflops", "0")
    with pytest.raises(SystemExit, match="2"):
        options("--exchange", "3dh")
