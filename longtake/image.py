"""Pictures a video starts from: read, checked, brought to the preset's size.

Legend: H, W sizes.
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError

log = logging.getLogger(__name__)

LEAST_SIDE = 16  # pixels: one latent's worth; below it there is no picture to speak of
MOST_PIXELS = 100_000_000  # a file that says more than this would fill the memory before it is shrunk
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
COLOURED = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")  # modes that are not grey
FIX = f"pass a picture file ({', '.join(name.lower() for name in FORMATS)})"


def image_from_file(path: Path | str, height: int, width: int) -> Tensor:
    """A picture as fp32 [3, H, W] in [-1, 1], resized to height x width with antialiasing and without cropping.

    Its orientation tag is obeyed, its colours are brought to sRGB where it has a profile, and transparency is laid over
    black. 16-bit grey is scaled, and so are floats in 0..1. The bilinear filter is the reference's.

    Raises:
        LongtakeError: missing, a folder, not a picture, damaged, too small or too large, or of numbers of unknown range.
    """
    return image_from_pixels(pixels_from_file(path), height, width)


def pixels_from_file(path: Path | str) -> np.ndarray:
    """A picture as it is, uint8 [H, W, 3]; see `image_from_file` for its colours, and for what is raised."""
    source = Path(path)
    if not source.is_file():
        what = f"image {source} does not exist" if not source.exists() else f"image {source} is not a file"
        got = "a folder" if source.is_dir() else "nothing there"
        raise LongtakeError(what, got=got, expected="a picture file", fix="check the path")
    return np.asarray(_opened(source))


def image_from_pixels(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    """Pixels to fp32 [3, height, width] in [-1, 1], resized as `image_from_file` does.

    pixels_HWC: uint8, or floats in 0..1; [H, W, 3], [H, W, 4] (laid over black) or grey [H, W].

    Raises:
        LongtakeError: other dtype, range or shape, or smaller than LEAST_SIDE.
    """
    from PIL import Image

    pixels_HWC = rgb_pixels(pixels_HWC)
    if pixels_HWC.shape[:2] != (height, width):
        pixels_HWC = np.asarray(Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def image_from_picture(picture: Any, height: int, width: int) -> Tensor:
    """A PIL image as `image_from_file` takes a file: upright, in sRGB, transparency over black."""
    return image_from_pixels(pixels_from_picture(picture), height, width)


def pixels_from_picture(picture: Any) -> np.ndarray:
    """A PIL image as it is, uint8 [H, W, 3]."""
    held = io.BytesIO()
    tag = {key: value for key in ("exif", "icc_profile") if (value := picture.info.get(key))}
    mode = {"HSV": "RGB", "RGBa": "RGBA", "La": "LA"}.get(picture.mode, picture.mode)  # what no file holds
    png = mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") or (mode == "I" and picture.format == "PNG")
    (picture if mode == picture.mode else picture.convert(mode)).save(held, "PNG" if png else "TIFF", **tag)
    return np.asarray(_opened(Path("the picture"), held))


def rgb_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any kind that `image_from_pixels` takes as uint8 [H, W, 3]; raises what it does."""
    pixels = _rgb(_bytes(pixels))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise LongtakeError(
            "this is not an image",
            got=f"{pixels.dtype} {tuple(pixels.shape)}",
            expected="uint8 [H, W, 3], RGBA, grey or floats in 0..1",
        )
    _check_size("the image", pixels.shape[1], pixels.shape[0])
    return pixels


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Floats in 0..1 as uint8; anything else as it is."""
    if pixels.dtype.kind != "f":
        return pixels
    least, most = (float(f(pixels)) if pixels.size else 0.0 for f in (np.min, np.max))
    if not (least >= 0.0 and most <= 1.0):
        what, got = "the image's numbers are of unknown range", f"{pixels.dtype} from {least:g} to {most:g}"
        expected, fix = "floats from 0 to 1, or uint8", "scale it: pixels / 255"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return np.asarray(np.rint(pixels * 255), np.uint8)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 grey or RGBA as RGB; anything else as it is."""
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, -1)
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255
        return np.asarray(np.rint(pixels[..., :3] * alpha), np.uint8)
    return pixels


def _opened(source: Path, held: io.BytesIO | None = None) -> Any:
    """The decoded picture, RGB in sRGB, upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is too large is refused below, by our own limit
            with Image.open(held or source, formats=FORMATS) as opened:
                _check_size(f"image {source}", *opened.size)
                picture = _eight_bits(source, ImageOps.exif_transpose(opened), opened.format == "PNG")
                if not picture.has_transparency_data:
                    return _in_srgb(source, picture)
                clear = picture.convert("RGBA")
                grey = picture.mode not in COLOURED
                colours = _in_srgb(source, clear.convert("L" if grey else "RGB"))
                colours.putalpha(clear.getchannel("A"))
                return Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), colours).convert("RGB")
    except Image.DecompressionBombError:
        got, expected = "a size that PIL refuses to decode", f"at most {MOST_PIXELS // 10**6} million"
        raise LongtakeError(f"image {source} is too large", got=got, expected=expected, fix="shrink it first") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # PIL says "cannot identify" with the whole path; what matters is that it is no picture, or a broken one
        kind = "no picture of a known format" if isinstance(error, UnidentifiedImageError) else str(error)[:200]
        raise LongtakeError(f"cannot read image {source}", got=kind, expected="a whole picture file", fix=FIX) from None


def _eight_bits(source: Path, picture: Any, png: bool) -> Any:
    """Grey of more than 8 bits as 8, which PIL's conversion would clip; other pictures as they are."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    grey = np.asarray(picture).astype(np.float64)
    sixteen = picture.mode.startswith("I;16") or (png and picture.mode == "I")
    most = 65535.0 if sixteen else 1.0
    if (picture.mode == "I" and not sixteen) or not (grey.min() >= 0 and grey.max() <= most):
        got = f"{'floats' if picture.mode == 'F' else 'integers'} from {grey.min():g} to {grey.max():g}"
        expected, fix = "8 bits, 16 bits, or floats from 0 to 1", "save it with 8 or 16 bits"
        raise LongtakeError(f"image {source} is of numbers whose range is unknown", got=got, expected=expected, fix=fix)
    scaled = Image.fromarray((grey * (255.0 / most)).round().astype(np.uint8))
    scaled.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return scaled


def _in_srgb(source: Path, picture: Any) -> Any:
    """RGB, by the picture's colour profile if it has one that can be read; without one it is sRGB already."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if profile:
        try:
            stored, srgb = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            mode = "CMYK" if picture.mode == "CMYK" else "RGB" if picture.mode in COLOURED else "L"
            flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            seen = ImageCms.profileToProfile(picture.convert(mode), stored, srgb, intent, "RGB", flags=flags)
            return seen or picture.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            log.warning("image %s: its colour profile cannot be used, its colours are taken as sRGB: %s", source, error)
    return picture.convert("RGB")


def _check_size(what: str, width: int, height: int) -> None:
    if min(width, height) < LEAST_SIDE or width * height > MOST_PIXELS:
        kind, fix = (
            "small" if min(width, height) < LEAST_SIDE else "large",
            "pass a picture of about the video's own size",
        )
        expected = f"at least {LEAST_SIDE} pixels a side and at most {MOST_PIXELS // 10**6} million"
        raise LongtakeError(f"{what} is too {kind}", got=f"{width}x{height} pixels", expected=expected, fix=fix)
