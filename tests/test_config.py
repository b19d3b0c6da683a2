"""Options: types, ranges, contradictions, flags and YAML; what an error of them says, as data."""

import argparse
import pickle

import pytest

from megatron_scalemoe.config import ScaleMoEConfig, flag_name
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args


def parse(*argv: str) -> ScaleMoEConfig | None:
    parser = add_scalemoe_args(argparse.ArgumentParser(allow_abbrev=False))
    return scalemoe_config_from_args(parser.parse_args(argv))


def refusal(function, *args, **values) -> ScaleMoEError:
    with pytest.raises(ScaleMoEError) as caught:
        function(*args, **values)
    return caught.value


def test_every_option_has_help_and_a_flag():
    parser = add_scalemoe_args(argparse.ArgumentParser())
    helps = {flag: action.help for action in parser._actions for flag in action.option_strings}
    for name in ScaleMoEConfig.model_fields:
        assert len(helps[flag_name(name)]) > 20


def test_flags_give_the_config_and_stock_is_the_default():
    assert parse() is None
    assert parse("--moe-dispatcher", "scalemoe") == ScaleMoEConfig()
    flags = ["--scalemoe-replicas", "4", "--scalemoe-migrate", "--scalemoe-max-rows-factor", "2", "--scalemoe-transport", "shm"]
    expected = ScaleMoEConfig(replicas=4, migrate=True, max_rows_factor=2.0, transport="shm")
    assert parse("--moe-dispatcher", "scalemoe", *flags) == expected
    assert expected.grouped_experts and expected.replans_every == 50
    assert "--scalemoe-dispatch" in refusal(parse, "--scalemoe-dispatch", "padded").problem


@pytest.mark.parametrize(
    ("values", "field", "problem"),
    [
        ({"replicas": "4"}, "replicas", "an integer"),
        ({"replicas": True}, "replicas", "an integer"),
        ({"replicas": -1}, "replicas", "0 or more"),
        ({"migrate": "no"}, "migrate", "true or false"),
        ({"dispatch": "magic"}, "dispatch", "one of ragged or padded"),
        ({"max_rows_factor": 0.5}, "max_rows_factor", "1 or more"),
        ({"force_skew": float("nan")}, "force_skew", "finite"),
        ({"dispatch": "padded", "padded_capacity_factor": 0.0}, "padded_capacity_factor", "above 0"),
        ({"padded_capacity_factor": 1.0}, "padded_capacity_factor", "needs dispatch padded"),
        ({"trace_interval": 0}, "trace_interval", "1 or more"),
        ({"plan": "p.json", "experts": "megatron"}, "experts", "grouped"),
        ({"migrate": True, "dispatch": "padded"}, "dispatch", "ragged"),
    ],
)
def test_wrong_values_are_refused_by_field(values, field, problem):
    error = refusal(ScaleMoEConfig, **values)
    assert error.field == (field,)
    assert problem in error.problem
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.found) == (str(error), error.field, error.found)


def test_a_config_is_a_value():
    config = ScaleMoEConfig(replicas=8)
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, ScaleMoEConfig(replicas=8), ScaleMoEConfig()}) == 2
    assert config.replaced(migrate=True) == ScaleMoEConfig(replicas=8, migrate=True)
    assert refusal(config.replaced, dispatch="padded").field == ("dispatch",)


@pytest.fixture
def from_file(tmp_path):
    """Parses flags with a --scalemoe-config of this text."""

    def parsed(text: str, *flags: str):
        (tmp_path / "s.yaml").write_text(text)
        return parse("--moe-dispatcher", "scalemoe", "--scalemoe-config", str(tmp_path / "s.yaml"), *flags)

    return parsed


def test_yaml_gives_options_and_flags_win(from_file):
    text = "dispatch: padded\npadded_capacity_factor: 1.5\n"
    assert from_file(text) == ScaleMoEConfig(dispatch="padded", padded_capacity_factor=1.5)
    assert from_file(text, "--scalemoe-padded-capacity-factor", "2").padded_capacity_factor == 2


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("transport: auto\nreplicas: '4'", [], "s.yaml:2: replicas: must be an integer"),
        ("migrate: no\nmigrate: 'no'", [], "s.yaml:2: migrate is given twice\n  found: in lines 1 and 2"),
        ("migrate: 'no'", [], "s.yaml:1: migrate: must be true or false"),
        ("\ndispach: padded", [], "s.yaml:2: dispach: unknown field\n  try:   dispatch?"),
        ("1: 2", [], "named fields"),
        ("- a", [], "mapping"),
        ("a: [", [], "not valid YAML"),
        ("replicas: 4", ["--scalemoe-max-rows-factor", "0.5"], "--scalemoe-max-rows-factor: must be 1 or more"),
        ("replicas: 4", ["--scalemoe-dispatch", "padded"], "--scalemoe-dispatch: must be ragged"),
    ],
)
def test_what_is_wrong_is_named_by_line_or_by_flag(from_file, text, flags, expected):
    assert expected in str(refusal(from_file, text, *flags))


def test_an_unreadable_file_is_named():
    assert refusal(parse, "--moe-dispatcher", "scalemoe", "--scalemoe-config", "/nowhere.yaml").place == "/nowhere.yaml"
