"""Opening untrusted image files: decoded whole and upright, ready for a Qwen-VL, or what is wrong with the file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from mmedexpert.errors import UserError

MAX_PIXELS = 64_000_000  # ours: a whole-slide thumbnail passes, a decompression bomb does not
MAX_TEXT = 64 * 2**20  # ours: bytes of one compressed chunk of a PNG; Pillow's 1 MiB refuses printers' ICC profiles
# ours: raster formats only; Pillow would otherwise hand an EPS file to Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")
DEPTHS = (8, 10, 12, 14, 16, 32)  # ours: bits a deep grey picture may use of those its file has
TAILS = (0.1, 99.9)  # ours: percentiles; what lies beyond (hot pixels, burnt-in marks) tells no depth or range
FAINT = 1 / 8  # ours: a deep picture on less of its depth (CT numbers with an offset) is scaled by its own range
LOST = 64  # ours: of 256 levels; a 16-bit colour picture darker than that has its content in the bits Pillow drops

# what a JPEG or PNG may hold beside its picture; Pillow meets some chunks of a PNG only behind the picture
PNG_PARTS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD")
# of a JPEG: JFIF, Adobe's colours, frames, tables and scans
JPEG_PARTS = (0xE0, 0xEE, *range(0xC0, 0xD0), *range(0xDA, 0xDE))
JFIF_BYTES = 16  # without a thumbnail

SURE = 100  # ours: of two sides, far from the limit of 200; where that is not so, the rule itself is asked

# what `changes` tells of a picture
SCALED, OWN_RANGE = "deep grey, scaled by its bit depth", "deep grey, scaled by its own range"
INVERTED, FIRST = "deep grey, inverted: white is zero", "several frames, the first is shown"
NO_EXIF, ONE_COLOUR = "unreadable EXIF, shown as stored", "one colour all over"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at `path`, fully decoded, upright (EXIF orientation applied), 8-bit RGB [W, H]; see `changes`, too.

    Grey of more than 8 bits is scaled by the bit depth it uses (`_to_8_bit`) and, in a TIFF whose white is zero,
    inverted; transparency is laid over white; of several frames the first is shown.
    Raises UserError for a file that is missing, unreadable, truncated, over `max_pixels`, not an image, or of a shape
    that Qwen-VL's image processor refuses.
    """
    path = Path(path)
    image, found = _decode(path, max_pixels)
    try:
        picture = _rgb(_upright(image, found), found)
    except UserError:
        raise
    except Exception as error:  # a hostile palette or colour space can raise almost anything
        raise UserError(f"image {path} has a broken palette or colours ({_short(error)}): save it anew") from error
    check_shape(picture, str(path))
    if all(low == high for low, high in _extrema(picture)):
        found.append(ONE_COLOUR)
    picture.info = {"changes": tuple(found)}
    return picture


def thumbnail(path: str | Path, side: int, kind: str, quality: int) -> tuple[bytes, tuple[int, int]]:
    """The image at `path`, at most `side` wide and high, as a file of `kind` (JPEG, WEBP), and its width and height.

    Raises UserError as `open_image`.
    """
    picture, data = open_image(path), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(data, kind, quality=quality)
    return data.getvalue(), picture.size


def changes(picture: Image.Image) -> tuple[str, ...]:
    """What `open_image` did to a picture beyond decoding it, or noticed: to be counted where a data set is made."""
    return picture.info["changes"]


def is_plain(path: Path) -> bool:
    """Whether every reader sees in the file what `open_image` gives, and it holds nothing else (EXIF, a comment): an
    8-bit grey or RGB PNG or JPEG. What is not should be saved anew before it is passed on."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            one = image.format in ("PNG", "JPEG") and not getattr(image, "is_animated", False)
            same = one and image.mode in ("L", "RGB") and "transparency" not in image.info
        parts = _png_parts if image.format == "PNG" else _jpeg_parts
        return same and parts(path.read_bytes())
    except Exception:  # another format, or damaged: open_image reads it, or says what is wrong
        return False


def _png_parts(data: bytes) -> bool:
    """Whether a PNG holds nothing but the picture."""
    place, kind = 8, b""
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind not in PNG_PARTS:
            return False
        place += 12 + length
    return kind == b"IEND" and place == len(data)


def _jpeg_parts(data: bytes) -> bool:
    """Whether a JPEG holds nothing but the picture: segments, scans up to their next marker, and nothing at its end."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if kind not in JPEG_PARTS or (kind == 0xE0 and length > JFIF_BYTES):
            return False
        place += 2 + length
        if kind != 0xDA:
            continue
        while True:  # within a scan FF is followed by 0, or by the number of a restart
            place = data.find(b"\xff", place)
            if place < 0 or place + 1 >= len(data):
                return False
            if data[place + 1] and not 0xD0 <= data[place + 1] <= 0xD7:
                break
            place += 2
        if data[place + 1] == 0xD9:
            return place + 2 == len(data)
    return False


