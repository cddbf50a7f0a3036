"""L2-SP: fine-tuning with a pull to the source model's weights in place of weight decay.

    loss = CE + pull / 2 * sum (w - w0)^2          (Li, Grandvalet and Davoine, ICML 2018, arXiv 1802.01483)

Differs from the paper: the head is pulled too, since the source model has it already. The value of pull, which the
paper calls alpha, is ours.

    python methods/l2_sp.py    # overall 84.5 ± 3.0, unseen 70.1 on mnist to optdigits, ten splits
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
    pull: float = 1.0  # strength of the pull


@dataclass
class Training:
    epochs: data.by_recipe(int, "epochs") = None  # evaluations after the source model's; the last one counts
    steps_per_epoch: data.by_recipe(int, "steps_per_epoch") = None  # gradient steps between two evaluations
    batch_size: data.by_recipe(int, "batch_size") = None  # images per step
    lr: data.by_recipe(float, "lr") = None  # initial rate of the head, cosine to 0
    backbone_lr: data.by_recipe(float, "backbone_lr") = None  # initial rate of the backbone
    weight_decay: float = 0.0  # on every parameter that trains, besides the pull
    clip_grad: data.by_recipe(float, "clip_grad") = None  # largest norm of the gradient
    bn_mode: Literal["eval", "train"] = "eval"  # BatchNorm: eval keeps the source's statistics
    augment: bool = True  # random changes of the training images, as the data set says
    seed: int = 0  # order and augmentation of the images, and all other randomness


@dataclass
class Args(Method, Training, data.TaskArgs, runs.RunArgs):
    """All flags."""


@torch.no_grad()
def pull_to(start, parameters, pull):
    """Add pull (w - w0), the gradient of pull / 2 * sum (w - w0)^2, to the gradients of the parameters w."""
    parameters = list(parameters)
    moved = torch._foreach_sub(parameters, list(start))
    torch._foreach_add_([w.grad for w in parameters], moved, alpha=pull)


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        data.check_flag("pull", args.pull)
        task = data.load_task(args)
        args = run.open(task)
        models.tune_process()
        device, amp = models.choose_device(args.device, args.amp, args.arch)
        batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment, args.resident)
        start = args.weights, args.source_checkpoint, args.source_seed
        source_model = models.source_model(task, args.arch, device, amp, *start, args.runs_dir, run.stop, args.resident)
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
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
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                pull_to(source_model.parameters(), model.parameters(), args.pull)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images)
            run.evaluate(epoch, model)
        run.finish(model)
