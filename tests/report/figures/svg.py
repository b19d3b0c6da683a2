"""What a figure shows, read from its SVG as a browser would."""

import xml.etree.ElementTree as ET


def parse(svg: str) -> ET.Element:
    """Also checks that it is well formed."""
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parse(svg).iter() if element.tag.endswith("text")]
