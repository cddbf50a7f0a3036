"""An image file to uint8 pixels."""

import contextlib
import os

import numpy as np
from PIL import Image, ImageOps


def read_image(path, size, fit="squash"):
    """The image as uint8 [size, size, 3], resized by bicubic interpolation with antialiasing, from all of its pixels.

    fit: "squash" resizes both sides to the square, as the published recipe resizes test images; "crop" resizes the
    short side and keeps the middle of the long one, as CLIP's preprocessing does. EXIF rotation is applied,
    transparency is laid on white, 16 bits become 8. Raises ValueError with the reason if the file is not one whole
    image.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("not a regular file" if os.path.exists(path) else "missing")
        if os.path.getsize(path) == 0:
            raise ValueError("empty file")
        with Image.open(path) as image:
            return np.asarray(resize(to_rgb(image), size, fit))
    except ValueError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError("not an image in a known format") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_rgb(image):
    image.load()
    with contextlib.suppress(Exception):  # a damaged block turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(deep, 0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def resize(image, size, fit):
    if fit == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short = min(image.size)
    if max(image.size) > 100 * short:
        raise ValueError(f"{image.width}x{image.height} pixels: too thin to take a square of it")
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)  # to even, as torchvision does
    return image.crop((left, top, left + size, top + size))
