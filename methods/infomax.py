"""Information maximisation on unlabelled images of the target, beside cross-entropy on the labelled ones.

The setting differs from the other scripts': there are also unlabelled images, of all classes. Predictions should be
certain for each image and cover all classes on average (SHOT, Liang et al., ICML 2020, arXiv 2002.08546):
    mean entropy of p + KL(mean p || prior)    with a uniform prior it is SHOT's, up to a constant
Differs from SHOT: true labels hold the seen classes, without pseudo-labels; the head learns too; mean p is a running
mean, as a step may have fewer images than there are classes. In the cross-entropy unseen classes count --alpha times:
0 lets images of seen classes drift into unseen ones, 1 makes unseen classes sink faster than the pool can lift them.

    python methods/infomax.py    # overall 97.5 ± 0.9, unseen 95.7 on mnist to optdigits, ten splits
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
    infomax_weight: float = 1.0  # of information maximisation
    alpha: float = 0.03  # how often an unseen class counts in cross-entropy; 0: masked, 1: naive
    prior: str = "uniform"  # shares of the classes: uniform, source (as it predicts), a file with lines CLASS NUMBER
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
class Args(Method, Training, data.PoolArgs, data.TaskArgs, runs.RunArgs):
    """All flags."""


def discounted_cross_entropy(logits, labels, seen, alpha):
    """Cross-entropy of logits [N, C] in whose softmax classes outside seen, bool [C], count alpha times.
    FedRS (KDD 2021), as in masked_ft, scales their logits instead."""
    return F.cross_entropy(logits + torch.where(seen, 1.0, alpha).log(), labels)


def uncertainty(logits):
    """Mean entropy of the predictions of logits [N, C], in nats: 0 where each is certain."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def imbalance(mean, prior):
    """KL(mean || prior) of two distributions over classes, [C], in nats: 0 where they are equal."""
    return (mean * (mean.clamp_min(1e-8) / prior.clamp_min(1e-4)).log()).sum()


def running_mean(now, before, memory):
    """memory * before + (1 - memory) * now, with the gradient of now, undiminished."""
    mean = memory * before + (1 - memory) * now.detach()
    return mean + now - now.detach()


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        for flag, most in (("infomax_weight", data.MOST), ("alpha", 1), ("memory", 1)):
            data.check_flag(flag, getattr(args, flag), 0, most)
        task = data.load_task(args, pool=True)
        prior = None if args.prior in ("uniform", "source") else data.read_shares(args.prior, task.classes, "--prior")
        if prior is not None and Path(args.prior).is_file():  # it may come to hold others
            args.prior = ",".join(f"{share:.4g}" for share in prior.tolist())
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
                logits, free_logits = model(torch.cat([images, free])).split([len(images), len(free)])
                loss = discounted_cross_entropy(logits, labels, seen, args.alpha)
                mean = running_mean(free_logits.softmax(1).mean(0), state["mean"][0], args.memory)
                state["mean"][0] = mean.detach()
                loss += args.infomax_weight * (uncertainty(free_logits) + imbalance(mean, prior))
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
