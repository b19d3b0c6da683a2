import sys

import matplotlib
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.report.figures import common as figures
from megatron_scalemoe.report.figures.common import drawing, format_ratio, format_us, label, report_style, time_unit, to_svg
from tests.report.figures.svg import parse, texts


def draw(name="f", title="a title", **settings):
    with matplotlib.rc_context(settings), drawing(4, 3) as figure:
        axis = figure.subplots()
        axis.barh([0, 1], [1, 2], clip_on=True)
        axis.set_title(title)
        return to_svg(figure, name)


def test_an_svg_has_text_and_takes_the_pages_colour():
    svg = draw()
    assert "a title" in texts(svg)
    assert "currentColor" in svg
    assert figures._INK not in svg
    assert "<?xml" not in svg
    assert "<metadata" not in svg
    assert "<style" not in svg  # would apply to the whole page


def test_the_same_figure_gives_the_same_text_whatever_the_users_settings():
    assert draw() == draw() == draw(**{"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 20})
    assert draw() != draw(title="another")


def test_the_users_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    draw()
    assert dict(matplotlib.rcParams) == before


def test_ids_of_two_figures_differ_and_every_reference_has_its_target():
    ids = []
    for name in ("one", "two"):
        root = parse(draw(name))
        own = {element.get("id") for element in root.iter() if element.get("id")}
        used = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href") and value.startswith("#")]
        used += [value[4:-1] for element in root.iter() for value in element.attrib.values() if value.startswith("url(#")]
        assert used
        assert {value.lstrip("#") for value in used} <= own
        ids.append(own)
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("title", ["<script>alert(1)</script>", "$\\frac$ & $", ' id="x" url(#y) #010203', "日本"])
def test_a_text_is_shown_as_it_is(title, recwarn):
    assert title in texts(draw(title=title))
    assert not recwarn.list


def test_labels_are_printable_and_short():
    assert label("a\x00b\nc") == "a�b�c"
    assert label("x" * 34) == "x" * 34
    long = label("start" + "x" * 100 + "end")
    assert len(long) <= 34
    assert long.startswith("start")
    assert long.endswith("end")


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0, "0 µs"),
        (0.5, "0.500 µs"),
        (4, "4.00 µs"),
        (999.4, "999 µs"),
        (999.6, "1.00 ms"),
        (12345, "12.3 ms"),
        (2e6, "2.00 s"),
        (5e9, "5,000 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(time_us, text):
    assert format_us(time_us) == text


@pytest.mark.parametrize(("value", "text"), [(1, "1.00"), (9.994, "9.99"), (9.996, "10.0"), (1234.5, "1,234")])
def test_ratios_have_two_digits_while_small(value, text):
    assert format_ratio(value) == text


def test_long_times_have_an_axis_in_seconds():
    assert time_unit(9e6) == (1e3, "ms")
    assert time_unit(1e7) == (1e6, "s")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScaleMoEError, match=r"pip install 'megatron-scalemoe\[report\]'"), report_style():
        pass
