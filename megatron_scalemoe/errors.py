"""The one exception type that users see."""

from __future__ import annotations


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
        lines = [": ".join(part for part in (place, ".".join(map(str, field)), problem) if part)]
        if found is not None:
            lines.append(f"  found: {found}")
        if try_ is not None:
            lines.append(f"  try:   {try_}")
        super().__init__("\n".join(lines))

    def at(self, place: str, field: tuple[str | int, ...] | None = None) -> ScaleMoEError:
        """The same error with the place where the value was given, and the field as it is called there."""
        return ScaleMoEError(self.problem, found=self.found, try_=self.try_, field=self.field if field is None else field, place=place)
