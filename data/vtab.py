"""`vtab`: CLIP's zero-shot classifier, adapted to one of eight data sets. There are no source images."""

import numpy as np

from files import InputError

from .download import fetch, unpack
from .folder import PHOTO_RECIPE, PHOTOGRAPHS, Domain, class_tree, entries, named, need

# Which splits the paper takes is not known to us. Published ones here: cifar100, dtd (its first), flowers102 and pets,
# training and validation images together. Ours, 7:3 within each class by --split-seed: caltech101, eurosat, sun397 and
# resisc45. Class names are those of the published files and folders; flowers102 has numbers only, see flower_names.py.
PLACES = {  # where torchvision puts the images; caltech101 has a class BACKGROUND_Google, as published
    "cifar100": "cifar-100-python",
    "caltech101": "caltech101/101_ObjectCategories",
    "dtd": "dtd/dtd",
    "eurosat": "eurosat/2750",
    "flowers102": "flowers-102/jpg",
    "pets": "oxford-iiit-pet/images",
    "sun397": "SUN397",
    "resisc45": "resisc45",
}
ROBOTS = "https://www.robots.ox.ac.uk/~vgg/data/"
FLOWERS, PETS = f"{ROBOTS}flowers/102/", f"{ROBOTS}pets/data/"
CIFAR = "https://www.cs.toronto.edu/~kriz/"
CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/"
EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
SUN = "http://vision.princeton.edu/projects/2010/SUN/"
ARCHIVES = {  # for --download: address, md5, what it becomes
    "cifar100": [(f"{CIFAR}cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")],
    "caltech101": [(f"{CALTECH}caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0", "caltech101/caltech-101")],
    "dtd": [(f"{ROBOTS}dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd/dtd")],
    "eurosat": [(f"{EUROSAT}EuroSAT.zip", "c8fa014336c82ac7804f0398fcb19387", "eurosat/2750")],
    "flowers102": [
        (f"{FLOWERS}imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "flowers-102/imagelabels.mat"),
        (f"{FLOWERS}setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102/setid.mat"),
        (f"{FLOWERS}102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "flowers-102/jpg"),
    ],
    "pets": [
        (f"{PETS}annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet/annotations"),
        (f"{PETS}images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet/images"),
    ],
    "sun397": [(f"{SUN}SUN397.tar.gz", "8ca2778205c41d23104230ba66911c7a", "SUN397")],
}
ADDRESSES = {name: archives[-1][0] for name, archives in ARCHIVES.items()}
ABOUT = f"""
VTAB's sets lie below --data-root in vtab/, each as torchvision unpacks it:
{chr(10).join(f"    vtab/{place:32} {ADDRESSES.get(name, '')}" for name, place in PLACES.items())}
--download fetches and unpacks the target's. RESISC45 has no stable address: https://gcheng-nwpu.github.io, then
vtab/resisc45/CLASS/*.jpg. Largest: sun397, 37 GB.
"""


def cifar100(root):
    """Read by torchvision, which compares the files with the published ones before it unpickles them."""
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(root, part) for part in (True, False))
    except RuntimeError as error:
        raise InputError(f"{root / PLACES['cifar100']}: other files than CIFAR-100's") from error
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.array(train.targets + test.targets, np.int64)
    return Domain(images, labels, train.classes, np.arange(len(labels)) >= len(train.targets))


def dtd(root):
    lines = {part: (root / f"dtd/dtd/labels/{part}1.txt").read_text().split() for part in ("train", "val", "test")}
    names = [line for part in lines.values() for line in part]
    test = np.arange(len(names)) >= len(names) - len(lines["test"])
    return named([f"dtd/dtd/images/{name}" for name in names], [name.split("/")[0] for name in names], test=test)


def flowers102(root):
    from scipy.io import loadmat

    from .flower_names import NAMES

    labels = loadmat(root / "flowers-102/imagelabels.mat", squeeze_me=True)["labels"].astype(np.int64) - 1
    split = loadmat(root / "flowers-102/setid.mat", squeeze_me=True)
    train, test = np.concatenate([split["trnid"], split["valid"]]), split["tstid"]
    ids = np.concatenate([train, test]).astype(np.int64)
    files = [f"flowers-102/jpg/image_{i:05d}.jpg" for i in ids]
    return Domain(files, labels[ids - 1], NAMES, np.arange(len(ids)) >= len(train))


def pets(root):
    lists = [(root / f"oxford-iiit-pet/annotations/{part}.txt").read_text() for part in ("trainval", "test")]
    train, test = ([line.split()[0] for line in text.splitlines() if line[:1] not in ("#", "")] for text in lists)
    names = [name.rpartition("_")[0] for name in train + test]
    files = [f"oxford-iiit-pet/images/{name}.jpg" for name in train + test]
    return named(files, names, test=np.arange(len(files)) >= len(train))


def sun397(root):
    """SUN397/a/abbey/*.jpg, SUN397/a/apartment_building/outdoor/*.jpg; ClassName.txt lists "/a/abbey"."""
    files, names = [], []
    for line in (root / "SUN397/ClassName.txt").read_text().split():
        found = [name for name in entries(root / f"SUN397{line}") if name.lower().endswith(".jpg")]
        files += [f"SUN397{line}/{name}" for name in found]
        names += [line[3:]] * len(found)
    return named(files, names)


LOADERS = {"cifar100": cifar100, "dtd": dtd, "flowers102": flowers102, "pets": pets, "sun397": sun397}


def vtab(domain, root):
    """The set's images, in its published split where it has one (else 7:3 by --split-seed); None for clip."""
    if domain == "clip":
        return None
    need(root / PLACES[domain], ABOUT)
    try:
        if domain in LOADERS:
            return LOADERS[domain](root)
        return named(*class_tree(root, PLACES[domain]))  # a folder for each class
    except (OSError, InputError) as error:
        raise InputError(f"{error}: vtab/{PLACES[domain]} is not as published\n\n{ABOUT.strip()}") from error


def download(domain, root):
    """Fetch and unpack the set's archives, unless what they become is there."""
    if domain == "clip" or (root / PLACES[domain]).exists():
        return
    if domain not in ARCHIVES:
        raise InputError(f"--download: {domain} has no stable address\n\n{ABOUT.strip()}")
    for url, md5, place in ARCHIVES[domain]:
        path, below = root / place, (root / place).parent
        if not path.exists():
            archive = below / url.rpartition("/")[2]
            fetch(url, archive, md5)
            if archive != path:
                unpack(archive, below)
    if domain == "caltech101":  # an archive in an archive
        unpack(root / "caltech101/caltech-101/101_ObjectCategories.tar.gz", root / "caltech101")


VTAB = {
    **PHOTOGRAPHS,
    "load": vtab,
    "domains": ("clip", *PLACES),
    "only_source": "clip",
    "download": download,
    "about": ABOUT,
    "recipe": {**PHOTO_RECIPE, "arch": "clip:ViT-B-32-quickgelu", "backbone_lr": 1e-5},
    "source_recipe": {},
}
