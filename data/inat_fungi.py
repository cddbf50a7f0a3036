"""`inat_fungi`: the 341 species of fungi of iNaturalist 2021.

How the paper makes a source and a target of them is not known to us. This split is ours: the source is the mini-train
images, the target the validation images. So what changes is the set of classes and the photographs, not their style.
"""

from .download import fetch, unpack
from .folder import PHOTOGRAPHS, class_tree, named, need

URL = "https://ml-inat-competition-datasets.s3.amazonaws.com/2021/"
ARCHIVES = {
    "train_mini": ("train_mini.tar.gz", "db6ed8330e634445efc8fec83ae81442"),
    "valid": ("val.tar.gz", "f6f6e0e242e3d4c9569ba56400938afc"),
}
FOLDERS = {"train_mini": ("2021_train_mini", "train_mini"), "valid": ("2021_valid", "val")}
ABOUT = f"""
iNaturalist 2021, from {URL}
    train_mini.tar.gz (42 GB)     unpacks to train_mini/; torchvision calls it 2021_train_mini/
    val.tar.gz (8.4 GB)           unpacks to val/; torchvision calls it 2021_valid/
Put the two folders into the folder inat_fungi below --data-root, under either name:
    inat_fungi/train_mini/05000_Fungi_Ascomycota_..._Genus_species/*.jpg ...
Only the folders of fungi are read: 341 species, 17,050 and 3,410 images, about 3 GB decoded. --download fetches both
archives, one after the other, and unpacks the fungi alone.
"""


def inat_fungi(domain, root):
    """One domain; the classes are the folders' names without their running number."""
    need(root, ABOUT)
    folder = next((name for name in FOLDERS[domain] if (root / name).is_dir()), None)
    below = need(root / (folder or FOLDERS[domain][1]), ABOUT).name
    files, names = class_tree(root, below, is_fungus)
    return named(files, [name.split("_", 1)[1] for name in names])


def is_fungus(folder):
    """05000_Fungi_Ascomycota_..."""
    return folder.split("_")[1:2] == ["Fungi"]


def download(domain, root):
    if not any((root / name).exists() for name in FOLDERS[domain]):
        name, md5 = ARCHIVES[domain]
        fetch(URL + name, root / name, md5)
        unpack(root / name, root, keep=lambda name: any(is_fungus(part) for part in name.split("/")))


INAT_FUNGI = {
    **PHOTOGRAPHS,
    "load": inat_fungi,
    "domains": ("train_mini", "valid"),
    "download": download,
    "about": ABOUT,
}
