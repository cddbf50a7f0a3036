"""The flags that say which task: data set, seen classes, where files lie, the source model. And what flags share."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import FlagCreatePairsOff

from files import InputError, read_checkpoint

from .digits import SMALL_RECIPE, SMALL_SOURCE
from .folder import PHOTO_RECIPE, PHOTO_SOURCE


def default(kind, text, metavar=None):
    """The type of a flag that is None where nothing is given: the kind of its value, and what --help shows for None."""
    how = tyro.conf.arg(metavar=metavar or kind.__name__.upper(), help_behavior_hint=f"(default: {text})")
    return Annotated[kind | None, how]


def by_recipe(kind, name):
    """As default, for a flag whose value is in the recipes. `folder` goes by its number of images."""
    small = SMALL_RECIPE | {f"source_{key}": value for key, value in SMALL_SOURCE.items()}
    photo = PHOTO_RECIPE | {f"source_{key}": value for key, value in PHOTO_SOURCE.items()}
    return default(kind, f"digits {small[name]}, photographs {photo[name]}")


MOST, LEAST = torch.finfo(torch.float32).max, sys.float_info.min  # finite, and more than 0


def check_flag(name, value, low=0, high=MOST):
    """Raises InputError, naming the flag, if its value is below low, above high, or nan. None is left to the recipe."""
    if value is None or low <= value <= high:
        return
    least = "more than 0" if low == LEAST else f"{low} or more"
    most = "finite" if high >= MOST else f"at most {high}"
    raise InputError(f"--{name.replace('_', '-')} {value}: must be {least if value < low else most}")


@dataclass
class TaskArgs:
    # no docstring: --help would print it
    dataset: str = "digits"  # digits, glyphs, folder (your images), ...: data/README.md
    source: default(str, "the data set's first") = None  # domain of the source model
    target: default(str, "the next one") = None  # domain to adapt to
    seen_classes: default(str, "half, or as the data set says") = None  # how many, a file of names, paper, data (all)
    oracle: FlagCreatePairsOff[bool] = False  # train on target images of all classes: an upper bound
    test_share: default(float, "0.3", "P") = None  # share of each target class to test on; 0: train on all
    split_seed: int = 0  # which classes are seen, which images are for training
    pseudo_split: default(int, "none") = None  # run k of PCV calibration: seen classes play the unseen
    data_root: default(str, "$HT_DATA, else datasets") = None  # with a folder per data set, or per domain
    download: FlagCreatePairsOff[bool] = False  # fetch what is missing, where there is a stable address
    image_size: default(int, PHOTO_RECIPE["image_size"]) = None  # side of the squares that photographs become
    cache_dir: default(str, "DATA_ROOT/.cache", "DIR") = None  # where photographs are kept decoded
    no_flip: FlagCreatePairsOff[bool] = False  # never mirror photographs in training: for signs, digits, text
    skip_bad_images: FlagCreatePairsOff[bool] = False  # leave out images that cannot be read
    ignore_unknown_classes: FlagCreatePairsOff[bool] = False  # leave out target images of classes that the source lacks
    arch: by_recipe(str, "arch") = None  # also timm:NAME or clip:NAME
    weights: default(str, "imagenet, for clip: openai") = None  # pretrained: imagenet, none, a file, a tag of open_clip
    source_checkpoint: default(str, "none") = None  # a source model to start from instead of training one
    classes: default(str, "its own", "FILE") = None  # class names of --source-checkpoint, in its order
    source_seed: int = 0  # of the source model's training
    source_steps: by_recipe(int, "source_steps") = None  # of the source model's training
    source_batch_size: by_recipe(int, "source_batch_size") = None  # images per step of it
    source_lr: by_recipe(float, "source_lr") = None  # initial rate of its head
    source_backbone_lr: by_recipe(float, "source_backbone_lr") = None  # initial rate of its backbone


@dataclass
class PoolArgs:
    # no docstring: --help would print it
    unlabelled: default(str, "the target's training images, any class", "FOLDER") = None  # besides the labelled ones


def read_names(path, flag):
    """The lines of a text file in UTF-8 that are not blank. Raises InputError, naming the flag that gave the file."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: not readable as text ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def known_classes(args):
    """The class names of --classes, or those that the file --source-checkpoint has, in its model's order; None without
    the two. Raises InputError if the file has none: a wrong order would mislabel silently."""
    path, checkpoint = args.classes, args.source_checkpoint
    if path is None and checkpoint is None:
        return None
    if checkpoint is None:
        raise InputError(f"--classes {path}: names the classes of a --source-checkpoint; pass that too")
    if path is None:
        saved = read_checkpoint(checkpoint, "--source-checkpoint")
        names = saved.get("classes") if isinstance(saved, dict) else None
        if not isinstance(names, list):
            how = "pass --classes FILE, a name per line, in the order of its head's rows"
            raise InputError(f"--source-checkpoint {checkpoint}: does not say its classes; {how}")
        return names
    names = read_names(path, "--classes")
    if not names or len(set(names)) < len(names):
        raise InputError(f"--classes {path}: must have a class name per line, each once")
    return names


def cache_folders(args, root):
    """Where decoded images are kept: --cache-dir, or .cache below --data-root and, if that cannot be written, below
    --runs-dir. root: the data set's folder."""
    if args.cache_dir:
        return [Path(args.cache_dir)]
    beside = root if args.dataset == "folder" else root.parent
    return [beside / ".cache", Path(getattr(args, "runs_dir", "runs")) / ".cache"]


def augmentation_of(args, augmentation):
    """The data set's random changes of training images; with --no-flip, photographs' without flips. Raises InputError
    where there are none."""
    if not args.no_flip:
        return augmentation
    if "crop" not in augmentation:
        raise InputError(f"--no-flip: images of {args.dataset} are never flipped; leave the flag out")
    return augmentation | {"flip": 0.0}
