"""Frozen classifier: only the backbone learns; the head stays the source model's.

The head's rows hold how the classes lie to each other, unseen ones too. Kept fixed, they ask the backbone to move the
new domain's images to where the source's were (a baseline of holistic transfer, NeurIPS 2023, arXiv 2311.01420).

    python methods/frozen_classifier.py    # overall 72.0 ± 4.5, unseen 44.5 on mnist to optdigits, see README
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # data, models and eval: beside this file or one folder up
import data
import models
from eval import Run


@dataclass
class Args:
    dataset: str = "digits"
    """a name in data.DATASETS"""
    source: str | None = None
    """domain of the source model; None, here and below: what the data set's recipe in data/ says"""
    target: str | None = None
    """domain to adapt to"""
    seen_classes: str | None = None
    """with target training images: how many (drawn by split_seed), a file with a name per line, paper, data (all)"""
    oracle: bool = False
    """train on target images of all classes: the upper bound, not a method"""
    split_seed: int = 0
    """which classes are seen, and which target images are for training"""
    seed: int = 0
    """order and augmentation of the training images, and all other randomness of the method"""
    pseudo_split: int | None = None
    """k for run k of PCV calibration: some seen classes play the unseen, and their held-out images are the test"""
    source_seed: int = 0
    """the source model's training"""
    arch: str | None = None
    """small_cnn, lenet, a classifier of torchvision (resnet50, vit_b_16, ...), timm:NAME, clip:NAME"""
    weights: str | None = None
    """where a pretrained backbone starts: imagenet, none, a state dict's file, or a tag of open_clip"""
    source_checkpoint: str | None = None
    """a source model to start from instead of training one"""
    epochs: int | None = None
    """evaluations after the source model's; the last one counts"""
    steps_per_epoch: int | None = None
    """gradient steps between two evaluations"""
    batch_size: int | None = None
    """images per step"""
    lr: float | None = None
    """initial learning rate of the head (cosine schedule to 0)"""
    backbone_lr: float | None = None
    """initial learning rate of the backbone"""
    weight_decay: float = 5e-4
    """on every parameter that trains"""
    clip_grad: float | None = None
    """largest norm of the gradient; inf: no clipping"""
    bn_mode: Literal["eval", "train"] = "eval"
    """BatchNorm while adapting: eval keeps the source's statistics, train is the published recipe"""
    augment: bool = True
    """random augmentation of the training images (its strength belongs to the data set)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "bfloat16", "float16", "off"] = "auto"
    """autocast dtype; auto: on CUDA, and on a CPU where it multiplies in bfloat16 and the network is not small"""
    compile: bool = False
    """torch.compile the model"""
    resident: Literal["auto", "on", "off"] = "auto"
    """keep the training images on the device; auto: on CUDA, if they take at most half of its free memory"""
    data_root: str | None = None
    """folder with one folder per data set; None: $HT_DATA, else data/"""
    download: bool = False
    """fetch what is missing, where there is a stable address"""
    image_size: int | None = None
    """side of the squares that photographs are resized to"""
    skip_bad_images: bool = False
    """leave out images that cannot be read, instead of stopping"""
    ignore_unknown_classes: bool = False
    """leave out target images of classes that the source does not know, instead of stopping"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    name: str | None = None
    """the method's name in the run folder, to keep variants apart; None: this script's"""
    checkpoint_every: float = 5.0
    """minutes between checkpoints, from which the same command goes on; 0: one after every step"""
    save_model: bool = True
    """keep the adapted weights as model.pt"""
    overwrite: bool = False
    """start anew, whatever the run folder holds"""


if __name__ == "__main__":
    args = tyro.cli(Args)
    with Run(__file__, args) as run:
        task = data.load_task(**{name: getattr(args, name) for name in data.TASK_FLAGS})
        args = run.open(task)
        device, amp = models.device_and_amp(args.device, args.amp, args.arch)
        batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment, args.resident)
        source_model = models.source_model(
            task, args.arch, device, amp, args.weights, args.source_checkpoint, args.source_seed, args.runs_dir
        )
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
        if args.compile:
            model.compile()
        backbone, head = model.backbone.parameters(), model.head.parameters()
        rates = [{"params": backbone, "lr": args.backbone_lr}, {"params": head, "lr": args.lr}]
        optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        model.head.requires_grad_(False)

        run.evaluate(0, model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images)
            run.evaluate(epoch, model)
        run.finish(model)
