"""An image file to uint8 pixels."""

import os

import numpy as np
from PIL import Image, ImageOps


def read_image(path, size):
    """The image as uint8 [size, size, 3], resized straight to the square (bilinear with antialiasing), as the published
    recipe resizes test images. EXIF rotation is applied, transparency is laid on white, 16 bits become 8.

    Raises ValueError with the reason if the file is not one whole image.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("not a regular file" if os.path.exists(path) else "missing")
        if os.path.getsize(path) == 0:
            raise ValueError("empty file")
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 ... while twice the size is left
            return square(image, size)
    except ValueError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError("not an image in a known format") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def square(image, size):
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(deep, 0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
