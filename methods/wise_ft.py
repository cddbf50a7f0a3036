"""WiSE-FT: fine-tune, then go back part of the way to the source model.

    w(mixing) = (1 - mixing) w0 + mixing w       for mixing in 0, 0.1 ... 1; the result is mixing = 0.5

(Wortsman et al., CVPR 2022, arXiv 2109.01903, where mixing is called alpha.) --mode logits averages the two models'
logits instead. Differs from the paper: BatchNorm statistics are averaged like weights, or re-estimated on the target
images with --reestimate-bn.

    python methods/wise_ft.py    # overall 83.0 ± 3.7, unseen 67.3 on mnist to optdigits, ten splits
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
from eval import accuracies, number
from files import InputError


@dataclass
class Method:
    mode: Literal["weights", "logits"] = "weights"  # what is averaged; of logits, no model.pt is kept
    mixing: float = 0.5  # share of the fine-tuned model in the result
    reestimate_bn: bool = False  # re-estimate BatchNorm's statistics of averaged weights on the target


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


class Ensemble(torch.nn.Module):
    """(1 - mixing) of the source model's and mixing of the model's logits and features."""

    def __init__(self, source_model, model, mixing):
        super().__init__()
        self.source_model, self.model, self.mixing = source_model, model, mixing

    def forward(self, images, return_features=False):
        source_logits, source_features = self.source_model(images, True)
        logits, features = self.model(images, True)
        logits = torch.lerp(source_logits, logits, self.mixing)
        features = torch.lerp(source_features, features, self.mixing)
        return (logits, features) if return_features else logits


@torch.no_grad()
def interpolate(source_model, model, mixing):
    """A model in eval mode with weights and buffers (1 - mixing) w0 + mixing w, in float32."""
    result = copy.deepcopy(source_model)
    for w0, w in zip(result.state_dict().values(), model.state_dict().values(), strict=True):
        if w0.is_floating_point():
            w0.copy_(torch.lerp(w0.float(), w.float(), mixing))
    return result.eval()


@torch.no_grad()
def reestimate(model, layers, batches):
    """Set the statistics of the model's BatchNorm layers to their average over one pass of batches(step)."""
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    for step in range(len(batches)):
        for layer in layers:
            layer.momentum = 1 / (step + 1)  # all batches weigh the same; None would wait for the device
        model(batches(step)[0])
    model.eval()


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        data.check_flag("mixing", args.mixing, 0, 1)
        if args.calibrate is not None and args.mode == "logits":
            raise InputError(f"--calibrate {args.calibrate}: --mode logits has no head for a bias; leave it out")
        if args.reestimate_bn and args.mode == "logits":
            raise InputError("--reestimate-bn: --mode logits averages no weights; leave it out")
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
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images)
            run.evaluate(epoch, model)

        def mixed(mixing):
            if args.mode == "logits":
                return Ensemble(source_model, model, mixing)
            result = interpolate(source_model, model, mixing)
            if args.reestimate_bn and 0 < mixing < 1:
                reestimate(result, models.batchnorms(result), batches)
            return result

        run.stop.release()
        curve = []
        for mixing in [i / 10 for i in range(11)]:
            logits = models.predict(mixed(mixing), task.target_test.images)
            curve.append({"mixing": mixing, **accuracies(logits, task.target_test.labels, task.seen)})
            cells = "".join(f"  {name} {number(curve[-1][name], 6)}" for name in ("seen", "unseen", "overall"))
            print(f"mixing {mixing:.1f}{cells}")
        result = mixed(args.mixing)
        run.evaluate(args.epochs + 1, result, curve=curve)
        run.finish(result)
