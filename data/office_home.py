"""`office_home`: 15,588 photographs and drawings of 65 things from an office and a home, in four domains."""

import numpy as np

from .folder import PHOTOGRAPHS, class_tree, named, need, read_list

ABOUT = """
Office-Home (15,588 images, 1.2 GB): https://www.hemanthdv.org/officeHomeDataset.html (by hand: there is no stable
address to download from). Put its four folders into the folder office_home below --data-root:
    office_home/{Art,Clipart,Product,Real World}/CLASS/*.jpg      Real_World is as good
    office_home/image_list/{Art,Clipart,Product,Real_World}_{training,testing}.txt
The lists (lines "Art/Drill/00001.jpg 0") are the split that the published numbers are on; without them the images are
split 7:3 within each class by --split-seed.
"""

# The classes with target training images in the published experiments, by source domain.
PAPER = {
    "Art": "Alarm_Clock Batteries Bike Bottle Bucket Candles Exit_Sign Fork Hammer Keyboard Knives Lamp_Shade Monitor "
    "Mug Pan Pen Postit_Notes Push_Pin Radio Refrigerator Ruler Screwdriver Shelf Sneakers Soda Speaker TV Telephone "
    "Toys Webcam",
    "Real_World": "Backpack Bed Bike Bottle Bucket Calculator Calendar Computer Couch Fan Flipflops Flowers Folder "
    "Glasses Hammer Helmet Lamp_Shade Marker Notebook Oven Pencil Refrigerator Scissors Screwdriver Shelf Sneakers "
    "Soda Table Telephone Trash_Can",
}


def office_home(domain, root):
    """One domain, in the published split where its lists are there."""
    need(root, ABOUT)
    folder = next((name for name in (domain, domain.replace("_", " ")) if (root / name).is_dir()), None)
    need(root / (folder or domain), ABOUT)
    lists = [root / "image_list" / f"{domain}_{part}.txt" for part in ("training", "testing")]
    if not any(path.exists() for path in lists):
        return named(*class_tree(root, folder))
    train, test = ([file.split("/") for file, _ in read_list(path, ABOUT)] for path in lists)
    files = [f"{folder}/{name}/{file}" for _, name, file in train + test]
    names = [name for _, name, _ in train + test]  # the lists' ids are not alphabetical, and no other set has them
    return named(files, names, test=np.arange(len(files)) >= len(train))


OFFICE_HOME = {
    **PHOTOGRAPHS,
    "load": office_home,
    "domains": ("Art", "Clipart", "Product", "Real_World"),
    "seen": "paper",
    "paper": PAPER,
    "about": ABOUT,
}
