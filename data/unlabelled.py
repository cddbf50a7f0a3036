"""Unlabelled images of the target: another setting, for a script that asks load_task for them.

These are the target's training images of every class, and those in ROOT/TARGET/unlabelled of `--dataset folder`. With
--unlabelled FOLDER they are the labelled images and those in that folder. All come without their labels.
"""

import os
from pathlib import Path

import numpy as np
import torch

from files import InputError

from .batches import Split
from .folder import EXTENSIONS, entries
from .images import Images


def image_files(unlabelled, target_folder):
    """The image files, as str, directly in the folder `unlabelled`, or if that is None in target_folder/unlabelled.

    [] if the latter does not exist. Raises InputError if the folder `unlabelled` has no image.
    """
    folder = Path(unlabelled or Path(target_folder) / "unlabelled").resolve()
    if unlabelled is None and not folder.is_dir():
        return []
    found = [name for name in entries(folder) if name.lower().endswith(EXTENSIONS)] if folder.is_dir() else []
    if unlabelled and not found:
        raise InputError(f"--unlabelled {folder}: no image directly in it ({', '.join(EXTENSIONS)})")
    return [str(folder / name) for name in found]


def identities(files):
    """{file: what it is, by whatever path} of those of the files that are there."""
    stats = {file: os.stat(file) for file in files if os.path.exists(file)}
    return {file: (stat.st_dev, stat.st_ino) for file, stat in stats.items()}


def check_other_images(more, own):
    """Raise InputError if files of the list `more` are the target's `own`, by whatever path."""
    known = set(identities(own).values())
    shared = [file for file, identity in identities(more).items() if identity in known]
    if shared:
        raise InputError(
            f"--unlabelled {Path(shared[0]).parent}: {len(shared)} of the target's own images are in it. Some "
            "may be test images, which no pool may hold; leave the flag out to use the training images of every class"
        )


def without_labels(split, more=None):
    """The Split with -1 for every label, and with the images `more` behind its own: Images of the same file, or None.
    Of those no group is known, so then it has none."""
    images, group = split.images, split.group
    if more is not None:
        images, group = Images(images.pixels, np.concatenate([images.index, more.index]), images.key, images.sums), None
    return Split(images, torch.full((len(images),), -1), split.augmentation, group)


def pool_concerns(pool_logits, labelled_logits, prior):
    """What may go wrong with a pool of unlabelled images, a text each.

    pool_logits, labelled_logits: the source model's, [N, C] on the pool and [M, C] on the labelled images, which are in
    the pool too. prior: the shares of the classes that a method takes for the pool's, [C].
    """
    texts, few = [], len(pool_logits) - len(labelled_logits)
    if few < 5 * len(prior):
        texts.append(f"{few} besides the labelled ones are few for {len(prior)} classes")
    distance = (pool_logits.softmax(1).mean(0) - prior).abs().sum().item() / 2
    if distance > 0.35:
        texts.append(f"the source model sees other class shares than expected (distance {distance:.2f} of 1)")
    pool, labelled = (torch.special.entr(logits.softmax(1)).sum(1).mean() for logits in (pool_logits, labelled_logits))
    doubt = (pool - labelled).item()
    if doubt > 0.14:
        texts.append(f"the source model doubts them ({doubt:.2f} nats more than labelled ones): are all classes known?")
    return texts


def read_shares(path, classes, flag):
    """The share of each of the classes, float [C], which add up to 1, from a file with a line `CLASS NUMBER` for each.

    The numbers may be counts. Raises InputError, naming the flag that gave the file, the line or the class.
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: not there; must have a line CLASS NUMBER for each class")
    shares = {}
    for number, line in enumerate(Path(path).read_text("utf-8-sig", errors="replace").splitlines(), 1):
        name, _, value = line.strip().rpartition(" ")
        if not line.strip():
            continue
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"{path}, line {number}: {line!r} is not CLASS NUMBER") from None
        if name.strip() in shares:
            raise InputError(f"{path}, line {number}: a second number for {name.strip()}")
        shares[name.strip()] = value
    if set(shares) != set(classes) or not 0 < sum(shares.values()) < float("inf") or min(shares.values()) < 0:
        wrong = sorted(set(shares) ^ set(classes))
        where = f"; missing or unknown: {wrong[:5]}" if wrong else ""
        raise InputError(f"{path}: needs a number, 0 or more, for each class once{where}")
    values = torch.tensor([shares[name] for name in classes])
    return values / values.sum()
