"""Self-contained HTML pages from the templates beside this file."""

import struct
from base64 import b64encode
from pathlib import Path
from typing import Any, NamedTuple

from . import formats
from .figure_style import DPI

CSS_PIXELS_PER_INCH = 96


class Picture(NamedTuple):
    """A figure for a page, inside it: no other file is needed."""

    uri: str
    width: int
    height: int
    name: str
    caption: str


def picture(path: Path, name: str, caption: str) -> Picture:
    """Embed a PNG file at the size in which it was drawn."""
    data = path.read_bytes()
    # A PNG's width and height are the first fields of its first chunk, which begins after 16 bytes of signature and
    # chunk header.
    width, height = (side * CSS_PIXELS_PER_INCH // DPI for side in struct.unpack(">II", data[16:24]))
    return Picture(f"data:image/png;base64,{b64encode(data).decode()}", width, height, name, caption)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package. Everything is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("maiht_lightning.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("perplexity", "error", "percent", "duration", "memory", "setting")
    environment.filters |= {name: getattr(formats, name) for name in names}
    return environment.get_template(template).render(**values) + "\n"