def check_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[str, ...]:
    """Open the image at `path` and throw it away; its `changes`. Raises UserError as `open_image` does."""
    return changes(open_image(path, max_pixels=max_pixels))


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height by the header alone, as the file has them. Raises UserError for what is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read ({_short(error)})") from error


def check_shape(picture: Image.Image, name: str) -> None:
    """UserError for a picture that Qwen-VL cannot patch: its own rule is asked (one side over 200 times the other)."""
    width, height = picture.size
    if 0 < max(width, height) <= SURE * min(width, height):
        return
    # here, because it takes seconds, and hundreds of megabytes in each process that opens images
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        smart_resize(height, width)
    except (ValueError, ZeroDivisionError) as error:
        fix = "crop or pad it"
        raise UserError(f"image {name} has {width} x {height} pixels, which Qwen-VL cannot patch: {fix}") from error


def _decode(path: Path, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """The decoded first frame, and what `changes` tells of the file so far."""
    # Some libraries switch this on for the whole process, and truncated files then come back with a grey lower part.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_TEXT)
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:  # the header alone has been read so far
                raise UserError(_bomb(path, f"{width} x {height} pixels", max_pixels))
            # the second picture of an MPO (a photograph of a phone) is a preview or a depth map
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            layout = str(image.tile)
            image.load()
            # Pillow keeps the upper byte of each colour
            if (
                re.search(r";16[BLN]\b", layout)
                and not _deep(image)
                and max(high for _, high in _extrema(image)) < LOST
            ):
                fix = "save it with 8 bits a colour"
                raise UserError(
                    f"image {path} is 16-bit colour that uses its low bits alone, and would be black: {fix}"
                )
            return image, [FIRST] if several else []
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"image {path} is missing: check the image root, or restore the file") from error
    except UnidentifiedImageError as error:
        fix = f"copy it again, or convert it to PNG (read here: {', '.join(FORMATS)})"
        raise UserError(f"image {path} is not an image that can be read, or its header is damaged: {fix}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_bomb(path, "far more pixels", max_pixels)) from error
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"image {path} cannot be read ({error.strerror}): check path and permissions") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged or hostile bytes
        raise UserError(f"image {path} is truncated or damaged ({_short(error)}): copy or download it again") from error


def _upright(image: Image.Image, found: list[str]) -> Image.Image:
    """Turned as its EXIF says. Pillow's own function writes EXIF anew, which one odd tag beside is enough to break."""
    try:
        exif = image.getexif()
        turn = TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
        torn = "exif" in image.info and not len(exif)  # the JPEG reader has met the error before, and is silent now
    except Exception:  # a hostile EXIF block can raise almost anything
        turn, torn = None, True
    if torn:
        found.append(NO_EXIF)
    return image.transpose(turn) if turn is not None else image


def _rgb(image: Image.Image, found: list[str]) -> Image.Image:
    if _deep(image):
        values, own = _to_8_bit(np.asarray(image))
        found.append(OWN_RANGE if own else SCALED)
        # Pillow inverts what has up to 8 bits; it takes a missing tag for zero, so the tag itself is asked
        if getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = 255 - values
            found.append(INVERTED)
        return Image.fromarray(values).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")  # peers: qwen-vl-utils lays transparency over white
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _to_8_bit(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Grey values [H, W] as 0..255, and whether by their own range. # ours

    From 0 to the top of the smallest usual bit depth that holds them, so that pictures of one series are scaled alike;
    where that leaves hardly any contrast, or values are negative, from their lowest to their highest. Both are taken
    without the tails, so that a hot pixel does not turn the rest black.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, dtype=np.uint8), True
    low, high = (
        float(np.percentile(finite, TAILS[0], method="higher")),
        float(np.percentile(finite, TAILS[1], method="lower")),
    )
    if low >= high:  # little but background: the rest is the picture
        low, high = float(finite.min()), float(finite.max())
    tops = [1.0] * (values.dtype.kind == "f") + [2.0**bits - 1 for bits in DEPTHS]
    top = next((top for top in tops if high <= top), None)
    own = low < 0 or top is None or (low < high < low + FAINT * top)
    bottom, span = (low, high - low) if own or top is None else (0.0, top)
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - bottom) / (span or 1.0)
    return np.round(scaled.clip(0.0, 1.0) * 255).astype(np.uint8), own


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    found: list = [image.getextrema()] if len(image.getbands()) == 1 else list(image.getextrema())
    return found[:-1] if image.mode in ("LA", "RGBA") else found  # without what is only transparent


def _bomb(path: Path, found: str, max_pixels: int) -> str:
    return f"image {path} has {found}, above the limit of {max_pixels}: resize it, it was not decoded"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
