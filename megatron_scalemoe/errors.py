"""The one exception type that users see."""

from __future__ import annotations

from megatron_scalemoe.units import printable


class ScaleMoEError(Exception):
    """Bad user input or a broken environment. Our own broken invariants are `assert`s, never this.

    problem: what was expected. found: what was there instead. try_: a way out.
    field: path to the value in its file or options, such as ("links", 3, "latency_us"); () for none.
    place: where it was given: `file.yaml:12`, a file, a flag.
    """

    def __init__(
        self, problem: str, *, found: object = None, try_: str | None = None, field: tuple[str | int, ...] = (), place: str | None = None
    ):
        self.problem, self.found, self.try_, self.field, self.place = problem, found, try_, field, place
        where = [_shown(part, 500) for part in (place, ".".join(map(str, field))) if part]
        lines = [": ".join([*where, _shown(problem, 5000)])]
        if found is not None:
            lines.append(f"  found: {_shown(found, 5000)}")
        if try_ is not None:
            lines.append(f"  try:   {_shown(try_, 1000)}")
        super().__init__("\n".join(lines))

    def at(self, place: str, field: tuple[str | int, ...] | None = None) -> ScaleMoEError:
        """The same error with the place where the value was given, and the field as it is called there."""
        return ScaleMoEError(self.problem, found=self.found, try_=self.try_, field=self.field if field is None else field, place=place)


def as_raised(error: ScaleMoEError) -> ScaleMoEError:
    """The error before Megatron raised it again with " when instantiating TransformerLayer" behind it, for each module around."""
    while isinstance(error.__context__, ScaleMoEError) and " when instantiating " in str(error):
        error = error.__context__
    return error


def _shown(value: object, most: int) -> str:
    """Fit for a terminal, and not longer than `most`: it may be what stood in somebody's file."""
    text = str(value)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "\n".join(map(printable, text.split("\n")))
