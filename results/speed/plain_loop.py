"""The loop everybody writes, to be compared with: ImageFolder, DataLoader workers, PIL transforms, float32, NCHW.

    python results/speed/plain_loop.py TRAIN TEST --arch resnet50 --epochs 2 --steps-per-epoch 8

TRAIN and TEST are folders CLASS/*.jpg. The model, the recipe and the evaluations are those of methods/naive_ft.py. It
prints a line of JSON per epoch: images and seconds of training and of evaluation, and the accuracy. It is not a method.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
import models


@dataclass
class Args:
    train: tyro.conf.Positional[Path]
    """folder of training images"""
    test: tyro.conf.Positional[Path]
    """folder of test images"""
    arch: str = "resnet50"
    """as in methods/naive_ft.py"""
    classes: int = 10
    """outputs of the model"""
    image_size: int = 224
    """side of the squares"""
    augmentation: Literal["photo", "ink"] = "photo"
    """that of photographs, or of digits (gray images)"""
    batch_size: int = 32
    """images per step, and per batch of an evaluation"""
    epochs: int = 2
    """evaluations after the first"""
    steps_per_epoch: int = 8
    """steps between two evaluations"""
    lr: float = 1e-3
    """of all parameters, cosine schedule to 0"""
    bn_mode: Literal["eval", "train"] = "train"
    """BatchNorm while training"""
    workers: int = 2
    """processes that decode"""
    device: str = "cpu"
    """cpu or cuda"""


def loader(folder, args, training):
    """Batches of a folder: shuffled and augmented for training, in order for a test."""
    if args.augmentation == "ink":
        change = [T.Grayscale()]
        change += [T.RandomAffine(15, translate=(0.08, 0.08), scale=(0.85, 1.15), shear=8.5)] * training
    elif training:
        change = [T.RandomResizedCrop(args.image_size, (0.7, 1)), T.RandomHorizontalFlip()]
        change += [T.ColorJitter(0.3, 0.3, 0.3, 0.3), T.RandomGrayscale(0.1)]
    else:
        change = [T.Resize((args.image_size, args.image_size))]
    images = ImageFolder(folder, T.Compose([*change, T.ToTensor()]))
    how = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "pin_memory": args.device != "cpu"}
    return DataLoader(images, args.batch_size, shuffle=training, drop_last=training, **how)


@torch.no_grad()
def accuracy(model, test, device):
    """Top-1 in %, the number of images and the seconds it took."""
    start, right, count = time.perf_counter(), 0, 0
    model.eval()
    for images, labels in test:
        right += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        count += len(labels)
    return 100 * right / count, count, time.perf_counter() - start


if __name__ == "__main__":
    args = tyro.cli(Args)
    start = time.perf_counter()
    train, test = loader(args.train, args, True), loader(args.test, args, False)
    channels = 1 if args.augmentation == "ink" else 3
    model = models.build(args.arch, args.classes, (channels, args.image_size, args.image_size), "none").to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
    batches = itertools.chain.from_iterable(itertools.repeat(train))
    score, count, seconds = accuracy(model, test, args.device)
    print(json.dumps({"epoch": 0, "test": score, "test_images": count, "test_seconds": seconds}), flush=True)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for layer in models.batchnorms(model):
            layer.train(args.bn_mode == "train")
        before = time.perf_counter()
        for _ in range(args.steps_per_epoch):
            images, labels = next(batches)
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            loss.item()  # for the progress bar
        seconds = time.perf_counter() - before
        line = {"epoch": epoch, "train_images": args.steps_per_epoch * args.batch_size, "train_seconds": seconds}
        score, count, seconds = accuracy(model, test, args.device)
        line |= {"test": score, "test_images": count, "test_seconds": seconds}
        print(json.dumps(line | {"seconds": time.perf_counter() - start}), flush=True)
