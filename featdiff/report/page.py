"""Templates -> one self-contained HTML page that loads nothing and runs only what it came with."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.text import for_terminal

if TYPE_CHECKING:
    from PIL import Image

_TEMPLATES = Path(__file__).with_name("templates")
# WebP: of the formats that all browsers show, the smallest.
_QUALITY = 68
_EFFORT = 2
# Smaller pictures are shown enlarged, where a lossy format would be seen.
_LOSSLESS_SIDE = 64


def render(template: str, data: str, **values: Any) -> bytes:
    """Fill a template.

    Parameters
    ----------
    template : str
        The name of a file in ``templates/``.
    data : str
        What the page's script reads, from :func:`json_in_html`.
    **values
        What the template reads. Text is escaped.

    Returns
    -------
    bytes
        HTML in UTF-8. Its Content-Security-Policy allows the script and the style by their hashes, and pictures that
        lie in the page; nothing else is run or loaded.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = _source("report.css")
    script = _source("report.js")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["safe_text"] = for_terminal
    page = environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(script, style),
        data=Markup(data),
        **values,
    )
    return page.encode("utf-8", "backslashreplace")


def _source(name: str) -> str:
    """A style or script, as it stands between its tags."""
    return "\n" + (_TEMPLATES / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    rules = [
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules)


def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_in_html(data: Any) -> str:
    """JSON that cannot end the element around it, whatever names of files it holds.

    Parameters
    ----------
    data : object
        Plain values; numbers are finite.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def picture_uri(picture: Image.Image, side: int) -> str:
    """A picture as a ``data:`` address.

    Parameters
    ----------
    picture : PIL image
        RGB.
    side : int
        A longer side is shrunk to it, in pixels; small pictures stay as they are.
    """
    from PIL import Image

    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    stream = io.BytesIO()
    lossless = max(small.size) <= _LOSSLESS_SIDE
    small.save(stream, "WEBP", quality=_QUALITY, method=_EFFORT, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
