"""What the HTML pages share: one file that loads nothing, a strict policy, a style, and data as text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

# nothing is loaded from elsewhere, nothing is sent, and no script runs but one whose hash is named
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str, *, style: str = "", script: str = "") -> bytes:
    """A whole page of an escaped `body`, in the shared style and its own; of scripts only `script` may run."""
    policy, code = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, code = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(title)}</title>
<style>{asset("mmedexpert.runtime", "pages.css")}{style}</style>
</head>
<body>
{body}
{code}</body>
</html>
"""
    return page.encode("utf-8", errors="replace")


@cache
def asset(package: str, name: str) -> str:
    """The text of a file that comes with a package."""
    return (files(package) / name).read_text(encoding="utf-8")


def data_block(name: str, value: Any) -> str:
    """A value as a block of JSON that a script of the page reads: no tag can begin in it, whatever its texts say."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f'<script type="application/json" id="{escape(name)}">{text.replace("<", chr(92) + "u003c")}</script>'


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_url(kind: str, content: bytes) -> str:
    """A picture as an address that holds it; `kind` jpeg, webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
