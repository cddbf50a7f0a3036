"""Gradient projection: a step may fit the seen classes, but not at the cost of what the source model knows.

P measures what was not preserved: KL(source || model) with all seen classes as one outcome, or with --reference gap
how far the mean seen-minus-unseen logit gap has moved from the source's. Where the gradient g of cross-entropy
conflicts with p, the gradient of P (g.p < 0: the step would raise P), its part along p is taken out:

    g <- g - (g.p / p.p) p        one-sided, before momentum; the rule of A-GEM (ICLR 2019, arXiv 1812.00420)

Differs from A-GEM: P, which is ours, needs no data of the source, and p holds a share of the last step's (--memory).

    python methods/grad_proj.py    # overall 87.2 ± 2.7, unseen 75.3 on mnist to optdigits, ten splits
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch._functorch.config
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the modules: beside this file or one folder up
import data
import models
import runs


@dataclass
class Method:
    reference: Literal["lumped", "gap"] = "lumped"  # what P preserves
    scope: Literal["global", "layer"] = "global"  # project the whole gradient, or every parameter's by itself
    memory: float = 0.5  # weight of the last step's reference in this one's: one batch's is noisy


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


def preservation(logits, source_logits, seen, reference):
    """P >= 0 for logits [N, C], 0 where they are the source's or nothing is unseen: see the header."""
    z = torch.stack([logits, source_logits])  # masks, not indices, which would wait for the device
    if reference == "gap":
        weight = seen / seen.sum() - ~seen / (~seen).sum().clamp_min(1)
        gap, source_gap = (z * weight).sum(2).mean(1)
        kept = (gap - source_gap).square()
    else:
        all_seen = z.masked_fill(~seen, -1e4).logsumexp(2, keepdim=True)
        lumped = torch.cat([z.masked_fill(seen, -1e4), all_seen], 2).log_softmax(2)
        kept = F.kl_div(lumped[0], lumped[1], reduction="batchmean", log_target=True)
    return kept * (~seen).any()


def vector_of(parameters):
    """A float32 vector of zeros for all entries of the parameters, so that few operations serve hundreds of tensors.

    Returns it and its parts: for each parameter a view in its shape and memory layout.
    """
    vector = torch.zeros(sum(w.numel() for w in parameters), device=parameters[0].device)
    parts = vector.split([w.numel() for w in parameters])
    return vector, [part.as_strided(w.shape, w.stride()) for part, w in zip(parts, parameters, strict=True)]


def remember(p, fresh, memory):
    """Make p the fresh reference plus memory times p, in place. What overflowed in float16 becomes 0, in fresh too."""
    p.mul_(memory).add_(fresh.nan_to_num_(0, 0, 0))


def project(g, p, sizes):
    """Take out of g what conflicts with the reference p, in place: g - min(0, g.p) / p.p p, in each part by itself.

    g, p: float32 vectors whose parts have these sizes. Returns the cosine of g and p as they were (0 where g
    overflowed) and the share of parts that conflicted, as tensors.
    """
    products = torch.stack([g * p, p * p]).split(sizes, 1)
    gp, pp = torch.stack([part.sum(1) for part in products], 1)
    cosine = gp.sum() / (pp.sum() * (g * g).sum()).sqrt().clamp_min(1e-30)
    factors = gp.clamp_max(0) / pp.clamp_min(1e-30)  # p = 0 conflicts with nothing
    torch._foreach_addcmul_(g.split(sizes), p.split(sizes), factors.unbind(), -1)
    return cosine.nan_to_num(0, 0, 0), (gp < 0).float().mean()


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        data.check_flag("memory", args.memory, 0, 1)
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
            torch._functorch.config.donated_buffer = False  # the graph is kept for a second gradient
            model.compile()
        rates = [{"params": model.backbone.parameters(), "lr": args.backbone_lr}]
        rates += [{"params": model.head.parameters(), "lr": args.lr}]
        fused = True if device.type == "cuda" and amp is not torch.float16 else None  # float16 may skip the first step
        optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        seen = (task.seen | args.oracle).to(device)  # with images of all classes, none is unseen
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        g, g_parts = vector_of(trained)
        fresh, fresh_parts = vector_of(trained)
        memory = {"reference": [torch.zeros_like(g)]}
        sizes = [len(g)] if args.scope == "global" else [parameter.numel() for parameter in trained]
        for parameter, part in zip(trained, g_parts, strict=True):
            parameter.grad = part  # clipping and the optimizer see g

        run.start(model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, memory=memory)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range(run.steps, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                with torch.no_grad():
                    source_logits = source_model(images)
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                kept = preservation(logits, source_logits, seen, args.reference)
                torch._foreach_copy_(g_parts, torch.autograd.grad(scaler.scale(loss), trained, retain_graph=True))
                torch._foreach_copy_(fresh_parts, torch.autograd.grad(scaler.scale(kept), trained))
                (p,) = memory["reference"]
                remember(p, fresh, args.memory)
                cosine, share = project(g, p, sizes)
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images, cosine=cosine, projected=share)
            run.evaluate(epoch, model)
        run.finish(model)
