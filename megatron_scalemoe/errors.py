"""The one exception type that users see."""


class ScaleMoEError(Exception):
    """Bad user input or a broken environment.

    The message says what was expected, what was found, and what to try. Our own broken invariants are `assert`s, never this.
    """

    def __init__(self, problem: str, *, found: object = None, try_: str | None = None):
        lines = [problem]
        if found is not None:
            lines.append(f"  found: {found}")
        if try_ is not None:
            lines.append(f"  try:   {try_}")
        super().__init__("\n".join(lines))
