"""`domainnet`: 586,575 images of 345 classes in six domains."""

import numpy as np

from files import InputError

from .download import fetch, unpack
from .folder import PHOTOGRAPHS, named, need, read_list

BASE = "http://csr.bu.edu/ftp/visda/2019/multi-source/"
# where each zip lies, and its size in GB; those of clipart and painting outside groundtruth/ lack files of the lists
ZIPS = {
    "clipart": ("groundtruth/clipart.zip", 1.3),
    "infograph": ("infograph.zip", 4.0),
    "painting": ("groundtruth/painting.zip", 3.7),
    "quickdraw": ("quickdraw.zip", 0.4),
    "real": ("real.zip", 5.6),
    "sketch": ("sketch.zip", 2.5),
}
ABOUT = f"""
DomainNet, from {BASE}
{chr(10).join(f"    {path:26} {size} GB" for path, size in ZIPS.values())}
    domainnet/txt/{{DOMAIN}}_{{train,test}}.txt
Unpack the zips of the source and the target, with their lists beside them, into the folder domainnet below --data-root:
    domainnet/clipart/aircraft_carrier/clipart_001_000005.jpg ...
    domainnet/clipart_train.txt, domainnet/clipart_test.txt ...
--download fetches and unpacks those of the two domains. Take clipart and painting from groundtruth/, as here: the zips
beside it lack images that the lists name. Decoded at 224x224 an image takes 0.15 MB more, in .cache below --data-root
(clipart 7 GB, real 26 GB). No published number exists for this task on DomainNet.
"""


def lists(domain, root):
    """The paths of the domain's two lists: beside its folder, or in the folder txt, as published."""
    folder = root if (root / f"{domain}_train.txt").exists() else root / "txt"
    return [(folder if folder.exists() else root) / f"{domain}_{part}.txt" for part in ("train", "test")]


def domainnet(domain, root):
    """One domain: the published lists say which images, their split and the classes' order, which is not that of
    sorted folder names (The_Eiffel_Tower stands under t, t-shirt near the end)."""
    need(root, ABOUT)
    train, test = (read_list(path, ABOUT) for path in lists(domain, root))
    need(root / domain, ABOUT)
    by_id = {}
    for file, label in train + test:
        name = file.split("/")[1]
        if by_id.setdefault(label, name) != name:
            raise InputError(f"{lists(domain, root)[0]}: id {label} is {by_id[label]} and {name}")
    files = [file for file, _ in train + test]
    names = [file.split("/")[1] for file in files]
    return named(files, names, [by_id[i] for i in sorted(by_id)], np.arange(len(files)) >= len(train))


def download(domain, root):
    """The domain's lists and zip, unless they are there."""
    for path in lists(domain, root):
        if not path.exists():
            fetch(f"{BASE}domainnet/txt/{path.name}", path)
    if not (root / domain).exists():
        archive = root / f"{domain}.zip"
        fetch(BASE + ZIPS[domain][0], archive)
        unpack(archive, root)


DOMAINNET = {
    **PHOTOGRAPHS,
    "load": domainnet,
    "domains": ("real", "clipart", "infograph", "painting", "quickdraw", "sketch"),
    "download": download,
    "about": ABOUT,
}
