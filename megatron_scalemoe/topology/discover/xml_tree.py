"""XML elements whose errors name file and line."""

from __future__ import annotations

from pathlib import Path

from lxml import etree

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes
from megatron_scalemoe.topology.discover.layout import error_at


class Element(etree.ElementBase):
    """An element of a file that `read_xml` read."""

    def error(self, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about this element: names file and line."""
        return error_at(Path(self.base), self.sourceline, f"<{self.tag}>: {problem}", found=found, try_=try_)

    def required(self, name: str) -> str:
        """An attribute that must be there."""
        if name not in self.attrib:
            raise self.error(f"attribute {name!r} is missing")
        return self.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """An attribute, decimal or 0x..; required when there is no default."""
        if default is not None and name not in self.attrib:
            return default
        value = self.required(name)
        try:
            number = int(value, 0)
        except ValueError:
            number = None
        if number is None or abs(number) > 2**63:
            raise self.error(f"attribute {name!r} must be an integer", found=repr(value[:80]))
        return number


def read_xml(path: Path, root_tag: str) -> Element:
    """The root of the file. Raises `ScaleMoEError` naming file and line when it is no XML with that root."""
    # libxml2 itself refuses elements nested more than 256 deep, and entities that unfold to much more than the file.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    parser.set_element_class_lookup(etree.ElementDefaultClassLookup(element=Element))
    content = read_bytes(path)
    try:
        root = etree.fromstring(content, parser, base_url=str(path))
    except etree.XMLSyntaxError as error:
        raise error_at(path, error.lineno or 1, "not valid XML", found=error.msg) from error
    if root.getroottree().docinfo.doctype:
        # A document type can define entities; NCCL writes none.
        raise error_at(path, 1, "expected no document type (<!DOCTYPE>)")
    if root.tag != root_tag:
        raise root.error(f"expected <{root_tag}>", try_="the file that NCCL_TOPO_DUMP_FILE names")
    return root
