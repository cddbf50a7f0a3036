"""Does self-training on top of infomax earn its place among the methods? It does not: see the README of this folder.

infomax's terms, and its own confident predictions as labels:
    cross-entropy on labelled images + entropy of the predictions p for unlabelled ones + KL(mean p || prior)
  + cross-entropy on strong views of those unlabelled images for which p is confident, with its class as the label
The last is FixMatch's (arXiv 2001.07685), with thresholds as in FlexMatch (arXiv 2110.08263): a class that is predicted
rarely asks for less confidence. Differs from both: strong views are turned, sheared, shifted and partly black, for any
kind of image, and the term's weight rises from 0, as early labels repeat the source model's mistakes.

    python results/self_train.py    # flags as a method; overall 98.1 ± 0.6 on mnist to optdigits, ten splits
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the modules: one folder up
import data
import models
import runs
from methods import infomax
from methods.infomax import discounted_cross_entropy, imbalance, running_mean, uncertainty


@dataclass
class Method(infomax.Method):
    self_train_weight: float = 0.6  # of cross-entropy with the labels that the model makes, at the end; 0 at the start
    threshold: float = 0.95  # probability that makes such a label, for the class that is predicted most


@dataclass
class Args(Method, infomax.Training, data.PoolArgs, data.TaskArgs, runs.RunArgs):
    """All flags."""


def confident(logits, mean, threshold):
    """Where the highest probability of logits [N, C] reaches its class's threshold: bool [N].
    The threshold of a class is the less the rarer it is in the mean prediction, [C]."""
    probability, label = logits.softmax(1).max(1)
    return probability >= threshold * (mean / mean.max())[label]


def black_out(images, rng):
    """Images [N, c, H, W], each with a random square of half its sides in black (cutout, arXiv 1708.04552)."""
    corner = torch.rand(2, len(images), 1, 1, generator=rng, device=rng.device).to(images.device, non_blocking=True) / 2
    y, x = (torch.linspace(0, 1, side, device=images.device) for side in images.shape[2:])
    inside = (abs(y[:, None] - corner[0] - 0.25) < 0.25) & (abs(x - corner[1] - 0.25) < 0.25)
    return images * ~inside[:, None]


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        for flag in ("self_train_weight", "infomax_weight"):
            data.check_flag(flag, getattr(args, flag))
        for flag in ("threshold", "alpha", "memory"):
            data.check_flag(flag, getattr(args, flag), 0, 1)
        task = data.load_task(args, pool=True)
        prior = None if args.prior in ("uniform", "source") else data.read_shares(args.prior, task.classes, "--prior")
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
        seen = (task.seen | args.oracle).to(device)  # with images of all classes, none is unseen
        unlabelled = task.target_unlabelled
        pool_batch = min(args.batch_size, len(unlabelled.labels))
        pool = unlabelled.batches(pool_batch, device, args.seed, args.augment, args.resident)
        logits = [models.predict(source_model, split.images) for split in (unlabelled, task.target_train)]
        pool_logits, labelled_logits = map(torch.from_numpy, logits)
        source_mean = pool_logits.softmax(1).mean(0)
        if prior is None:
            prior = source_mean if args.prior == "source" else torch.ones(len(seen)) / len(seen)
        for text in data.pool_concerns(pool_logits, labelled_logits, prior):
            print(f"warning: unlabelled images: {text}; ht_distill does without them", file=sys.stderr)
        prior = prior.to(device)
        state = {"mean": [source_mean.to(device)]}  # the running mean of predictions

        run.start(model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, state=state)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                free, _ = pool(step)
                rng = data.generator("cpu", args.seed, 4, step)
                strong = black_out(data.random_affine(free, rng, degrees=30, scale=0.3, shift=0.15, shear=0.3), rng)
                logits = model(torch.cat([images, free, strong]))
                logits, free_logits, strong_logits = logits.split([len(images), len(free), len(free)])
                loss = discounted_cross_entropy(logits, labels, seen, args.alpha)
                mean = running_mean(free_logits.softmax(1).mean(0), state["mean"][0], args.memory)
                state["mean"][0] = mean.detach()
                loss += args.infomax_weight * (uncertainty(free_logits) + imbalance(mean, prior))
                taught = confident(free_logits.detach(), mean.detach(), args.threshold)
                losses = F.cross_entropy(strong_logits, free_logits.argmax(1), reduction="none")
                rise = step / (args.epochs * args.steps_per_epoch)
                loss += rise * args.self_train_weight * (losses * taught).mean()
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
