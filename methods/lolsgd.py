"""LOLSGD: leave some seen classes out, in several copies, and average the copies: what they share is the domain.

Rounds: each of M copies takes tau SGD steps on images of a random subset of the seen classes, and the round's result is
their average. What differs between subsets is class-specific and cancels (holistic transfer, NeurIPS 2023, arXiv
2311.01420). Every copy's step counts as a step, so a run costs what naive_ft's does. M, tau, the left-out share and
which logits CE compares are ours; momentum starts anew in each copy.

    python methods/lolsgd.py    # overall 90.7 ± 2.0, unseen 85.9 on mnist to optdigits, see README
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
    copies: int = 4
    """M, copies per round"""
    tau: int = 5
    """steps of a copy per round"""
    left_out: float = 0.2
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


def begin_step(model, optimizer, args, step, local):
    """A copy starts without momentum; local, a dict, keeps the weights from which the copies of a round start, and how
    far each has moved."""
    if step % args.tau == 0:
        optimizer.state.clear()
    if step % (args.tau * args.copies) == 0:
        local["start"], local["moved"] = [tensor.clone() for tensor in floats(model)], []


@torch.no_grad()
def end_step(model, args, step, local):
    """After a copy's last step, put the model back to the start; after a round's, to the average of its copies. Then
    also {"spread": how far the copies part, the root of mean |w_m - mean|^2 over |mean - start|}, else {}."""
    if (step + 1) % args.tau:
        return {}
    state, start, moved = floats(model), local["start"], local["moved"]
    moved += [tensor - tensor0 for tensor, tensor0 in zip(state, start, strict=True)]
    torch._foreach_copy_(state, start)
    if (step + 1) % (args.tau * args.copies):
        return {}
    mean = [torch.stack(moved[i :: len(state)]).mean(0) for i in range(len(state))]
    torch._foreach_add_(state, mean)
    lengths = sum(tensor.square().sum() for tensor in moved) / args.copies
    return {"spread": (lengths / sum(tensor.square().sum() for tensor in mean) - 1).clamp_min(0).sqrt()}


def floats(model):
    """The tensors that are averaged: weights and BatchNorm's statistics."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


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
        seen, local = task.seen | args.oracle, {}  # with images of all classes, none is unseen
        rounds = max(1, args.epochs * args.steps_per_epoch // (args.tau * args.copies))
        draws = [data.generator("cpu", args.seed, 4, m) for m in range(rounds * args.copies)]
        subsets = torch.stack([draw_classes(seen, args.left_out, rng) for rng in draws])
        ignored = {"subset": ~subsets, "seen": ~seen, "all": ~(seen | True)}[args.ce].expand_as(subsets).to(device)

        run.evaluate(0, model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, local=local)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * rounds // args.epochs * args.tau * args.copies):
                begin_step(model, optimizer, args, step, local)
                images, labels = batches(step, subsets[step // args.tau])
                loss = F.cross_entropy(model(images).masked_fill(ignored[step // args.tau], -torch.inf), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images, **end_step(model, args, step, local))
            run.evaluate(epoch, model)
        run.finish(model)
