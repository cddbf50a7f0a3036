"""Gradient projection: a step may fit the seen classes, but not at the cost of what the source model knows.

P measures what must be preserved: the distillation of ht_distill (unseen classes, and all seen ones as one outcome),
or with --reference gap how far the mean seen-minus-unseen logit gap has moved from the source's. Where the gradient g
of cross-entropy conflicts with p, the gradient of P (g.p < 0: the step would raise P), its part along p is taken out:

    g <- g - (g.p / p.p) p        one-sided, before momentum; the rule of A-GEM (ICLR 2019, arXiv 1812.00420)

Differs from A-GEM: P needs no data of the source. P is ours.

    python methods/grad_proj.py    # overall 87.2 ± 3.2, unseen 75.1 on mnist to optdigits, see README
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
    reference: Literal["lumped", "gap"] = "lumped"
    """what P preserves"""
    scope: Literal["global", "layer"] = "global"
    """project the whole gradient, or every parameter's by itself"""
    memory: float = 0.5
    """weight of the step before's reference in this step's: a batch's own gradient of P is noisy; 0 for none"""


def preservation(logits, source_logits, seen, reference):
    """P >= 0 for logits [N, C], 0 where they are the source's or nothing is unseen: see the header."""
    z = torch.stack([logits, source_logits])  # masks, not indices, which would wait for the device
    if reference == "gap":
        gap, source_gap = (z * (seen / seen.sum() - ~seen / (~seen).sum().clamp_min(1))).sum(2).mean(1)
        kept = (gap - source_gap).square()
    else:
        lumped = torch.cat([z.masked_fill(seen, -1e4), z.masked_fill(~seen, -1e4).logsumexp(2, keepdim=True)], 2)
        kept = F.kl_div(*lumped.log_softmax(2), reduction="batchmean", log_target=True)
    return kept * (~seen).any()


def remember(references, optimizer, trained, memory):
    """The references p of this step plus memory times what this gave the step before, in float32. They are kept in the
    optimizer's state; what overflowed in float16 counts as 0."""
    for parameter, fresh in zip(trained, references, strict=True):
        fresh = fresh.float().nan_to_num(0, 0, 0)
        state = optimizer.state[parameter]
        state["reference"] = fresh + memory * state["reference"] if "reference" in state else fresh
    return [optimizer.state[parameter]["reference"] for parameter in trained]


def project(gradients, references, scope):
    """Take out of the gradients g what conflicts with the references p: g - min(0, g.p) / p.p p, in float32, over all
    tensors as one vector (scope global) or each by itself (layer). Returns the new ones, the cosine of g and p
    over all tensors, and the share of vectors that conflicted, both as tensors."""
    g, p = ([x.float() for x in xs] for xs in (gradients, references))
    dot, pp, gg = (torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]) for x, y in ((g, p), (p, p), (g, g)))
    cosine = dot.sum() / (pp.sum() * gg.sum()).sqrt().clamp_min(1e-30)
    if scope == "global":
        dot, pp = dot.sum().expand(len(g)), pp.sum().expand(len(g))
    factor = dot.clamp_max(0) / pp.clamp_min(1e-30)  # p = 0 conflicts with nothing
    return [a - f * b for a, b, f in zip(g, p, factor, strict=True)], cosine, (dot < 0).float().mean()


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
        seen = (task.seen | args.oracle).to(device)  # with images of all classes, none is unseen
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        run.evaluate(0, model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                source_logits, logits = batches.logits(source_model, images, step), model(images)
                loss = F.cross_entropy(logits, labels)
                kept = preservation(logits, source_logits, seen, args.reference)
                gradients = torch.autograd.grad(scaler.scale(loss), trained, retain_graph=True)
                references = torch.autograd.grad(scaler.scale(kept), trained)
                references = remember(references, optimizer, trained, args.memory)
                projected, cosine, share = project(gradients, references, args.scope)
                for parameter, gradient in zip(trained, projected, strict=True):
                    parameter.grad = gradient
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images, cosine=cosine, projected=share)
            run.evaluate(epoch, model)
        run.finish(model)
