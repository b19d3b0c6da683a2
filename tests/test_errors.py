"""The text of an error, which may hold what stood in somebody's file."""

import pytest

from megatron_scalemoe.errors import ScaleMoEError, as_raised


def test_nothing_of_a_file_reaches_the_terminal_as_it_is():
    error = ScaleMoEError("no", found="\x1b[2J\ud800", try_="a\rb", field=("k\x07" * 10_000,), place="f\x00.yaml:1")
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error)) < 2000
    assert error.found == "\x1b[2J\ud800"  # the data are as they were


def test_an_error_that_another_process_has_told_is_whole():
    told = str(ScaleMoEError("all ranks must agree", found="\n    --lr: 1 on rank 0" * 100))
    assert str(ScaleMoEError(told)) == told


def test_what_megatron_puts_behind_an_error_is_taken_away():
    def build(depth: int) -> None:
        try:
            if depth == 0:
                raise ScaleMoEError("must fit", found="this")
            build(depth - 1)
        except ScaleMoEError as error:
            raise type(error)(f"{error} when instantiating Layer")  # noqa: B904 - as Megatron's build_module

    with pytest.raises(ScaleMoEError) as caught:
        build(2)
    assert str(as_raised(caught.value)) == "must fit\n  found: this"
