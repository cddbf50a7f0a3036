"""LOLSGD: leave some seen classes out, in several copies, and average the copies: what they share is the domain.

Rounds: each of M copies takes tau SGD steps on images of a random subset of the seen classes, and the round's result is
their average. What differs between subsets is class-specific and cancels (holistic transfer, NeurIPS 2023, arXiv
2311.01420). The step budget counts the steps of all copies; as many whole rounds as fit are run, at least one.

The paper's cross-entropy is over all C logits; --ce subset and --ce seen, masking as in masked_ft, are ours, and so are
M, tau and the left-out share. Momentum starts anew in each copy. The paper combines it with its distillation, rank and
frozen head: --relations-weight 1 --rank-weight 0.1 --freeze-head, weights ours.

    python methods/lolsgd.py    # overall 81.0 ± 3.1, unseen 63.4 on mnist to optdigits, ten splits
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
    copies: int = 4  # M, copies per round
    tau: int = 5  # steps of a copy per round
    left_out: float = 0.2  # share of the seen classes that a copy does without
    ce: Literal["all", "seen", "subset"] = "all"  # whose logits cross-entropy compares: all, the seen, the copy's
    relations_weight: float = 0.0  # of the paper's distillation, see ht_distill
    rank_weight: float = 0.0  # of the decorrelation of features, see ht_distill
    freeze_head: bool = False  # keep the source model's head


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


def draw_classes(seen, left_out, rng):
    """A random subset, bool [C], of the classes in seen without the share left_out; two remain, if there are."""
    classes = torch.nonzero(seen).flatten()
    order = torch.randperm(len(classes), generator=rng)
    count = max(2, round(len(classes) * (1 - left_out)))
    kept = torch.zeros_like(seen)
    kept[classes[order[:count]]] = True
    return kept


def relations(logits, source_logits, seen):
    """KL inside the unseen classes, mean over images: blind to a constant on all their logits. seen: bool [C]."""
    z, source_z = (x.masked_fill(seen, -1e4).log_softmax(1) for x in (logits, source_logits))
    return F.kl_div(z, source_z, reduction="batchmean", log_target=True)


def rank(features):
    """Mean squared correlation of two features [N, D] (FedDecorr, arXiv 2210.00226): small where their rank is high."""
    z = (features - features.mean(0)) / (features.std(0, unbiased=False) + 1e-6)  # a dead feature stays 0
    return (z.T @ z / len(z)).fill_diagonal_(0).square().sum() / (z.shape[1] * (z.shape[1] - 1))


@torch.no_grad()
def end_copy(weights, start):
    """How far a copy has moved from start, a list of tensors; puts its weights back there for the next copy."""
    moved = [w - w0 for w, w0 in zip(weights, start, strict=True)]
    torch._foreach_copy_(weights, start)
    return moved


@torch.no_grad()
def end_round(weights, moved):
    """Move the weights by the mean of the copies' movements, a list for each copy.

    Returns how far the copies part: the root of mean |moved_m - mean|^2 over |mean|^2.
    """
    mean = [torch.stack(of_copies).mean(0) for of_copies in zip(*moved, strict=True)]
    torch._foreach_add_(weights, mean)
    lengths = sum(tensor.square().sum() for copy_moved in moved for tensor in copy_moved) / len(moved)
    return (lengths / sum(tensor.square().sum() for tensor in mean) - 1).clamp_min(0).sqrt()


if __name__ == "__main__":
    args = runs.parse(Args)
    with runs.Run(__file__, args) as run:
        for flag, least in (("copies", 1), ("tau", 1), ("relations_weight", 0), ("rank_weight", 0)):
            data.check_flag(flag, getattr(args, flag), least)
        data.check_flag("left_out", args.left_out, 0, 1)
        task = data.load_task(args)
        args = run.open(task)
        models.tune_process()
        device, amp = models.choose_device(args.device, args.amp, args.arch)
        batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment, args.resident)
        start = args.weights, args.source_checkpoint, args.source_seed
        source_model = models.source_model(task, args.arch, device, amp, *start, args.runs_dir, run.stop, args.resident)
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
        model.head.requires_grad_(not args.freeze_head)
        if args.compile:
            model.compile()
        rates = [{"params": model.backbone.parameters(), "lr": args.backbone_lr}]
        rates += [{"params": model.head.parameters(), "lr": args.lr}]
        fused = True if device.type == "cuda" and amp is not torch.float16 else None  # float16 may skip the first step
        optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=fused)
        round_steps = args.tau * args.copies
        rounds = max(1, args.epochs * args.steps_per_epoch // round_steps)  # the cosine ends with the last
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds * round_steps)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        # weights and BatchNorm's statistics: what is averaged
        weights = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        seen = task.seen | args.oracle  # with images of all classes, none is unseen
        draws = [data.generator("cpu", args.seed, 4, m) for m in range(rounds * args.copies)]
        shown = torch.bincount(task.target_train.labels, minlength=len(seen)) > 0  # an oracle's target may lack some
        subsets = torch.stack([draw_classes(shown, args.left_out, rng) for rng in draws])
        compared = {"all": torch.ones_like(subsets), "seen": seen.expand_as(subsets), "subset": subsets}[args.ce]
        compared, seen = compared.to(device), seen.to(device)
        state = {}  # of the round under way: the weights at its start, and the movement of each copy

        run.start(model)
        run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, state=state)
        for epoch in range(run.epoch, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            rounds_by_now = epoch * rounds // args.epochs
            for step in range(run.steps, rounds_by_now * round_steps):
                number = step // args.tau  # of the copy
                if step % round_steps == 0:
                    state["start"] = [tensor.clone() for tensor in weights]
                if step % args.tau == 0:
                    optimizer.state.clear()  # a copy starts without momentum
                images, labels = batches(step, subsets[number])
                logits, features = model(images, return_features=True)
                loss = F.cross_entropy(logits.masked_fill(~compared[number], -torch.inf), labels)
                if args.relations_weight:
                    with torch.no_grad():
                        source_logits = source_model(images)
                    loss += args.relations_weight * relations(logits, source_logits, seen)
                if args.rank_weight:
                    loss += args.rank_weight * rank(features)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                spread = {}
                if (step + 1) % args.tau == 0:
                    state[f"copy{number % args.copies}"] = end_copy(weights, state["start"])
                if (step + 1) % round_steps == 0:
                    moved = [state[f"copy{m}"] for m in range(args.copies)]
                    spread["spread"] = end_round(weights, moved)
                run.step(loss, images, **spread)
            run.evaluate(epoch, model)
        run.finish(model)
