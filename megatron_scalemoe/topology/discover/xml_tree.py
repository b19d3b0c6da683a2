"""A small XML tree that remembers lines: ElementTree forgets them, and an error must name one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes
from megatron_scalemoe.topology.discover.layout import error_at

# NCCL's own limit is 256 elements per machine; deep trees would only exhaust the stack.
MAX_DEPTH = 50


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Element:
    """One element. `parent` is None for the root."""

    path: Path
    line: int
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element]

    def all(self, *tags: str) -> list[Element]:
        """Its children with one of these tags."""
        return [child for child in self.children if child.tag in tags]

    def walk(self, tag: str) -> Iterator[Element]:
        """Elements with this tag below it, in the file's order."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.walk(tag)

    def error(self, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about this element: names file and line."""
        return error_at(self.path, self.line, f"<{self.tag}>: {problem}", found=found, try_=try_)

    def text(self, name: str) -> str:
        """A required attribute."""
        if name not in self.attributes:
            raise self.error(f"attribute {name!r} is missing")
        return self.attributes[name]

    def integer(self, name: str, default: int | None = None) -> int:
        """An attribute, decimal or 0x..; required when there is no default."""
        if default is not None and name not in self.attributes:
            return default
        value = self.text(name)
        try:
            number = int(value, 0)
        except ValueError:
            number = None
        if number is None or abs(number) > 2**63:
            raise self.error(f"attribute {name!r} must be an integer", found=repr(value[:80]))
        return number


def read_xml(path: Path, root_tag: str) -> Element:
    """The root of the file. Raises `ScaleMoEError` naming file and line when it is no XML with that root."""
    content = read_bytes(path)
    parser = expat.ParserCreate()
    roots: list[Element] = []
    stack: list[Element] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) >= MAX_DEPTH:
            raise error_at(path, parser.CurrentLineNumber, f"elements are nested deeper than {MAX_DEPTH}")
        element = Element(path, parser.CurrentLineNumber, tag, attributes, stack[-1] if stack else None, [])
        (stack[-1].children if stack else roots).append(element)
        stack.append(element)

    def doctype(*_: object) -> None:
        # A document type can define entities that unfold to gigabytes; NCCL writes none.
        raise error_at(path, parser.CurrentLineNumber, "expected no document type (<!DOCTYPE>)")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: stack.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise error_at(path, error.lineno, "not valid XML", found=expat.ErrorString(error.code)) from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise ScaleMoEError(f"{path}: not valid XML", found=error) from error
    if roots[0].tag != root_tag:
        raise roots[0].error(f"expected <{root_tag}>", try_="the file that NCCL_TOPO_DUMP_FILE names")
    return roots[0]
