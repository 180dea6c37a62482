"""Pictures keep the colours that a viewer shows: profiles, more than 8 bits, floats, transparency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from longtake.errors import LongtakeError
from longtake.image import image_from_file


def seen(path: Path) -> np.ndarray:
    """The picture's 8-bit levels [H, W, 3] at its own 32 x 32 pixels."""
    return ((image_from_file(path, 32, 32) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def wide_profile() -> bytes:
    """An RGB profile whose first two primaries are sRGB's, exchanged: its red is to be seen as green."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = content.index(b"rXYZ"), content.index(b"gXYZ")
    content[red : red + 4], content[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(content)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_a_colour_profile_is_obeyed(tmp_path: Path, mode: str, suffix: str) -> None:
    if (suffix, mode) in {("jpg", "RGBA"), ("jpg", "P"), ("webp", "P")}:
        pytest.skip("no such file")
    picture = Image.new("RGB", (32, 32), (255, 0, 0)).convert(mode)
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    picture.save(tmp_path / f"p.{suffix}", icc_profile=wide_profile(), **options)
    got = seen(tmp_path / f"p.{suffix}")[16, 16]
    assert got[1] > 248 and got[0] < 12 and got[2] < 12


def test_transparency_is_kept_with_a_profile(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[...] = (255, 0, 0, 255)
    pixels[:, 16:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "p.png", icc_profile=wide_profile())
    got = seen(tmp_path / "p.png")
    assert got[16, 4, 1] > 248 and got[16, 28].max() == 0


def test_a_damaged_profile_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / "p.png", icc_profile=b"no profile" * 20)
    assert np.abs(seen(tmp_path / "p.png")[0, 0] - (200, 10, 10)).max() <= 1
    assert "p.png: its colour profile cannot be used" in caplog.text


@pytest.mark.parametrize("kind", ["float", "16 bits", "16 bits big", "16 bits and clear"])
def test_grey_of_more_than_8_bits_is_scaled(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 1, 32)[None].repeat(32, 0)
    if kind == "float":
        Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "p.tif")
    elif kind == "16 bits big":
        Image.fromarray((ramp * 65535).astype(">u2")).save(tmp_path / "p.tif")
    else:
        info = PngImagePlugin.PngInfo()
        if "clear" in kind:
            info.add(b"tRNS", b"\x00\x07")
        Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "p.tif".replace("tif", "png"), pnginfo=info)
    (path,) = tmp_path.iterdir()
    assert np.abs(seen(path)[16, :, 0] - ramp[16] * 255).max() <= 1


@pytest.mark.parametrize("low, high", [(0.0, 255.0), (-0.5, 1.0), (0.0, float("nan"))])
def test_floats_of_unknown_range_are_refused(tmp_path: Path, low: float, high: float) -> None:
    pixels = np.full((32, 32), low, np.float32)
    pixels[0, 0] = high
    Image.fromarray(pixels).save(tmp_path / "p.tif")
    with pytest.raises(
        LongtakeError, match=r"range is unknown\n  got: floats from .*\n  expected: 8 bits.*\n  fix: save"
    ):
        image_from_file(tmp_path / "p.tif", 32, 32)


def test_32_bit_integers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 200, np.int32)).save(tmp_path / "p.tif")
    with pytest.raises(LongtakeError, match="got: integers from 200 to 200"):
        image_from_file(tmp_path / "p.tif", 32, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The upper left corner is light, as a viewer shows it, whichever way it is stored."""
    upright = np.full((32, 32, 3), 40, np.uint8)
    upright[:16, :16] = 230
    upright[:16, 16:] = 130
    undo = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
            6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(
        tmp_path / f"p.{suffix}", exif=exif, **options
    )
    got = seen(tmp_path / f"p.{suffix}")[:, :, 0]
    assert got[8, 8] > 220 and 110 < got[8, 24] < 150 and got[24, 8] < 60 and got[24, 24] < 60
