"""Which images are for training and which for testing."""

from dataclasses import replace

import numpy as np
import torch

from files import InputError


def split_by_class(labels, share, rng):
    """Indices of a random floor(share * n) images of every class, and of the rest. labels int [N]."""
    first, rest = [], []
    for label in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == label))
        cut = int(share * len(index) + 1e-9)
        first.append(index[:cut])
        rest.append(index[cut:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(rest))


def split_by_group(group, share, rng):
    """Indices of the images of a random floor(share * n) of the n groups, and of the rest. group int [N]."""
    groups = rng.permutation(np.unique(group))
    first = np.isin(group, groups[: int(share * len(groups) + 1e-9)])
    return np.flatnonzero(first), np.flatnonzero(~first)


def split_domain(domain, share, rng, keep_single=False):
    """(training indices, test indices) of a Domain: its published split, or `share` of its groups, or of every class.
    keep_single: the only image of a class is for training."""
    if domain.test is not None:
        return np.flatnonzero(~domain.test), np.flatnonzero(domain.test)
    if domain.group is not None:
        return split_by_group(domain.group, share, rng)
    train, test = split_by_class(domain.labels, share, rng)
    if keep_single:
        single = test[np.bincount(domain.labels)[domain.labels[test]] == 1]
        train, test = np.union1d(train, single), np.setdiff1d(test, single)
    return train, test


def split_target(domain, name, split_seed, test_share=None):
    """(training indices, test indices) of the target's Domain, drawn by split_seed. test_share: of the images that are
    not split as published, 0.3 if None; with 0 all are for training. Raises InputError where the images have a
    split already, and where none is left to test on."""
    if test_share is not None and domain.test is not None:
        raise InputError(f"--test-share {test_share}: {name} has a split of its own; leave the flag out")
    share = 0.3 if test_share is None else test_share
    train, test = split_domain(domain, 1 - share, np.random.default_rng((split_seed, 1)))
    if share and not len(test):
        raise InputError(f"--target {name}: no image is left to test on")
    return train, test


def pseudo_task(task, split_seed, number):
    """The task that PCV calibration (arXiv 2409.16223) adapts to: 40 % of the seen classes (ours) play the
    unseen ones, the test images are 30 % of the training images, and truly unseen classes have none.

    Runs 0, 1, 2 ... leave out one class after the other in an order drawn by split_seed, so each gets its turn.
    Images of one group stay together: 30 % of the groups are for testing, and a class that only they show plays an
    unseen one too. Raises InputError for a negative number, with --oracle, and if there are not two classes or groups.
    """
    split = task.target_train
    labels = split.labels.numpy()
    classes = np.unique(labels)
    if number < 0 or not task.seen.numpy()[classes].all() or len(classes) < 2:
        raise InputError(
            f"--pseudo-split {number}: must be 0 or more, without --oracle, and with two seen classes at least"
        )
    count = min(max(1, round(0.4 * len(classes))), len(classes) - 1)
    order = np.random.default_rng((split_seed, 2)).permutation(classes)
    seen = task.seen.numpy().copy()
    seen[np.take(order, np.arange(number * count, (number + 1) * count), mode="wrap")] = False
    rng = np.random.default_rng((split_seed, 3, number))
    if split.group is None:
        train, test = split_by_class(labels, 0.7, rng)
    else:
        train, test = split_by_group(split.group, 0.7, rng)
    seen &= np.isin(np.arange(len(seen)), labels[train])
    shown = train[seen[labels[train]]]
    if not len(shown):
        raise InputError(f"--pseudo-split {number}: no image is left to train on; take another --split-seed")
    pool = task.target_unlabelled
    if pool is not None:  # its first images are target_train's: those for testing leave it, too
        rest, more = np.setdiff1d(train, shown), np.arange(len(labels), len(pool.labels))
        if pool.group is not None:
            more = more[~np.isin(pool.group[more], split.group[test])]
        pool = pool.take(np.concatenate([shown, rest, more]))
    parts = {"target_train": split.take(shown), "target_test": split.take(test), "target_unlabelled": pool}
    return replace(task, seen=torch.from_numpy(seen), **parts)
