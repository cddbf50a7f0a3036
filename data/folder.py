"""`folder`: anyone's own images, root/DOMAIN/CLASS/*.jpg; and what the other data sets of files share."""

import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import InputError

from .images import pick

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# The published base recipe (batch 64, 20 x 500 steps, 1e-3 and 1e-4) and a bound on the gradient, which is ours, as is
# the source model's training.
PHOTO_RECIPE = {"arch": "resnet50", "epochs": 20, "steps_per_epoch": 500, "batch_size": 64}
PHOTO_RECIPE |= {"lr": 0.001, "backbone_lr": 0.0001, "clip_grad": 5.0, "image_size": 224}
PHOTO_SOURCE = {"steps": 10000, "batch_size": 64, "lr": 0.01, "backbone_lr": 0.001}
PHOTOGRAPHS = {  # what the entries of these data sets have in common
    "augmentation": {"crop": 0.7, "jitter": 0.3, "gray": 0.1},
    "recipe": PHOTO_RECIPE,
    "source_recipe": PHOTO_SOURCE,
}


class Domain(NamedTuple):
    """What a data set's function reads of one domain.

    images: uint8 array [N, c, H, W], or N file paths below the data set's folder. labels: int64 [N], indices into this
    domain's own `classes`. test: bool [N], the published split, or None. group: int [N], images that must stay on one
    side of a split, or None.
    """

    images: Any
    labels: np.ndarray
    classes: list
    test: np.ndarray | None = None
    group: np.ndarray | None = None

    def take(self, images, index):
        """The Domain of the images `index`, int64 [n], which are given as they are kept from here on."""
        return Domain(images, self.labels[index], self.classes, pick(self.test, index), pick(self.group, index))


def need(path, about):
    """`path` if it exists. Raises InputError with what belongs there."""
    if not Path(path).exists():
        raise InputError(f"{path}: not there\n\n{about.strip()}")
    return path


