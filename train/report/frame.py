"""What every page is framed by: one HTML document with its style in it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

STYLE = Path(__file__).parent / "page.css"
"""Of the pages of a run's report."""


def framed(title: str, body: str, style: str | None = None, script: str = "") -> str:
    """The document.

    Args:
        title: plain text; `body` and `script` are HTML, `style` is CSS, that of STYLE where it is None.
    """
    style = STYLE.read_text(encoding="utf-8") if style is None else style
    return FRAME.substitute(title=escape(title), style=style, body=body, script=script)


FRAME = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - Duet</title>
<style>
$style</style></head><body><main>
$body</main>$script</body></html>
"""
)
