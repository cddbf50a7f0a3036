"""HT-distill: fine-tuning that keeps what the source model knows about the unseen classes.

Holistic transfer (NeurIPS 2023, arXiv 2311.01420) preserves class relationships by selective distillation and by
feature rank. Per batch of target images, all of seen classes, teacher and student on the same augmented view:

    loss = CE + distill_weight * T^2 * KL(teacher || student) + rank_weight * decorrelation

Differs from the paper: the KL is taken over |U| + 1 outcomes, the unseen classes U and all seen ones lumped into one
(ours; --distill unseen is the paper's, --distill all is LwF, arXiv 1606.09282), so U cannot sink as a whole, and CE
compares seen logits only. Weights are ours. The paper's form, as far as it is known:

    python methods/ht_distill.py --ce all --distill unseen --distill-weight 1 --rank-weight 0.1
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
from eval import Run, predict


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
    ce: Literal["auto", "all", "seen"] = "auto"
    """logits that cross-entropy compares; auto: seen, but all where no distillation ties seen to unseen"""
    distill: Literal["lumped", "unseen", "all"] = "lumped"
    """outcomes of the distillation: unseen classes and all seen as one; unseen classes; all classes"""
    distill_weight: float = 0.3
    """weight of the distillation term"""
    temperature: float = 1.0
    """softens teacher and student"""
    rank_weight: float = 0.0
    """weight of the decorrelation term"""


def distillation(logits, teacher_logits, seen, outcomes, temperature):
    """T^2 KL(teacher || student), mean over the batch, for logits [N, C] and seen bool [C]; see Args.distill."""

    def log_probabilities(z):
        z = z / temperature
        if outcomes == "lumped":
            z = torch.cat([z[:, ~seen], z[:, seen].logsumexp(1, keepdim=True)], 1)
        return F.log_softmax(z[:, ~seen] if outcomes == "unseen" else z, 1)

    student, teacher = log_probabilities(logits), log_probabilities(teacher_logits)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def decorrelation(features):
    """Mean squared correlation of two different features over the batch [N, D] (FedDecorr, arXiv 2210.00226)."""
    z = (features - features.mean(0)) / (features.std(0, unbiased=False) + 1e-6)  # a dead feature stays 0
    squares = (z.T @ z / len(z)).square()
    return (squares.sum() - squares.diagonal().sum()) / (z.shape[1] * (z.shape[1] - 1))


def effective_rank(features):
    """exp of the entropy of the normalised singular values of features [N, D]: from 1 to min(N, D)."""
    share = torch.linalg.svdvals(torch.as_tensor(features))
    share = share[share > 0] / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with Run(__file__, args) as run:
        device, amp = models.device_and_amp(args.device, args.amp)
        task = data.load_task(
            args.dataset, args.source, args.target, args.seen_classes, args.split_seed, args.oracle, args.data_root
        )
        args = run.open(task)
        batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment)
        source_model = models.source_model(
            task, args.arch, device, amp, args.weights, args.source_checkpoint, args.source_seed, args.runs_dir
        )
        torch.manual_seed(args.seed)
        model = copy.deepcopy(source_model)
        if args.compile:
            model.compile()
        rates = [{"params": model.backbone.parameters(), "lr": args.backbone_lr}, {"params": model.head.parameters()}]
        optimizer = torch.optim.SGD(rates, args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        seen = (task.seen | args.oracle).to(device)  # with images of all classes, none is unseen
        masked = args.ce == "seen" or (args.ce == "auto" and args.distill_weight > 0)
        outside_ce = ~seen if masked else torch.zeros_like(seen)

        def rank(model):
            return effective_rank(predict(model, task.target_train.images, return_features=True)[1])

        run.evaluate(0, model, effective_rank=rank(model))
        if run.source_train_accuracy < 50:
            print(f"warning: a weak teacher, {run.source_train_accuracy:.1f} % on the target's training images")
        for epoch in range(1, args.epochs + 1):
            model.train()
            for layer in models.batchnorms(model):
                layer.train(args.bn_mode == "train")
            for step in range((epoch - 1) * args.steps_per_epoch, epoch * args.steps_per_epoch):
                images, labels = batches(step)
                logits, features = model(images, return_features=True)
                loss = F.cross_entropy(logits.masked_fill(outside_ce, -torch.inf), labels)
                if args.distill_weight:
                    with torch.no_grad():
                        teacher_logits = source_model(images)
                    kl = distillation(logits, teacher_logits, seen, args.distill, args.temperature)
                    loss = loss + args.distill_weight * kl
                if args.rank_weight:
                    loss = loss + args.rank_weight * decorrelation(features)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                run.step(loss, images)
            run.evaluate(epoch, model, effective_rank=rank(model))
        run.finish(model)
