"""BatchNorm adaptation: the smallest change that can follow a domain.

--mode affine trains scale and shift of the BatchNorm layers only (Frankle et al., arXiv 2003.00152); --mode stats
re-estimates their mean and variance on the target images, without a gradient (AdaBN, Li et al., arXiv 1603.04779);
--mode pool does so on unlabelled images of all classes, which is another setting.
Baselines of holistic transfer (NeurIPS 2023, arXiv 2311.01420). Differs from AdaBN: statistics are averaged over the
last epoch's batches, with augmentation unless --no-augment is given; in --mode stats these show seen classes only. The
head does not train, so --lr does nothing.

    python methods/bn_adapt.py    # overall 88.2 ± 1.6, unseen 79.3 on mnist to optdigits, ten splits
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
from files import InputError


@dataclass
class Method:
    mode: Literal["affine", "stats", "pool"] = "affine"  # scale, shift; mean, variance; mean, variance of the pool


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
class Args(Method, Training, data.PoolArgs, data.TaskArgs, runs.RunArgs):
    """All flags."""


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        if args.compile and args.mode != "affine":  # a momentum of its own in every step: every step would compile anew
            raise InputError(f"--compile: --mode {args.mode} has no training step to compile; leave it out")
        if args.bn_mode == "train" and args.mode != "affine":
            raise InputError(f"--bn-mode train: --mode {args.mode} re-estimates the statistics anyway; leave it out")
        if args.unlabelled and args.mode != "pool":
            raise InputError(f"--unlabelled {args.unlabelled}: only --mode pool takes unlabelled images")
        task = data.load_task(args, pool=args.mode == "pool")
        args = run.open(task)
        models.tune_process()
        device, amp = models.choose_device(args.device, args.amp, args.arch)
        split = task.target_unlabelled if args.mode == "pool" else task.target_train
        batches = split.batches(args.batch_size, device, args.seed, args.augment, args.resident)
        # before a source model is trained in vain
        if not models.batchnorms(models.build(args.arch, 2, task.target_train.images.shape[1:], "none")):
            raise InputError(f"--arch {args.arch}: has no BatchNorm to adapt; choose small_cnn or a resnet")
        start = args.weights, args.source_checkpoint, args.source_seed
        source_model = models.source_model(task, args.arch, device, amp, *start, args.runs_dir, run.stop, args.resident)
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
        layers = models.batchnorms(model)
        model.requires_grad_(False)
        for layer in layers:
            layer.requires_grad_(args.mode == "affine")
        if args.compile:
            model.compile()
        rates = [{"params": model.backbone.parameters(), "lr": args.backbone_lr}]
        rates += [{"params": model.head.parameters(), "lr": args.lr}]
        fused = True if device.type == "cuda" and amp is not torch.float16 else None  # float16 may skip the first step
        optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

        run.start(model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train(args.mode == "affine")  # statistics are taken with every branch, as in evaluation
            for layer in models.batchnorms(model):
                layer.train(args.mode != "affine" or args.bn_mode == "train")
                if args.mode != "affine" and run.steps == (epoch - 1) * args.steps_per_epoch:
                    layer.reset_running_stats()
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                if args.mode != "affine":
                    for layer in layers:  # all batches weigh the same; momentum None would wait for the device
                        layer.momentum = 1 / (step % args.steps_per_epoch + 1)
                logits = model(images)
                loss = logits.new_zeros(()) if args.mode == "pool" else F.cross_entropy(logits, labels)
                if args.mode == "affine":  # for the statistics, the forward pass is all there is
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
