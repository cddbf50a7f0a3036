"""`iwildcam`: animals before camera traps (WILDS 2.0); each new camera is a target of its own."""

import csv
from collections import Counter
from functools import lru_cache

import numpy as np

from files import InputError

from .folder import PHOTOGRAPHS, Domain, need

TARGETS = 21
ABOUT = """
iWildCam as WILDS 2.0 publishes it (203,029 images, 12 GB): https://wilds.stanford.edu/get_started/, bundle
iwildcam_v2.0 (its public archive is often down, so there is no --download). Put the unpacked folder below --data-root:
    iwildcam/metadata.csv, iwildcam/categories.csv, iwildcam/train/*.jpg          (iwildcam/iwildcam_v2.0/... as well)
Decoded at 224x224 the images take another 0.15 MB each, in .cache below --data-root (train 20 GB).
"""


def home(root):
    return root / "iwildcam_v2.0" if (root / "iwildcam_v2.0").is_dir() else root


@lru_cache(maxsize=1)
def read(root):
    """(rows of metadata.csv as dicts, class names by their y)."""
    rows, categories = read_csv(home(root) / "metadata.csv"), read_csv(home(root) / "categories.csv")
    try:
        names = {int(row["y"]): row["name"] for row in categories if int(row["y"]) != 99999}  # 99999: not in this set
        if not rows or not all(name and name.isprintable() for name in names.values()):
            raise ValueError(f"no image, or one of the names {', '.join(map(repr, list(names.values())[:5]))} ...")
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise ValueError(f"line {number} of metadata.csv has too few or too many fields")
            if row["split"] not in ("train", "val", "test", "id_val", "id_test"):
                raise ValueError(f"split {row['split']!r}")
            row["y"], row["file"] = int(row["y"]), f"train/{row['filename']}"
            row["place"], row["sequence"] = row["location_remapped"], row["sequence_remapped"]
            if row["y"] not in names:
                raise ValueError(f"y {row['y']} is not in categories.csv")
            rows[number - 2] = {name: row[name] for name in ("split", "y", "file", "place", "sequence")}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{home(root)}: metadata.csv or categories.csv is not that of WILDS 2.0 ({error!r})"
        ) from error
    count = Counter(names.values())
    return rows, {y: name if count[name] == 1 else f"{name} ({y})" for y, name in sorted(names.items())}


def read_csv(path):
    try:
        with open(need(path, ABOUT), newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def domains(root):
    """("train", and up to 21 new cameras by their location_remapped): of the splits val and test, which train has not,
    those with two or more classes and sequences and the most images. Which 21 the paper took is not known to us."""
    rows, _ = read(root)
    images, kinds, sequences = Counter(), {}, {}
    for row in rows:
        if row["split"] in ("val", "test"):
            images[row["place"]] += 1
            kinds.setdefault(row["place"], set()).add(row["y"])
            sequences.setdefault(row["place"], set()).add(row["sequence"])
    able = [place for place, _ in images.most_common() if len(kinds[place]) > 1 and len(sequences[place]) > 1]
    if not able:
        raise InputError(
            f"{home(root)}/metadata.csv: no camera of the splits val and test has two classes and sequences"
        )
    return ("train", *able[:TARGETS])


def iwildcam(domain, root):
    """train: the training cameras' images, with those of id_test as the test part; else all images of one new camera,
    whose sequences (near-duplicates) stay together."""
    rows, names = read(root)
    if domain == "train":
        mine = [row for row in rows if row["split"] in ("train", "id_test")]
    else:
        mine = [row for row in rows if row["split"] in ("val", "test") and row["place"] == domain]
    ids = {y: i for i, y in enumerate(names)}
    labels = np.array([ids[row["y"]] for row in mine], np.int64)
    files = [f"{home(root).relative_to(root)}/{row['file']}".removeprefix("./") for row in mine]
    if domain == "train":
        test = np.array([row["split"] == "id_test" for row in mine])
        return Domain(files, labels, list(names.values()), test if test.any() else None)
    group = np.unique([row["sequence"] for row in mine], return_inverse=True)[1]
    return Domain(files, labels, list(names.values()), group=group)


IWILDCAM = {
    **PHOTOGRAPHS,
    "load": iwildcam,
    "domains": domains,
    "only_source": "train",
    "seen": "data",
    "about": ABOUT,
}
