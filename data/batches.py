"""Shuffled and augmented batches on the device, each a function of (seed, step) alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from files import InputError

from .augmentation import generator, random_affine, random_photo
from .images import Images, pick


def upload(images, device):
    """All images on the device, uint8 [N, c, H, W], channels-last: a block at a time, so never twice in its memory."""
    try:
        whole = torch.empty(images.shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
        for start in range(0, len(images), 512):
            whole[start : start + 512].copy_(images[start : start + 512])
    except RuntimeError as error:  # of an accelerator, and of the system's memory, which has no name of its own
        raise InputError(
            f"--resident on: {images.shape.numel() / 1e9:.1f} GB of images do not fit into the memory of {device}; "
            "pass --resident off"
        ) from error
    return whole


class Batches:
    """Endless shuffled and augmented batches. `batches(step)` depends on (seed, step) alone, whatever the device, so a
    run that died goes on at any step, and two methods with one seed train on the same images in the same order.

    `len(batches)` is the number of steps in one pass over the images. A pass leaves out the images that fill no batch,
    each pass others. Raises InputError if there are fewer images than one batch.

    resident: "on" keeps all images on the device, "off" does not, "auto" does on a CUDA device where they take at most
    half of its free memory. If they are not kept there, a thread reads each batch one step ahead, unless the images are
    a tensor and the device is the CPU. A batch goes to a CUDA device from pinned memory, on a stream of its own.
    """

    def __init__(self, split, batch_size, device, seed, augment=True, resident="auto"):
        if not 1 <= batch_size <= len(split.labels):
            raise InputError(
                f"--batch-size {batch_size}: the training set has {len(split.labels)} images; choose 1 to that many"
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.device, self.augment = torch.device(device), augment
        self.order, self.order_of = None, None
        self.images, self.labels, self.reader, self.stream, self.ahead = split.images, split.labels, None, None, None
        on_cuda, in_memory = self.device.type == "cuda", isinstance(split.images, torch.Tensor)
        if resident == "auto" and on_cuda:
            fits = 2 * split.images.shape.numel() <= torch.cuda.mem_get_info(self.device)[0]
            resident = "on" if fits else "off"
        if resident == "on":
            self.images, self.labels = upload(split.images, self.device), split.labels.to(self.device)
        elif not in_memory or self.device.type != "cpu":
            self.reader = ThreadPoolExecutor(1, "read ahead")
            self.stream = torch.cuda.Stream(self.device) if on_cuda else None

    def __len__(self):
        return len(self.split.labels) // self.batch_size

    def index(self, step, classes):
        """Which images the batch is made of, int64 [batch_size], where self.images is."""
        if classes is not None:
            pool = torch.nonzero(classes[self.split.labels]).flatten()
            rng = generator("cpu", self.seed, 2, step)
            index = pool[torch.randint(len(pool), (self.batch_size,), generator=rng)]
            return index.to(self.labels.device, non_blocking=True)
        epoch, i = divmod(step, len(self))
        if self.order_of != epoch:
            rng = generator("cpu", self.seed, 0, epoch)
            self.order = torch.randperm(len(self.split.labels), generator=rng).to(self.labels.device)
            self.order_of = epoch
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]

    def read(self, index):
        """uint8 images and labels of an index, on the device."""
        images, labels = self.images[index].contiguous(memory_format=torch.channels_last), self.labels[index]
        if self.stream is None:
            return images.to(self.device), labels.to(self.device)
        with torch.cuda.stream(self.stream):
            return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in (images, labels))

    def read_ahead(self, step, classes):
        """What read gives for a step; by then the next step's is on its way."""
        index = self.index(step, classes)
        if self.ahead is None or not torch.equal(self.ahead[0], index):
            self.ahead = index, self.reader.submit(self.read, index)
        batch = self.ahead[1].result()
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)
            for tensor in batch:
                tensor.record_stream(now)
        coming = self.index(step + 1, classes)  # with other classes it is read for nothing
        self.ahead = coming, self.reader.submit(self.read, coming)
        return batch

    def __call__(self, step, classes=None):
        """images float [batch_size, c, H, W] in [0, 1], channels-last, and labels int64, both on the device. With a
        mask classes, bool [C], they are drawn from the images of those classes, with replacement."""
        images, labels = self.read_ahead(step, classes) if self.reader else self.read(self.index(step, classes))
        images = images.float() / 255
        if self.augment and self.split.augmentation:
            change = random_photo if "crop" in self.split.augmentation else random_affine
            images = change(images, generator("cpu", self.seed, 1, step), **self.split.augmentation)
        return images.contiguous(memory_format=torch.channels_last), labels


@dataclass
class Split:
    """images: uint8 [N, c, H, W], a tensor, or Images in a cache file. labels: int64 [N]. augmentation: the arguments
    of `random_affine`, or of `random_photo` where "crop" is one, for training on them. group: int [N], equal for images
    that must stay on one side of a split, or None."""

    images: torch.Tensor | Images
    labels: torch.Tensor
    augmentation: dict
    group: np.ndarray | None = None

    def take(self, index):
        """The Split of the images `index`, int64 [n], a numpy array."""
        return Split(pick(self.images, index), self.labels[index], self.augmentation, pick(self.group, index))

    def batches(self, batch_size, device, seed, augment=True, resident="auto"):
        """See Batches."""
        return Batches(self, batch_size, device, seed, augment, resident)
