"""Information maximisation on unlabelled images of the target, beside masked cross-entropy on the labelled ones.

Another setting than that of the other scripts: it also sees images of the unseen classes, without labels. They should
be classified with confidence, each, and into all classes, together (SHOT, Liang et al., ICML 2020, arXiv 2002.08546):
    mean entropy of p + KL(mean p || prior), which with a uniform prior is SHOT's L_ent + L_div up to a constant
Differs from SHOT: labelled images hold the seen classes, instead of pseudo-labels; the head learns too; mean p is a
running mean, as a step has fewer images than there may be classes; the prior over classes is a flag.
Do not use it where the pool has hardly any image of unseen classes, or many of classes that the source does not know.

    python methods/infomax.py    # overall ?, unseen ? on mnist to optdigits, see results/README.md
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the modules: beside this file or one folder up
import data
import models
import runs


@dataclass
class Method:
    unlabelled: str = data.OWN  # the target's training images of every class, or a folder of images
    weight: float = 1.0  # of information maximisation
    prior: float = 0.0  # class prior: 0 is uniform, 1 the source model's mean prediction on the pool
    memory: float = 0.9  # of the running mean of predictions; 0: each step's own


@dataclass
class Training:
    epochs: data.by_recipe(int, "epochs") = None  # evaluations after the source model's; the last one counts
    steps_per_epoch: data.by_recipe(int, "steps_per_epoch") = None  # gradient steps between two evaluations
    batch_size: data.by_recipe(int, "batch_size") = None  # images per step
    lr: data.by_recipe(float, "lr") = None  # initial rate of the head, cosine to 0
    backbone_lr: data.by_recipe(float, "backbone_lr") = None  # initial rate of the backbone
    weight_decay: float = 5e-4  # on every parameter that trains
    clip_grad: data.by_recipe(float, "clip_grad") = None  # largest norm of the gradient
    bn_mode: Literal["eval", "train"] = "eval"  # BatchNorm: eval keeps the source's statistics
    augment: bool = True  # random changes of the training images, as the data set says
    seed: int = 0  # order and augmentation of the images, and all other randomness


@dataclass
class Args(Method, Training, data.TaskArgs, runs.RunArgs):
    """All flags."""
