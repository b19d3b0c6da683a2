"""The one typed boundary: pydantic models of files and options, whose errors are one `ScaleMoEError` with its facts as data.

    class Link(Model):
        source: str
        latency_us: float = Field(ge=0)

    check(Link, {"source": "a", "latency_us": "1"})   # ScaleMoEError: field ("latency_us",), must be a finite number, found '1'

`files.Document.parse` reads a file so, and adds the file and the line of the field. What a type cannot say is said by a validator that
raises `refused(...)`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.version import SCHEMA_VERSION

# What a value must be, by pydantic's name for what is wrong with it.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "int_type": "an integer",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_type": "a mapping",
    "string_type": "text",
    "too_long": "{max_length} items or fewer",
    "too_short": "{min_length} items or more",
}


class Model(BaseModel):
    """Frozen and strict: no text for a number, no number for a truth, no unknown fields, neither NaN nor infinities."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        """A typing error must not be ignored, nor be told as a missing field."""
        strict = isinstance(values, dict) and cls.model_config["extra"] == "forbid"
        for name in values if strict else ():
            if name not in cls.model_fields:
                raise refused("unknown field", field=(str(name),), try_=nearest(str(name), list(cls.model_fields)))
        return values


class Facts(Model):
    """A model of the fields that we use, of a file that may have others."""

    model_config = ConfigDict(extra="ignore")


class Options(Model):
    """A model whose constructor raises `ScaleMoEError`: for what is also made by programs, not only read from files."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise error_of(error) from error

    def replaced(self, **changes: Any):
        """The same with other values, checked again."""
        return type(self)(**{**dict(self), **changes})


ModelT = TypeVar("ModelT", bound=BaseModel)


def check(model: type[ModelT], values: Any) -> ModelT:
    """`values` as this model. Raises `ScaleMoEError` for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise error_of(error) from error


def refused(problem: str, *, field: tuple[str | int, ...] = (), found: object = None, try_: str | None = None) -> PydanticCustomError:
    """What a validator of a model raises. `field` is counted from the value that is validated."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "field": field, "found": found, "try_": try_})


def error_of(error: ValidationError) -> ScaleMoEError:
    """The first fault as an error of ours."""
    fault = error.errors(include_url=False)[0]
    kind, field, facts = fault["type"], fault["loc"], fault.get("ctx", {})
    if kind == "refused":
        return ScaleMoEError(facts["problem"], found=facts["found"], try_=facts["try_"], field=(*field, *facts["field"]))
    facts = {name: f"{fact:g}" if isinstance(fact, float) else fact for name, fact in facts.items()}
    if kind == "missing":
        close = difflib.get_close_matches(str(field[-1]), map(str, fault["input"]), n=1)
        return ScaleMoEError(f"{field[-1]!r} is missing", found=close[0] if close else None, field=field[:-1])
    problem = f"must be {_EXPECTED[kind].format(**facts)}".replace("'", "") if kind in _EXPECTED else fault["msg"]
    return ScaleMoEError(problem, found=shortened(fault["input"]), field=field)


def nearest(name: str, known: list[str]) -> str:
    """What to try in place of an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return " ".join([f"{one}?" for one in close] + [f"One of {', '.join(known)}"])


def plain_kind(annotation: Any) -> type | tuple[str, ...]:
    """`int | None` -> int, `Literal["a", "b"]` -> ("a", "b"): what a flag takes."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if type(None) in get_args(annotation) else [annotation]
    return get_args(kinds[0]) if get_origin(kinds[0]) is Literal else kinds[0]


def shortened(value: object) -> str:
    """The value as Python shows it, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _current(version: int) -> int:
    if version != SCHEMA_VERSION:
        raise refused(f"must be {SCHEMA_VERSION}", found=version, try_="the scalemoe version that wrote the file")
    return version


def _finite(value: float) -> float:
    if not -1e300 < value < 1e300:  # so that no sum of a few overflows
        raise refused("must be a finite number", found=value)
    return value


SchemaVersion = Annotated[int, AfterValidator(_current)]
Number = Annotated[float, AfterValidator(_finite)]
