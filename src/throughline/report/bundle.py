"""The built page (`web/`, one self-contained file): with data inside it for the report, in parts for the server.

Its policy allows its own script and style, known to the browser by their digests, so what data smuggled in cannot run.
"""

import hashlib
import html
import json
import re
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'"
PLACES = re.compile(r"\{\{(title|policy|data)\}\}")


class Bundle(NamedTuple):
    """The built page as a template, and its script and style alone."""

    template: str
    script: str
    style: str

    @property
    def policy(self) -> str:
        """What the report may do: run its own script and style, and show pictures that it makes itself."""
        script, style = (
            b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (self.script, self.style)
        )
        return f"{CLOSED}; img-src data: blob:; script-src 'sha256-{script}'; style-src 'sha256-{style}'"


@cache
def read_bundle() -> Bundle:
    """The page as `web/` builds it."""
    template = (files("throughline.report") / "assets" / "page.html").read_bytes().decode()
    script = re.search(r"<script type=\"module\"[^>]*>(.*?)</script>", template, re.DOTALL)
    style = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL).search(template, script.end() if script else 0)
    assert script and style, "the page is built by `make page`"
    return Bundle(template, script[1], style[1])


def render_page(title: str, data: dict[str, Any] | None) -> str:
    """The page as one text; its data as JSON without a `<` to end its element. Without data it is a template for the browser."""
    bundle = read_bundle()
    if data is None:
        parts = {"policy": html.escape(bundle.policy)}
    else:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        parts = {"title": html.escape(title), "policy": html.escape(bundle.policy), "data": text}
    # One pass, so that data which looks like a placeholder stays data.
    return PLACES.sub(lambda match: parts.get(match[1], match[0]), bundle.template)


SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · throughline</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/page.css">
<script type="module" src="/page.js"></script>
</head>
<body><noscript>This page draws itself with JavaScript, which is switched off here.</noscript></body>
</html>
"""


def render_shell(title: str) -> str:
    """The page as the server sends it: nothing inline; data come from the API."""
    return SHELL.format(title=html.escape(title))
