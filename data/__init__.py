"""Tasks of holistic transfer: which classes, which of them are seen, the images, and batches on the device.

    task = load_task(TaskArgs("digits", source="mnist", target="optdigits", seen_classes="5", split_seed=0))
    images, labels = task.target_train.batches(64, "cpu", seed=0)(step=0)

Images are uint8 [N, channels, H, W]; normalisation belongs to the model. Labels are int64 indices into
`task.classes`, the same in every split, whatever classes a split lacks. A data set is a dict in the file of its name:

    load(domain, root)      a Domain (see folder.py), or a tuple of its first three: images or files, labels, classes
    domains                 names, the default source and target first; or a function of the data set's folder
    only_source             a domain that can be no target
    seen                    default of --seen-classes: data, paper, or a number; half of the classes if there is none
    paper                   {source domain: published seen classes}
    about, download         what belongs where, for people; the function that fetches a domain
    augmentation, recipe, source_recipe     as in Split and Task
    recipe_for, source_recipe_for           functions that make the recipes of the number of images
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from files import InputError, take_lock

from .augmentation import change_colours, crop_resize, generator, random_affine, random_photo
from .batches import Batches, Split
from .digits import DIGITS, digits
from .domainnet import DOMAINNET
from .femnist import FEMNIST
from .flags import (
    LEAST,
    MOST,
    PoolArgs,
    TaskArgs,
    augmentation_of,
    by_recipe,
    cache_folders,
    check_flag,
    default,
    known_classes,
    read_names,
)
from .folder import FOLDER, PHOTO_RECIPE, Domain, model_as_source, plain_domains
from .glyphs import GLYPHS, glyphs
from .images import Images, open_images, pick
from .inat_fungi import INAT_FUNGI
from .iwildcam import IWILDCAM
from .office_home import OFFICE_HOME
from .splits import pseudo_task, split_domain, split_target
from .unlabelled import check_other_images, image_files, pool_concerns, read_shares, without_labels
from .vtab import VTAB

__all__ = ["LEAST", "MOST", "Batches", "PoolArgs", "Split", "TaskArgs", "by_recipe", "change_colours", "check_flag"]
__all__ += ["crop_resize", "default", "digits", "generator", "glyphs", "pool_concerns", "random_affine", "random_photo"]
__all__ += ["read_names", "read_shares"]

DATASETS = {
    "digits": DIGITS,
    "glyphs": GLYPHS,
    "office_home": OFFICE_HOME,
    "domainnet": DOMAINNET,
    "femnist": FEMNIST,
    "iwildcam": IWILDCAM,
    "vtab": VTAB,
    "inat_fungi": INAT_FUNGI,
    "folder": FOLDER,
}


@dataclass
class Task:
    """A source domain, a target domain, and the classes of which the target's training images show only some.

    classes: all C names, in the source model's order. seen: bool [C], True where target_train has images
    (with `oracle` target_train has images of every class, and `seen` still says what it would have had).
    recipe: the data set's values of the flags that the command line leaves open (architecture, epochs, rates);
    source_recipe: those of the source model's training. seen_classes: the flag's value, which chose the seen ones.
    source_train and source_test are None where the source model comes trained (CLIP, --source-checkpoint).
    target_unlabelled: images of any class, with -1 for every label, for a script that asks for them. It starts with
    target_train's and has none of target_test's, unless test_share is 0.
    """

    dataset: str
    source: str
    target: str
    classes: list
    seen: torch.Tensor
    source_train: Split | None
    source_test: Split | None
    target_train: Split
    target_test: Split
    recipe: dict
    source_recipe: dict
    seen_classes: str
    target_unlabelled: Split | None = None


def choose_seen(seen_classes, classes, present, split_seed, paper=None):
    """The seen mask, bool [C], of classes that have training images (present, bool [C]).

    seen_classes: how many (drawn by split_seed); a text file with a name per line; data, all that are present; or
    paper, the names in `paper`. Raises InputError, naming what does not exist or leaves nothing seen or unseen.
    """
    flag = f"--seen-classes {seen_classes}"
    if seen_classes.removeprefix("-").isdecimal():
        index = np.random.default_rng((split_seed, 0)).permutation(len(classes))
        count, index = int(seen_classes), index[present[index]]
        if len(index) < min(count, len(classes) - 1):
            raise InputError(f"{flag}: only {len(index)} of {len(classes)} classes have target images to train on")
        index = index[: max(count, 0)]
    elif seen_classes == "data":
        index = np.flatnonzero(present)
        count = len(index)
    else:
        if seen_classes == "paper" and paper is None:
            raise InputError(f"{flag}: no such list is published for this data set and source")
        if seen_classes != "paper" and not os.path.isfile(seen_classes):
            raise InputError(f"{flag}: neither a number nor a file with one class name per line, nor data or paper")
        names = set(paper.split() if seen_classes == "paper" else read_names(seen_classes, "--seen-classes"))
        if unknown := sorted(names - set(classes)):
            raise InputError(f"{flag}: unknown {unknown}; the classes are {', '.join(classes)}")
        index, count = np.array([classes.index(name) for name in names], np.int64), len(names)
        if absent := sorted(classes[i] for i in index if not present[i]):
            raise InputError(f"{flag}: the target has no image to train on of {', '.join(absent)}")
    if not 1 <= count < len(classes):
        raise InputError(
            f"{flag}: makes {count} of {len(classes)} classes seen; "
            f"choose 1 to {len(classes) - 1}, so that some are seen and some unseen"
        )
    seen = torch.zeros(len(classes), dtype=torch.bool)
    seen[torch.as_tensor(index)] = True
    return seen


def seen_flag(args, paper, class_count):
    """--seen-classes, or the data set's default where it is left out; half of the classes as a number."""
    value = args.seen_classes or DATASETS[args.dataset].get("seen", "half")
    if args.seen_classes is None and value == "paper" and paper is None:
        value = "half"
    return str(class_count // 2) if value == "half" else value


def home(dataset, data_root):
    """The data set's folder below --data-root; the root itself for people's own folders."""
    root = Path(data_root or os.environ.get("HT_DATA") or "datasets")
    return root if dataset == "folder" else root / dataset


def domain_names(dataset, data_root=None):
    """The data set's domains, the default source and target first. Raises InputError if there is no such data set, or
    if they must be read from files that are not there."""
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: unknown; choose from {', '.join(DATASETS)}")
    names = DATASETS[dataset]["domains"]
    return names(home(dataset, data_root)) if callable(names) else names


def targets(dataset, source, data_root=None):
    """Every domain that can be the target of this source."""
    only_source = DATASETS.get(dataset, {}).get("only_source")
    return [name for name in domain_names(dataset, data_root) if name not in (source, only_source)]


def recipes_of(args, entry, images, source_images):
    """(recipe, source_recipe) of a Task. images: the number of labelled target images of the seen classes.
    source_images: the number of images to train the source model on, None where that comes trained. The flags
    --source-steps, --source-batch-size, --source-lr and --source-backbone-lr are put into source_recipe. Raises
    InputError if they are given where the source model comes trained.
    """
    recipe = entry["recipe_for"](images) if "recipe_for" in entry else dict(entry["recipe"])
    if source_images is None:
        source_recipe = {}
    elif "source_recipe_for" in entry:
        source_recipe = entry["source_recipe_for"](source_images)
    else:
        source_recipe = entry["source_recipe"]
    given = {"steps": args.source_steps, "batch_size": args.source_batch_size}
    given |= {"lr": args.source_lr, "backbone_lr": args.source_backbone_lr}
    for name, value in given.items():
        if value is not None and name not in source_recipe:
            raise InputError(f"--source-{name.replace('_', '-')} {value}: the source model comes trained; leave it out")
    return recipe, source_recipe | {name: value for name, value in given.items() if value is not None}


def choose_domains(args, domains):
    """(source, target): the flags', else the first domain and the next. Raises InputError if one is no domain or cannot
    have its role, and where it is not clear which domain of --dataset folder is which."""
    if args.dataset == "folder":
        source, target = plain_domains(args, domains)
    else:
        source = args.source or domains[0]
        target = args.target or next((name for name in domains if name != source), "None")
    for flag, domain in (("--source", source), ("--target", target)):
        if domain not in (*domains, model_as_source(args, domains)):
            raise InputError(f"{flag} {domain}: {args.dataset} has no such domain; choose from {', '.join(domains)}")
    if source == target:
        raise InputError(f"--target {target}: is the source too; choose another of {', '.join(domains)}")
    able = targets(args.dataset, source, args.data_root)
    if target not in able:
        raise InputError(f"--target {target}: can be the source only; choose from {', '.join(able)}")
    return source, target


def load_domain(domain, args, more=(), decode=True):
    """(the Domain of this name, or None for a source without images; the Images of the files `more`, or None).
    more: paths of images that belong to no class. decode: False leaves images in files as paths, and drops `more`."""
    entry, root = DATASETS[args.dataset], home(args.dataset, args.data_root)
    if args.download:
        if "download" not in entry:
            about = entry.get("about", "It needs none.").strip()
            raise InputError(f"--download: not offered for {args.dataset}. {about}")
        lock = take_lock(root / ".download.lock", "download", wait=True)  # of several runs one downloads
        try:
            entry["download"](domain, root)
        finally:
            lock.release()
    found = entry["load"](domain, root)
    if found is None:
        return None, None
    found = Domain(*found)
    if not decode:
        return found._replace(images=np.asarray(found.images)), None
    if isinstance(found.images, list):
        usual = entry["recipe"].get("image_size", PHOTO_RECIPE["image_size"])
        size = usual if args.image_size is None else args.image_size
        name, caches = f"{args.dataset}-{domain}", cache_folders(args, root)
        fit = "crop" if (args.arch or entry["recipe"]["arch"]).startswith("clip:") else "squash"
        if more:
            check_other_images(more, [root / file for file in found.images])
        images, good = open_images(name, root, [*found.images, *more], size, caches, args.skip_bad_images, fit)
        count = np.count_nonzero(good < len(found.images))
        own, others = (images.subset(part) for part in (slice(count), slice(count, None)))
        return found.take(own, good[:count]), others if more else None
    if more:
        raise InputError(f"--unlabelled: {args.dataset} is not of image files, so no folder can add to it")
    if args.image_size is not None:
        raise InputError(f"--image-size {args.image_size}: the images of {domain} have one size; leave the flag out")
    return found, None


def make_split(domain, index, augmentation):
    """The Split of the images `index` of a Domain."""
    images, labels = pick(domain.images, index), torch.from_numpy(domain.labels[index])
    images = images if isinstance(images, Images) else torch.from_numpy(images)
    return Split(images, labels, augmentation, pick(domain.group, index))


def source_splits(domain, augmentation):
    """The training and the test Split of the source's Domain, always the same; (None, None) if there are no images."""
    if domain is None:
        return None, None
    index = split_domain(domain, 0.9, np.random.default_rng(0), keep_single=True)
    return [make_split(domain, part, augmentation) for part in index]


def load_task(args, pool=False):
    """The Task that the flags describe: a TaskArgs, or the arguments of a script, which hold them too.

    The target's images are split as published or else 7:3 within each class by `split_seed`, which also draws the seen
    classes; the source's as published or else 9:1, always the same way. With test_share 0 the target's test images are
    its training images, the same Split. pool: ask for target_unlabelled, see unlabelled.py; args.unlabelled says which.
    Raises InputError on anything that does not exist, and on a target class that the source does not know, unless
    ignore_unknown_classes leaves its images out.
    """
    domains = domain_names(args.dataset, args.data_root)
    if args.split_seed < 0:
        raise InputError(f"--split-seed {args.split_seed}: must be 0 or more")
    entry = DATASETS[args.dataset]
    source, target = choose_domains(args, domains)
    named = known_classes(args)
    trained = args.source_checkpoint is not None  # of the source's images only the classes have a part then
    whole = load_domain(source, args, decode=not trained)[0] if source in domains else None
    more = image_files(args.unlabelled, home(args.dataset, args.data_root) / target) if pool else ()
    here, others = load_domain(target, args, more)
    classes = whole.classes if whole and not args.classes else named or here.classes
    whole = whole and relabel(whole, classes, f"--source {source}", args.ignore_unknown_classes)
    here = relabel(here, classes, f"--target {target}", args.ignore_unknown_classes)
    train, test = split_target(here, target, args.split_seed, args.test_share)
    present = np.isin(np.arange(len(classes)), here.labels[train])
    paper = entry.get("paper", {}).get(source)
    seen_classes = seen_flag(args, paper, len(classes))
    seen = choose_seen(seen_classes, classes, present, args.split_seed, paper)
    labelled = train[seen.numpy()[here.labels[train]]]
    if args.oracle and not (present & ~seen.numpy()).any():
        raise InputError(f"--oracle: the target {target} has training images of the seen classes only")
    augmentation = augmentation_of(args, entry["augmentation"])
    used = train if args.oracle else labelled
    splits = [*source_splits(None if trained else whole, augmentation), make_split(here, used, augmentation)]
    splits += [make_split(here, test, augmentation) if len(test) else splits[-1]]
    recipes = recipes_of(args, entry, len(labelled), splits[0] and len(splits[0].labels))  # an oracle trains as long
    task = Task(args.dataset, source, target, classes, seen, *splits, *recipes, seen_classes)
    if pool:
        order = used if args.unlabelled else np.concatenate([used, np.setdiff1d(train, used)])
        task.target_unlabelled = without_labels(make_split(here, order, augmentation), others)
    return task if args.pseudo_split is None else pseudo_task(task, args.split_seed, args.pseudo_split)


def relabel(domain, classes, flag, ignore_unknown):
    """The Domain with its labels as indices into `classes`, by class name, without images of classes not among them."""
    if domain.classes == classes:
        return domain
    ids = {label: i for i, label in enumerate(classes)}
    unknown = [label for label in domain.classes if label not in ids]
    if unknown and not ignore_unknown:
        raise InputError(
            f"{flag}: the source does not know its class{'es' * (len(unknown) > 1)} {', '.join(unknown)}; "
            "--ignore-unknown-classes leaves those images out"
        )
    labels = np.array([ids.get(label, -1) for label in domain.classes], np.int64)[domain.labels]
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        raise InputError(f"{flag}: none of its images is of a class of the source")
    return domain._replace(labels=labels, classes=classes).take(pick(domain.images, kept), kept)