def entries(folder):
    """Names in a folder that are no hidden files, sorted. Raises InputError if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error


def folders(folder):
    return [name for name in entries(folder) if os.path.isdir(os.path.join(folder, name))]


def classes_of(folder):
    """The folders in a folder that are classes, not a heap of unlabelled images."""
    return [name for name in folders(folder) if name != "unlabelled"]


def class_tree(root, below, keep=lambda name: True):
    """(files, names) of the images root/below/CLASS/*: their paths below root, sorted by class and file name, and the
    class name of each. Only classes for which keep(name) is true are read."""
    files, names = [], []
    for name in filter(keep, classes_of(root / below)):
        within = entries(root / below / name)
        found = [file for file in within if file.lower().endswith(EXTENSIONS)]
        if len(found) < len(within):
            other = f"{len(within) - len(found)} of {len(within)} files are no images ({', '.join(EXTENSIONS)})"
            print(f"warning: {root / below / name}: {other}", file=sys.stderr)
        files += [f"{below}/{name}/{file}" for file in found]
        names += [name] * len(found)
    return files, names


def named(files, names, classes=None, test=None, group=None):
    """A Domain whose labels are given by name; classes: their order, alphabetical if None."""
    classes = sorted(set(names)) if classes is None else classes
    ids = {name: i for i, name in enumerate(classes)}
    labels = np.array([ids[name] for name in names], np.int64)
    return Domain(files, labels, classes, test, group)


def read_list(path, about):
    """[(file, id)] of a published list with lines "path/of/file.jpg id". Raises InputError, naming the line."""
    rows = []
    for number, line in enumerate(Path(need(path, about)).read_text("utf-8", errors="replace").splitlines(), 1):
        file, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not (label.isascii() and label.isdecimal()) or file.count("/") != 2:
            raise InputError(f"{path}, line {number}: {line!r}, not DOMAIN/CLASS/FILE and a number")
        rows.append((file, int(label)))
    if not rows:
        raise InputError(f"{path}: lists no image")
    return rows


# ------------------------------------------------------------------------------------------ folder

ABOUT = """
--dataset folder reads your own images from --data-root ROOT:
    ROOT/DOMAIN/CLASS/*.jpg (jpeg, png, webp, bmp)     two DOMAINs: the source and the target
    ROOT/DOMAIN/{train,test}/CLASS/*.jpg               the same with a split of your own
    ROOT/DOMAIN/unlabelled/*.jpg                       images of any class, for the scripts that use such
The classes are the source's folders; the target may lack some of them.
With --source-checkpoint FILE the target is enough: the classes are those that this model knows.
"""


def domains(root):
    """The folders of root that hold folders, but for `runs`, which holds results, and a disk's lost+found."""
    names = folders(root) if need(root, ABOUT).is_dir() else []
    found = [name for name in names if name not in ("runs", "lost+found") and folders(root / name)]
    if not found:
        raise InputError(f"{root}: no folder with class folders in it\n\n{ABOUT.strip()}")
    return tuple(found)


def model_as_source(args, domains):
    """The name of the source where only its model is given, after the file's name. None if a domain is the source."""
    if args.dataset != "folder" or args.source_checkpoint is None:
        return None
    path = Path(args.source_checkpoint)
    name = path.name if path.stem in domains else path.stem
    return name if args.source in (None, name) else None


def plain_domains(args, domains):
    """(source, target) where the flags or the number of domains make them plain. Raises InputError where not."""
    source, target, listed = model_as_source(args, domains), args.target, ", ".join(domains)
    if source:
        if target is None and len(domains) > 1:
            raise InputError(f"--target: say which of {listed} is to be adapted to")
        return source, target or domains[0]
    if len(domains) < 2 and args.source in (None, *domains):
        raise InputError(
            f"--data-root: one domain, {listed}, and no source; put the source's images beside it, "
            "or pass a model that knows all classes with --source-checkpoint FILE"
        )
    if args.source is None and target is None:
        raise InputError(f"--source and --target: say which of {listed} is which")
    source = args.source or next(name for name in domains if name != target)
    return source, target or next(name for name in domains if name != source)


def folder(domain, root):
    """root/DOMAIN/CLASS/*, or root/DOMAIN/{train,test}/CLASS/* where these two are all there is and hold folders."""
    parts = classes_of(root / domain)
    if parts == ["test", "train"] and all(folders(root / domain / part) for part in parts):
        (train, names), (test, test_names) = (class_tree(root, f"{domain}/{part}") for part in ("train", "test"))
        return named(train + test, names + test_names, test=np.arange(len(train + test)) >= len(train))
    return named(*class_tree(root, domain))


def recipe_for(images):
    """The published recipe for many labelled target images, and ours for few: fewer steps at higher rates.

    Steps: 50 passes, at least 100 and at most the published 10,000. Backbone's rate: 1 / steps, as published, but at
    most 0.003; the head's is at least that. Batch: an eighth of the images, but 8 to 64, and never more than all.
    """
    batch = min(images, 64, max(8, images // 8))
    steps = min(10_000, max(100, 50 * images // batch))
    backbone_lr = min(0.003, 1 / steps)
    few = {"steps_per_epoch": math.ceil(steps / 20), "batch_size": batch}
    return PHOTO_RECIPE | few | {"backbone_lr": backbone_lr, "lr": max(backbone_lr, PHOTO_RECIPE["lr"])}


def source_recipe_for(images):
    """As recipe_for, for the source model: 30 passes, rates times steps as in PHOTO_SOURCE, up to 0.1 and 0.01."""
    steps = min(10_000, max(100, 30 * images // 64))
    return PHOTO_SOURCE | {"steps": steps, "lr": min(0.1, 100 / steps), "backbone_lr": min(0.01, 10 / steps)}


FOLDER = {**PHOTOGRAPHS, "load": folder, "domains": domains, "seen": "data", "about": ABOUT}
FOLDER |= {"recipe_for": recipe_for, "source_recipe_for": source_recipe_for}
