"""The flags that say which task: data set, seen classes, where files lie, the source model. And what flags share."""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from tyro.conf import FlagCreatePairsOff

from files import InputError

from .digits import SMALL_RECIPE, SMALL_SOURCE
from .folder import PHOTO_RECIPE, PHOTO_SOURCE


def default(kind, text):
    """How --help shows a flag that is None where nothing is given: the kind of its value, and what stands for None."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {text})")


def by_recipe(kind, name):
    """As default, for a flag whose value is in the recipes: that of small images, and that of photographs."""
    small = SMALL_RECIPE | {f"source_{key}": value for key, value in SMALL_SOURCE.items()}
    photo = PHOTO_RECIPE | {f"source_{key}": value for key, value in PHOTO_SOURCE.items()}
    same = small[name] == photo[name]
    return default(kind, f"{small[name]}" if same else f"{small[name]}; photographs {photo[name]}")


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
    dataset: str = "digits"
    """a name in data.DATASETS"""
    source: Annotated[str | None, default("STR", "the data set's first")] = None
    """domain of the source model"""
    target: Annotated[str | None, default("STR", "the next one")] = None
    """domain to adapt to"""
    seen_classes: Annotated[str | None, default("STR", "half, or published")] = None
    """how many, a file of names, paper, or data (all)"""
    oracle: FlagCreatePairsOff[bool] = False
    """train on target images of all classes: an upper bound"""
    split_seed: int = 0
    """which classes are seen, which images are for training"""
    pseudo_split: Annotated[int | None, default("INT", "none")] = None
    """run k of PCV calibration: seen classes play the unseen"""
    data_root: Annotated[str | None, default("STR", "$HT_DATA, else datasets")] = None
    """folder with one folder per data set"""
    download: FlagCreatePairsOff[bool] = False
    """fetch what is missing, where there is a stable address"""
    image_size: Annotated[int | None, default("INT", f"{PHOTO_RECIPE['image_size']}")] = None
    """side of the squares that photographs are resized to"""
    skip_bad_images: FlagCreatePairsOff[bool] = False
    """leave out images that cannot be read"""
    ignore_unknown_classes: FlagCreatePairsOff[bool] = False
    """leave out target images of classes that the source lacks"""
    arch: Annotated[str | None, by_recipe("STR", "arch")] = None
    """or another of torchvision, timm:NAME, clip:NAME"""
    weights: Annotated[str | None, default("STR", "imagenet")] = None
    """pretrained: imagenet, none, a file, a tag of open_clip"""
    source_checkpoint: Annotated[str | None, default("FILE", "none")] = None
    """a source model to start from instead of training one"""
    source_seed: int = 0
    """of the source model's training"""
    source_steps: Annotated[int | None, by_recipe("INT", "source_steps")] = None
    """of the source model's training"""
    source_lr: Annotated[float | None, by_recipe("FLOAT", "source_lr")] = None
    """initial rate of its head"""
    source_backbone_lr: Annotated[float | None, by_recipe("FLOAT", "source_backbone_lr")] = None
    """initial rate of its backbone"""
