"""`femnist`: handwritten characters in LEAF's JSON files; each new writer is a target of its own."""

import hashlib
import json
import string
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from files import InputError, read_checkpoint, write_checkpoint

from .digits import CHARACTERS, SMALL_RECIPE, SMALL_SOURCE
from .folder import Domain, need

TARGETS = 10
CLASSES = list(string.digits + string.ascii_uppercase + string.ascii_lowercase)
ABOUT = """
FEMNIST is made, not downloaded: it is too large to preprocess here. Clone https://github.com/TalwalkarLab/leaf (about
2 GB come from NIST, and 5 to 30 GB are needed while it works), then in its folder data/femnist run
    ./preprocess.sh -s niid --sf 1.0 -k 0 -t sample        (--sf 0.05 is a small sample)
and put its two folders into the folder femnist below --data-root:
    femnist/train/all_data_*.json, femnist/test/all_data_*.json
"""


@lru_cache(maxsize=1)
def read(root):
    """{"images" uint8 [N, 1, 28, 28], "labels" [N], "writers" [N], "test" bool [N]} of all writers, from a cache file.

    The files' paper is 1 and their ink 0: turned to white on black, as MNIST is. An image that its writer has twice is
    kept once, in the training part where both have it (LEAF stores the first image of every later writer twice).
    """
    paths = [
        path for part in ("train", "test") for path in sorted(need(root / part, ABOUT).glob("*.json")) if path.is_file()
    ]
    if not paths:
        raise InputError(f"{root}/train: no .json file\n\n{ABOUT.strip()}")
    stats = [(path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(["femnist 2", *stats]).encode()).hexdigest()[:16]
    cache = root.parent / ".cache" / f"femnist-{key}.pt"
    if cache.exists():
        content = read_checkpoint(cache, "delete the cache file")
    else:
        content = read_writers(root, paths)
        try:
            write_checkpoint(cache, content)
        except InputError as error:
            print(f"{error}; so every run reads femnist anew")
    try:
        return {name: np.asarray(content[name]) for name in ("images", "labels", "writers", "test")}
    except (KeyError, TypeError) as error:
        raise InputError(f"{cache}: not a whole file of the cache ({error!r}); delete it") from error


def read_writers(root, paths):
    """What `read` keeps in its cache file, tensors and a list of names, from LEAF's files."""
    parts = [part for path in tqdm(paths, desc="reading femnist", unit="file") for part in read_json(path)]
    if not parts:
        raise InputError(f"{root}: its .json files hold no image")
    names, images, labels, test = zip(*parts, strict=True)
    sizes = [len(part) for part in labels]
    images, names = np.concatenate(images), np.repeat(names, sizes).tolist()
    first = {}  # of equal images of a writer the first stays
    for i, (writer, image) in enumerate(zip(names, images, strict=True)):
        first.setdefault((writer, hashlib.blake2b(image.tobytes()).digest()), i)
    kept = list(first.values())
    return {
        "images": torch.from_numpy(images[kept]),
        "labels": torch.from_numpy(np.concatenate(labels)[kept]),
        "writers": [names[i] for i in kept],
        "test": torch.from_numpy(np.repeat(test, sizes)[kept]),
    }


def read_json(path):
    """[(writer, images uint8 [n, 1, 28, 28], labels [n], is a test file)] of one of LEAF's files."""
    try:
        content = json.loads(path.read_text("utf-8"))
        result = []
        for writer in content["users"]:
            pixels = np.asarray(content["user_data"][writer]["x"], np.float32).reshape(-1, 1, 28, 28)
            labels = np.asarray(content["user_data"][writer]["y"], np.int64).reshape(-1)
            if len(pixels) != len(labels) or not ((labels >= 0) & (labels < len(CLASSES))).all():
                raise ValueError(f"writer {writer}: {len(pixels)} images, labels {labels[:5]} ...")
            if not ((pixels >= 0) & (pixels <= 1)).all():
                raise ValueError(f"writer {writer}: pixels outside 0..1")
            result.append((writer, ((1 - pixels) * 255).round().astype(np.uint8), labels, path.parent.name == "test"))
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not one of LEAF's files ({type(error).__name__}: {error})") from error


def domains(root):
    """("train", and the new writers). Where all writers are in both of LEAF's folders (-t sample), ten of them, drawn
    once and for all, are the new ones; which ten the paper took is not known to us. Else (-t user) ten of those that
    only test/ has."""
    data = read(root)
    train, test = (set(data["writers"][data["test"] == part]) for part in (False, True))
    pool = sorted(test - train) or sorted(test & train)
    if len(train | test) < 2:
        raise InputError(f"{root}: one writer; a source and a target are needed")
    drawn = np.random.default_rng(0).permutation(len(pool))[: min(TARGETS, len(train | test) - 1)]
    return ("train", *sorted(str(pool[i]) for i in drawn))


def femnist(domain, root):
    """train: all images of all writers but the new ones; else the images of that new writer, in LEAF's split where it
    splits a writer's images."""
    data = read(root)
    mine = ~np.isin(data["writers"], domains(root)[1:]) if domain == "train" else data["writers"] == domain
    images, labels, test = (data[name][mine] for name in ("images", "labels", "test"))
    return Domain(images, labels, CLASSES, test if test.any() and not test.all() else None)


FEMNIST = {
    **CHARACTERS,
    "load": femnist,
    "domains": domains,
    "only_source": "train",
    "seen": "data",
    "about": ABOUT,
    "recipe": {**SMALL_RECIPE, "arch": "lenet"},
    "source_recipe": {**SMALL_SOURCE, "steps": 10000},
}
