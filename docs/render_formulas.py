"""Formulas of the pages as MathML, which browsers show without a script from elsewhere (a hook of mkdocs)."""

import html
import re
from typing import Any

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)
"""What pymdownx.arithmatex makes of $...$ and $$...$$."""


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, content)
