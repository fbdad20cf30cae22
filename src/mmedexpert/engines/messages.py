"""A question as the messages of a chat, with its images; as they are sent, and as they are kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from mmedexpert.data.images import open_image
from mmedexpert.engines.asking import Ask
from mmedexpert.runtime.fingerprints import file_digest


def data_url(path: Path) -> str:
    """The file's own bytes where every reader sees in them what `open_image` gives, else that image as PNG."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            as_it_is = upright and image.mode in ("L", "RGB") and "transparency" not in image.info
            kind = "png" if image.format == "PNG" else "jpeg"
    except Exception:  # another format, or damaged: open_image reads it, or says what is wrong
        as_it_is = False
    if as_it_is:
        data = path.read_bytes()
    else:
        buffer, kind = io.BytesIO(), "png"
        open_image(path).save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def hash_url(path: Path) -> str:
    """What stands in a ledger in place of an image; OSError where its file cannot be read."""
    return f"sha256:{file_digest(path)}"


def messages_of(ask: Ask, system_prompt: str, image: Callable[[Path], str] = data_url) -> list[dict[str, Any]]:
    """The chat of one question: one image then the text; several are announced as `<image_1>: ` # peers: MedEvalKit

    Without an image the content is the text itself: templates of text models take no list of parts.
    """
    content: list[dict[str, Any]] = []
    for number, path in enumerate(ask.images, start=1):
        if len(ask.images) > 1:
            content.append({"type": "text", "text": f"<image_{number}>: "})
        content.append({"type": "image_url", "image_url": {"url": image(path)}})
    text = _sendable(ask.text)
    content.append({"type": "text", "text": text})
    system = [{"role": "system", "content": _sendable(system_prompt)}] if system_prompt else []
    return [*system, {"role": "user", "content": content if ask.images else text}]


def _sendable(text: str) -> str:
    """A text without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
