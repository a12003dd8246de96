"""From a file to upright RGB of 8 bits."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

SMALLEST = 32  # pixels; images with a shorter side are skipped
DATA = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow knows by name, but needs help to read
MAX_SAMPLE_VALUE, SAMPLE_FORMAT, BITS_PER_SAMPLE, PHOTOMETRIC = 281, 339, 258, 262  # tags of TIFF
UNSIGNED, SIGNED, WHITE_IS_ZERO = 1, 2, 0

Image.init()
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in DATA}


def decode(file: Path | IO[bytes]) -> Image.Image:
    """Upright, RGB, 8 bits; raises what Pillow raises.

    More bits are scaled by the white that the file states, else by the range that the image uses; `info["scaled"]`
    then says so.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, and sizes below the limit that Pillow raises at
        with Image.open(file) as opened:
            assert isinstance(opened, ImageFile.ImageFile)
            if min(opened.size) < SMALLEST:
                raise ValueError(f"{opened.width} x {opened.height} pixels, smaller than {SMALLEST}")
            tags: dict[int, Any] = dict(getattr(opened, "tag_v2", {}))
            raw, stated = _raw_mode(opened), _stated_white(opened, tags)
            image: Image.Image = ImageOps.exif_transpose(opened)
        signed_bytes = image.mode == "L" and tags.get(SAMPLE_FORMAT) == (SIGNED,)
        if ";16" in raw and not image.mode.startswith("I"):
            return _scaled(_sixteen_bits(file, image, raw), image.mode, stated)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if tags and tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,) and pixels.dtype == np.int32:
            pixels = pixels.view(np.uint32)
        image = _scaled(pixels, image.mode, stated)
        return ImageOps.invert(image) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else image  # Pillow does it for 8 bits
    if signed_bytes:
        return _scaled(np.asarray(image).view(np.int8), image.mode, stated)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is unknown")
    if set(tags.get(BITS_PER_SAMPLE, (8,))) == {16}:
        raise ValueError("bands of 16 bits in planes, which Pillow takes for 8 bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # palettes with transparent entries have no direct way
    return image.convert("RGB")


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the pixels lie in the file, such as "RGB;16B"."""
    arguments: Any = image.tile[0].args if image.tile else None
    mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return mode if isinstance(mode, str) else ""


def _stated_white(image: ImageFile.ImageFile, tags: dict[int, Any]) -> int | None:
    if image.format in ("PPM", "JPEG2000"):
        return 65535  # they state their bits, and Pillow scales to 16
    most = tags.get(MAX_SAMPLE_VALUE)
    return int(max(most)) if most else None


def _sixteen_bits(file: Path | IO[bytes], image: Image.Image, raw: str) -> np.ndarray[Any, Any]:
    """(H, W, C) of colours of 16 bits. Pillow keeps their high bytes; read in the other order, the low ones."""
    high = np.asarray(image).astype(np.int64)
    big = raw[-1] == "B" or (raw[-1] == "N" and sys.byteorder == "big")
    other = raw[:-1] + ("L" if big else "B")
    with Image.open(file) as again:
        assert isinstance(again, ImageFile.ImageFile)
        for at, tile in enumerate(again.tile):
            arguments: Any = tile.args
            new = other if isinstance(arguments, str) else (other, *arguments[1:])
            again.tile[at] = tile._replace(args=new)
        try:
            low = np.asarray(ImageOps.exif_transpose(again)).astype(np.int64)
        except ValueError:  # grey with alpha has one order only
            return high << 8
    return (high << 8) + low


def _scaled(pixels: np.ndarray[Any, Any], mode: str, white: int | None) -> Image.Image:
    """To 8 bits. The white that nobody stated is the least 2^n - 1 that holds the image."""
    pixels = pixels.astype(np.int64)
    if mode in ("RGBA", "RGBX"):
        pixels, mode = pixels[..., :3], "RGB"  # what is no colour has a range of its own
    low, high = int(pixels.min()), int(pixels.max())
    bits = max(8, high.bit_length())
    stated = low >= 0 and ((white is not None and white >= high) or bits == 16)
    if low < 0:
        eight, how = (pixels - low) * 255 // max(1, high - low), f"from {low} to {high}"
    else:
        white = white if white is not None and white >= high else (1 << bits) - 1
        eight, how = pixels * 256 // (white + 1), f"up to {white}"
    image = Image.fromarray(eight.astype(np.uint8), mode if mode == "CMYK" else None).convert("RGB")
    if not stated:
        image.info["scaled"] = how
    return image
