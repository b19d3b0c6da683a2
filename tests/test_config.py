"""Options: ranges, help texts, flags and YAML."""

import argparse
import dataclasses

import pytest

from megatron_scalemoe.config import ScaleMoEConfig, field_help, flag_name
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args


def parse(*argv: str) -> ScaleMoEConfig | None:
    parser = add_scalemoe_args(argparse.ArgumentParser(allow_abbrev=False))
    return scalemoe_config_from_args(parser.parse_args(argv))


def test_every_field_has_help_and_a_flag():
    helps = field_help()
    parser = add_scalemoe_args(argparse.ArgumentParser())
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for field in dataclasses.fields(ScaleMoEConfig):
        assert len(helps[field.name]) > 20
        assert flag_name(field.name) in flags


def test_stock_is_the_default():
    assert parse() is None
    assert parse("--moe-dispatcher", "scalemoe") == ScaleMoEConfig()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--scalemoe-dispatch", "padded"], "needs --moe-dispatcher scalemoe"),
        (["--moe-dispatcher", "scalemoe", "--scalemoe-padded-capacity-factor", "1.0"], "needs --scalemoe-dispatch padded"),
        (
            ["--moe-dispatcher", "scalemoe", "--scalemoe-dispatch", "padded", "--scalemoe-padded-capacity-factor", "0"],
            "must be above 0",
        ),
        (["--moe-dispatcher", "scalemoe", "--scalemoe-max-rows-factor", "0.5"], "must be 1 or more"),
        (["--moe-dispatcher", "scalemoe", "--scalemoe-force-skew", "-1"], "must be 0 or above"),
        (["--moe-dispatcher", "scalemoe", "--scalemoe-config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_contradictions_are_refused_by_flag_name(argv, message):
    with pytest.raises(ScaleMoEError, match=message):
        parse(*argv)


def test_yaml_gives_options_and_flags_win(tmp_path):
    path = tmp_path / "scalemoe.yaml"
    path.write_text("dispatch: padded\npadded_capacity_factor: 1.5\n")
    from_file = ["--moe-dispatcher", "scalemoe", "--scalemoe-config", str(path)]
    assert parse(*from_file) == ScaleMoEConfig(dispatch="padded", padded_capacity_factor=1.5)
    assert parse(*from_file, "--scalemoe-padded-capacity-factor", "2").padded_capacity_factor == 2


@pytest.mark.parametrize(("text", "message"), [("dispach: padded", "unknown option"), ("- a\n- b", "mapping"), ("a: [", "cannot be read")])
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "scalemoe.yaml"
    path.write_text(text)
    with pytest.raises(ScaleMoEError, match=message):
        parse("--moe-dispatcher", "scalemoe", "--scalemoe-config", str(path))


@pytest.mark.parametrize("values", [{"dispatch": "magic"}, {"transport": "tcp"}, {"experts": "none"}])
def test_unknown_choices(values):
    with pytest.raises(ScaleMoEError, match="must be one of"):
        ScaleMoEConfig(**values)
