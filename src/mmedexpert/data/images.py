"""Opening untrusted image files: decode fully or say exactly what is wrong with the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmedexpert.errors import UserError

MAX_PIXELS = 64_000_000  # ours: a whole-slide thumbnail passes, a decompression bomb does not
# ours: raster formats only; Pillow would otherwise hand an EPS file to Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at `path`, fully decoded, upright (EXIF orientation applied), 8-bit RGB [W, H].

    16-bit, 32-bit and float grayscale is scaled to 0..255 by its own range; transparency is laid over white.
    Raises UserError for a file that is missing, unreadable, truncated, over `max_pixels`, or not an image.
    """
    image = _decode(Path(path), max_pixels)
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a hostile EXIF block or palette can raise almost anything
        raise UserError(f"image {path} has broken metadata or palette ({_short(error)}): save it anew") from error


def check_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decode the image at `path` once and throw it away; raises UserError as `open_image` does."""
    _decode(Path(path), max_pixels)


def _decode(path: Path, max_pixels: int) -> Image.Image:
    # Some libraries switch this on for the whole process, and truncated files then come back with a grey lower part.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:  # the header alone has been read so far
                raise UserError(_bomb(path, f"{width} x {height} pixels", max_pixels))
            image.load()
            return image
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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float64))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")  # peers: qwen-vl-utils lays transparency over white
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale [H, W] to 0..255 by its own finite range; a constant image becomes black."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.round((values - low) / (high - low) * 255).astype(np.uint8)


def _bomb(path: Path, found: str, max_pixels: int) -> str:
    return f"image {path} has {found}, above the limit of {max_pixels}: resize it, it was not decoded"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
