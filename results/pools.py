"""Pools of unlabelled images that are not kind: what a script that takes a pool makes of them.

    python results/pools.py tail methods/infomax.py --name infomax_tail --split-seed 3

runs the script with a pool of this KIND in place of the target's training images of every class:

    tail        the classes in a random order, each with fewer images than the one before, the last with a fiftieth
    unseen10    images of unseen classes are 10 % of the pool
    noseen      no image of a seen class
    unknown10   10 % are of classes that the source does not know: letters among digits (digits only)
    unknown30   30 %
    tiny        20 images
    turned      all are turned by 25 degrees: a slightly other domain

With `--prior pool` the script is given the pool's true shares. Nothing else is made with labels of unseen classes.
"""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from benchmark import flag_values

KINDS = ("tail", "unseen10", "noseen", "unknown10", "unknown30", "tiny", "turned")


def chosen(kind, labels, seen, rng):
    """Indices of the images of a pool of this kind. labels: int [N]. seen: bool [C]. Both numpy arrays."""
    order = rng.permutation(len(labels))
    of_seen = seen[labels[order]]
    if kind == "tiny":
        return order[:20]
    if kind == "noseen":
        return order[~of_seen]
    if kind == "unseen10":
        return np.concatenate([order[of_seen], order[~of_seen][: of_seen.sum() // 9]])
    if kind == "tail":
        kept = []
        for rank, label in enumerate(rng.permutation(len(seen))):
            own = order[labels[order] == label]
            kept.append(own[: max(1, round(len(own) * 50 ** (-rank / (len(seen) - 1))))])
        return np.concatenate(kept)
    return order


def letters(count, rng):
    """uint8 [count, 1, 28, 28]: letters of the font serif, which are no digits."""
    images, labels, classes = data.glyphs("serif")
    index = np.flatnonzero([classes[label].isalpha() for label in labels])
    return torch.from_numpy(images[rng.choice(index, count)])


def turned(images, degrees=25.0):
    """uint8 [N, c, H, W] turned about the middle; what comes in from outside is black."""
    angle = torch.tensor(np.deg2rad(degrees), dtype=torch.float32)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turn = F.pad(turn, (0, 1)).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().byte()


def unkind(kind, split, seen, seed):
    """(A Split without labels, the shares of the classes in it) made of a Split of all classes with labels."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    index = chosen(kind, split.labels.numpy(), seen.numpy(), rng)
    images = split.images[torch.from_numpy(index)]
    if kind.startswith("unknown"):
        share = int(kind.removeprefix("unknown")) / 100
        images = torch.cat([images, letters(round(len(images) * share / (1 - share)), rng)])
    if kind == "turned":
        images = turned(images)
    counts = torch.bincount(split.labels[torch.from_numpy(index)], minlength=len(seen))
    return data.Split(images, torch.full((len(images),), -1), split.augmentation), counts


def main(kind, script, *flags):
    if "--name" not in flag_values(flags):  # its run is not the script's
        flags = (*flags, "--name", f"{Path(script).stem}_{kind}")
    load_task, read_shares, counts = data.load_task, data.read_shares, {}

    def load(args, pool=False):
        task = load_task(args, pool)
        if pool:
            whole = load_task(dataclasses.replace(args, oracle=True))
            task.target_unlabelled, counts["pool"] = unkind(kind, whole.target_train, whole.seen, args.split_seed)
        return task

    def read(path, *others):
        return counts[path] / counts[path].sum() if path in counts else read_shares(path, *others)

    data.load_task, data.read_shares = load, read
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in KINDS:
        raise SystemExit(f"python results/pools.py {'|'.join(KINDS)} SCRIPT FLAGS...")
    main(*sys.argv[1:])
