"""Phantom images: simple drawings whose measurement is exactly known. # ours

Each function draws one image of `SIZE` x `SIZE` pixels showing `value` in the unit of its guideline; `finish` adds what
is read beside the measurement, a sign and a look. Structures that matter are at least 5 pixels wide (a tiny ViT never
learns thinner ones), position, contrast and noise vary.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112
SIGN = 9  # pixels: the radius of a sign
SHADE = 30.0  # grey levels that the look takes from one edge and gives to the other
Rng = np.random.Generator


def _canvas(background: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), background)
    return image, ImageDraw.Draw(image)


def finish(
    image: Image.Image, rng: Rng, *, noise: float, sign: tuple[int, int] | None, brighter_below: bool
) -> Image.Image:
    """Draw the sign (a ring) around a place, shade the whole from top to bottom, add film noise and brightness."""
    jitter = rng.uniform(-2, 2, 2)
    if sign is not None:
        x, y = np.array(sign) + jitter
        draw = ImageDraw.Draw(image)
        _ellipse(draw, x, y, SIGN, SIGN, _grey(0))
        _ellipse(draw, x, y, SIGN - 3, SIGN - 3, _grey(255))
    slope = np.linspace(-SHADE, SHADE, SIZE, dtype=np.float32) * rng.uniform(0.8, 1.2)
    pixels = np.asarray(image, dtype=np.float32) * rng.uniform(0.9, 1.1)
    pixels = pixels + (slope if brighter_below else -slope)[:, None, None]
    pixels = pixels + rng.normal(0.0, noise, (SIZE, SIZE, 1)).astype(np.float32)  # no two images are equal
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def _grey(level: float) -> tuple[int, int, int]:
    return (int(level),) * 3


def chest_heart(value: float, rng: Rng) -> Image.Image:
    """Chest radiograph: heart width divided by thorax width is `value`."""
    image, draw = _canvas(_grey(rng.uniform(150, 175)))
    cx, cy, half = SIZE / 2 + rng.uniform(-3, 3), SIZE / 2, rng.uniform(38, 48)
    _ellipse(draw, cx, cy, half, 48, _grey(rng.uniform(35, 55)))
    bone = _grey(rng.uniform(140, 160))
    draw.rectangle((cx - 4, 6, cx + 4, 106), fill=bone)
    heart = half * value
    _ellipse(draw, cx, 74, heart, rng.uniform(20, 25), _grey(rng.uniform(205, 230)))
    return image


def ecg_strip(value: float, rng: Rng) -> Image.Image:
    """ECG strip of three seconds: `value` beats per minute."""
    image, draw = _canvas((250, 225, 225))
    for grid in range(0, SIZE, 8):
        draw.line((grid, 0, grid, SIZE), fill=(245, 200, 200))
        draw.line((0, grid, SIZE, grid), fill=(245, 200, 200))
    interval = SIZE / 3.0 * 60.0 / value
    height, base = rng.uniform(42, 56), rng.uniform(72, 84)
    draw.line((0, base, SIZE, base), fill=(30, 30, 40), width=2)
    x = rng.uniform(8, 12)  # the first beat stands near the left edge: at random phase a tiny ViT needs far more steps
    while x < SIZE + 3:
        draw.polygon(((x - 4, base), (x, base - height), (x + 4, base)), fill=(10, 10, 20))
        x += interval
    return image


def chest_rim(value: float, rng: Rng) -> Image.Image:
    """Chest radiograph, one lung: rim of air of `value` cm (8 pixels per cm) between chest wall and lung edge."""
    image, draw = _canvas(_grey(rng.uniform(165, 185)))
    left, right = rng.uniform(12, 18), rng.uniform(96, 102)
    draw.rectangle((left, 8, right, 104), fill=_grey(10))
    lung = _grey(rng.uniform(95, 115))
    edge = right - 8.0 * value
    draw.rectangle((left, 8, edge, 104), fill=lung)
    for y in rng.uniform(20, 95, 4):
        draw.line((left, y, edge - 4, y + rng.uniform(-8, 8)), fill=_grey(140), width=2)
    return image


def head_shift(value: float, rng: Rng) -> Image.Image:
    """Head CT, central field: septum displaced right of the marked midline by `value` mm (3.4 pixels per mm)."""
    image, draw = _canvas(_grey(rng.uniform(90, 105)))
    mid = SIZE / 2 + rng.uniform(-2, 2)
    marker = _grey(240)
    draw.rectangle((mid - 3, 0, mid + 3, 16), fill=marker)
    draw.rectangle((mid - 3, 96, mid + 3, SIZE), fill=marker)
    x = mid + 3.4 * value
    dark = _grey(rng.uniform(20, 35))
    _ellipse(draw, x - 9, 56, 6, 22, dark)
    _ellipse(draw, x + 9, 56, 6, 22, dark)
    draw.rectangle((x - 3, 28, x + 3, 84), fill=_grey(200))
    return image


def fundus_disc(value: float, rng: Rng) -> Image.Image:
    """Fundus photograph of the disc: vertical cup diameter divided by disc diameter is `value`."""
    image, draw = _canvas((int(rng.uniform(150, 180)), int(rng.uniform(60, 80)), 35))
    cx, cy = SIZE / 2 + rng.uniform(-5, 5, 2)
    for angle in rng.uniform(0, 2 * np.pi, 5):
        draw.line((cx, cy, cx + 80 * np.cos(angle), cy + 80 * np.sin(angle)), fill=(120, 25, 20), width=3)
    radius = rng.uniform(36, 44)
    _ellipse(draw, cx, cy, radius, radius, (235, 150, 80))
    _ellipse(draw, cx, cy, radius * value, radius * value, (255, 245, 205))
    return image


def ct_nodule(value: float, rng: Rng) -> Image.Image:
    """Chest CT, magnified: solid nodule of `value` mm (7 pixels per mm)."""
    image, draw = _canvas(_grey(rng.uniform(55, 70)))
    for _ in range(4):
        x, y = rng.uniform(0, SIZE, 2)
        draw.line((x, y, x + rng.uniform(-40, 40), y + rng.uniform(-40, 40)), fill=_grey(110), width=2)
    cx, cy = SIZE / 2 + rng.uniform(-8, 8, 2)
    _ellipse(draw, cx, cy, 3.5 * value, 3.5 * value, _grey(rng.uniform(185, 215)))
    return image


def aorta_section(value: float, rng: Rng) -> Image.Image:
    """Abdominal ultrasound: aortic cross-section of `value` cm (11 pixels per cm), dark lumen and bright wall."""
    image, draw = _canvas(_grey(rng.uniform(95, 115)))
    cx, cy = SIZE / 2 + rng.uniform(-6, 6, 2)
    radius = 5.5 * value
    _ellipse(draw, cx, cy, radius + 4, radius + 4, _grey(225))
    _ellipse(draw, cx, cy, radius, radius, _grey(rng.uniform(5, 20)))
    return image
