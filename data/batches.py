"""Shuffled and augmented batches on the device, each a function of (seed, step) alone."""

from dataclasses import dataclass

import torch

from eval import InputError

from .augmentation import generator, random_affine, random_photo
from .images import Images


class Batches:
    """Endless shuffled and augmented batches. `batches(step)` depends on (seed, step) alone, so a run that
    died goes on at any step, and two methods with one seed train on the same images in the same order.

    `len(batches)` is the number of steps in one pass over the images; the rest that fills no batch is left
    out of this pass, another rest of the next. Raises InputError if there are fewer images than one batch.
    """

    def __init__(self, split, batch_size, device, seed, augment=True):
        if not 1 <= batch_size <= len(split.labels):
            raise InputError(
                f"--batch-size {batch_size}: the training set has {len(split.labels)} images; choose 1 to that many"
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.device, self.augment = torch.device(device), augment
        self.order, self.order_of = None, None

    def __len__(self):
        return len(self.split.labels) // self.batch_size

    def __call__(self, step, classes=None):
        """images float [batch_size, c, H, W] in [0, 1], channels-last, and labels int64, both on the device. With a
        mask classes, bool [C], they are drawn from the images of those classes, with replacement."""
        labels = self.split.labels
        epoch, i = divmod(step, len(self))
        if classes is not None:
            pool = torch.nonzero(classes[labels]).flatten()
            index = pool[torch.randint(len(pool), (self.batch_size,), generator=generator("cpu", self.seed, 2, step))]
        else:
            if self.order_of != epoch:
                self.order = torch.randperm(len(labels), generator=generator("cpu", self.seed, 0, epoch))
                self.order_of = epoch
            index = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        images = self.split.images[index].to(self.device, memory_format=torch.channels_last).float() / 255
        if self.augment and self.split.augmentation:
            change = random_photo if "crop" in self.split.augmentation else random_affine
            images = change(images, generator(self.device, self.seed, 1, step), **self.split.augmentation)
        return images.contiguous(memory_format=torch.channels_last), labels[index].to(self.device)


@dataclass
class Split:
    """images uint8 [N, c, H, W] (a tensor, or Images in a cache file), labels int64 [N], and the arguments of
    `random_affine`, or of `random_photo` where "crop" is one, for training on them."""

    images: torch.Tensor | Images
    labels: torch.Tensor
    augmentation: dict

    def batches(self, batch_size, device, seed, augment=True):
        """See Batches."""
        return Batches(self, batch_size, device, seed, augment)
