"""LOLSGD: leave some seen classes out, in several copies, and average the copies: what they share is the domain.

Rounds: each of M copies takes tau SGD steps on images of a random subset of the seen classes, and the round's result is
their average. What differs between subsets is class-specific and cancels (holistic transfer, NeurIPS 2023, arXiv
2311.01420). Every copy's step counts as a step, so a run costs what naive_ft's does. M, tau, the left-out share and
which logits CE compares are ours; momentum starts anew in each copy.

    python methods/lolsgd.py    # overall 93.6 ± 0.8, unseen 90.3 on mnist to optdigits, see README
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
    """domain of the source model; None, here and below: what the data set's recipe in data.py says"""
    target: str | None = None
    """domain to adapt to"""
    seen_classes: str | None = None
    """classes with target training images: how many (drawn by split_seed), or a file with a name per line"""
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
    """small_cnn, lenet, or a classifier of torchvision (resnet50, vit_b_16, ...)"""
    weights: str | None = None
    """where a torchvision backbone starts before source training: imagenet, none, or a state dict's file"""
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
    """autocast dtype; auto: off on a CPU"""
    compile: bool = False
    """torch.compile the model"""
    data_root: str | None = None
    """folder with one folder per data set; None: $HT_DATA, else data/"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    name: str | None = None
    """the method's name in the run folder, to keep variants apart; None: this script's"""
    save_model: bool = True
    """keep the adapted weights as model.pt"""
    overwrite: bool = False
    """run again what is finished"""
    copies: int = 4
    """M, copies per round"""
    tau: int = 5
    """steps of a copy per round"""
    left_out: float = 0.4
    """share of the seen classes that a copy does without"""
    ce: Literal["subset", "seen", "all"] = "subset"
    """logits that cross-entropy compares: of the copy's classes, of all seen classes, or all"""


def draw_classes(seen, left_out, rng):
    """A random subset of the classes in seen, bool [C], without the share left_out of them; two at least remain."""
    classes = torch.nonzero(seen).flatten()
    order = torch.randperm(len(classes), generator=rng)
    kept = torch.zeros_like(seen)
    kept[classes[order[: max(2, round(len(classes) * (1 - left_out)))]]] = True
    return kept


def local_rounds(model, optimizer, seen, args, epoch, spreads):
    """Yield (step, the classes of its batch) of an epoch; between the steps, begin copies and average them. Appends to
    spreads how far the copies part in each round: the root of mean |w_m - mean|^2 over |mean - start|."""
    rounds = max(1, args.epochs * args.steps_per_epoch // (args.copies * args.tau))
    state = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]  # BatchNorm buffers too
    for number in range((epoch - 1) * rounds // args.epochs, epoch * rounds // args.epochs):
        start, moved = [tensor.clone() for tensor in state], []
        for copy_ in range(number * args.copies, (number + 1) * args.copies):
            optimizer.state.clear()
            kept = draw_classes(seen, args.left_out, data.generator("cpu", args.seed, 4, copy_))
            for step in range(copy_ * args.tau, (copy_ + 1) * args.tau):
                yield step, kept
            with torch.no_grad():
                moved.append([tensor - tensor0 for tensor, tensor0 in zip(state, start, strict=True)])
                torch._foreach_copy_(state, start)
        with torch.no_grad():
            mean = [torch.stack(tensors).mean(0) for tensors in zip(*moved, strict=True)]
            torch._foreach_add_(state, mean)
            length = sum(tensor.square().sum() for tensor in mean)
            lengths = sum(tensor.square().sum() for tensors in moved for tensor in tensors) / len(moved)
            spreads.append((lengths / length - 1).clamp_min(0).sqrt())


if __name__ == "__main__":
    args = tyro.cli(Args)
    with Run(__file__, args) as run:
        device, amp = models.device_and_amp(args.device, args.amp)
        task = data.load_task(
            args.dataset, args.source, args.target, args.seen_classes, args.split_seed, args.oracle, args.data_root
        )
        task = task if args.pseudo_split is None else data.pseudo_task(task, args.split_seed, args.pseudo_split)
        args = run.open(task)
        batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment)
        source_model = models.source_model(
            task, args.arch, device, amp, args.weights, args.source_checkpoint, args.source_seed, args.runs_dir
        )
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
        if args.compile:
            model.compile()
        rates = [
            {"params": model.backbone.parameters(), "lr": args.backbone_lr},
            {"params": model.head.parameters(), "lr": args.lr},
        ]
        optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        seen = (task.seen | args.oracle).to(device)  # with images of all classes, none is unseen

        run.evaluate(0, model)
        for epoch in range(1, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            spreads = []
            for step, kept in local_rounds(model, optimizer, seen.cpu(), args, epoch, spreads):
                images, labels = batches(step, kept)
                compared = {"subset": kept.to(device), "seen": seen, "all": seen | True}[args.ce]
                loss = F.cross_entropy(model(images).masked_fill(~compared, -torch.inf), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images)
            run.evaluate(epoch, model, spread=float(torch.stack(spreads).mean()) if spreads else None)
        run.finish(model)
