"""`glyphs`: characters drawn with the fonts that matplotlib ships; nothing to download."""

import string
from pathlib import Path

import numpy as np

from .digits import CHARACTERS, SMALL_SOURCE


def glyphs(domain, root=None):
    """Characters 0-9 A-Z a-z that Pillow draws with fonts that matplotlib ships, 40 of each, four styles in
    turn, each with its own shift, scale, rotation, stroke, contrast and noise. White on black, uint8 [N, 1, 28, 28]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    names = {
        "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        "stix": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    }
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 54) for name in names[domain]]
    rng = np.random.default_rng(list(names).index(domain))
    classes, images = list(string.digits + string.ascii_uppercase + string.ascii_lowercase), []
    for character in classes:
        for i in range(40):
            image = Image.new("L", (84, 84))
            stroke = int(rng.integers(0, 3))
            ImageDraw.Draw(image).text((42, 42), character, 255, fonts[i % 4], anchor="mm", stroke_width=stroke)
            angle, zoom, (x, y) = rng.uniform(-0.2, 0.2), rng.uniform(0.75, 1.15), rng.uniform(-6, 6, 2)
            cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
            turn = (cos, -sin, 42 - 42 * cos + 42 * sin + x, sin, cos, 42 - 42 * sin - 42 * cos + y)
            image = image.transform(image.size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR)
            ink = np.asarray(image.resize((28, 28), Image.Resampling.BOX), np.float32) * rng.uniform(0.6, 1)
            images.append(ink + rng.normal(0, rng.uniform(0, 25), ink.shape))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), 40)
    return np.clip(np.stack(images)[:, None], 0, 255).round().astype(np.uint8), labels, classes


GLYPHS = {
    **CHARACTERS,
    "load": glyphs,
    "domains": ("sans", "serif", "mono", "stix"),
    "source_recipe": {**SMALL_SOURCE, "steps": 1000},
}
