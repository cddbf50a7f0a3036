"""Small copies of the published data sets: real image files in the published layouts, with their traps."""

import csv
import hashlib
import json
import pickle
import uuid

import numpy as np
from PIL import Image

SIDES = ((24, 18), (17, 31), (40, 40), (16, 20))  # no two neighbours of one size
OFFICE = ["Alarm_Clock", "Backpack", "Batteries", "Bike", "Drill", "Exit_Sign", "TV"]

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def photo(path, label, seed=0):
    """A JPEG (or PNG) of a colour that tells its label, with noise."""
    rng = np.random.default_rng((label, seed))
    width, height = SIDES[seed % len(SIDES)]
    colour = np.array([40 * label % 256, 90 * label % 256, 200 - 25 * label % 256])
    pixels = np.clip(colour + rng.normal(0, 15, (height, width, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tree(folder, classes, n, suffix="jpg"):
    """folder/CLASS/0000i.jpg, n of each class."""
    for label, name in enumerate(classes):
        for i in range(n):
            photo(folder / name / f"{i:05d}.{suffix}", label, i)


def office_home(root):
    """Lists whose ids are not alphabetical, and the folder `Real World` that they call Real_World."""
    base = root / "office_home"
    order = ["Drill", "Exit_Sign", *sorted(set(OFFICE) - {"Drill", "Exit_Sign"})]
    for domain in ("Art", "Real_World"):
        tree(base / domain.replace("_", " "), OFFICE, 10)
        photo(base / domain.replace("_", " ") / "TV" / "in_no_list.jpg", 0)
        for part, numbers in (("training", range(7)), ("testing", range(7, 10))):
            lines = [f"{domain}/{name}/{i:05d}.jpg {id_}" for id_, name in enumerate(order) for i in numbers]
            path = base / "image_list" / f"{domain}_{part}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n")


DOMAINNET = ["aircraft_carrier", "swan", "The_Eiffel_Tower", "t-shirt", "zebra"]  # the lists' order


def domainnet(root):
    base = root / "domainnet"
    for domain in ("real", "clipart"):
        tree(base / domain, DOMAINNET, 10)
        for part, numbers in (("train", range(7)), ("test", range(7, 10))):
            lines = [f"{domain}/{name}/{i:05d}.jpg {id_}" for id_, name in enumerate(DOMAINNET) for i in numbers]
            (base / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")


def leaf_user(writer, labels):
    """An image as LEAF writes it: 1.0 is paper, 0.0 ink; every label at a place of its own."""
    rng, images = np.random.default_rng(writer), []
    for label in labels:
        image = np.ones((28, 28))
        image[4 + label // 10 * 3 : 8 + label // 10 * 3, 2 * (label % 10) + 2 : 2 * (label % 10) + 6] = 0.0
        images.append((image - rng.uniform(0, 0.1, image.shape) * (image == 1)).ravel())
    return {"x": [[round(float(v), 6) for v in image] for image in images], "y": list(labels)}


def femnist(root, writers=14):
    """Every writer in both folders, in two files; writer 3's first image twice, once in each folder."""
    for part, n in (("train", 30), ("test", 12)):
        for file in (0, 1):
            users = [f"f{i:04d}_{i:02d}" for i in range(writers) if i % 2 == file]
            data = {}
            for user in users:
                writer = int(user[1:5])
                kinds = np.arange(62) if part == "test" else np.delete(np.arange(62), np.arange(writer, 62, 5))
                labels = np.random.default_rng((writer, n)).choice(kinds, n, replace=n > len(kinds))
                data[user] = leaf_user(100 * writer + n, [int(label) for label in labels])
            if part == "test" and "f0003_03" in users:
                first = json.loads((root / "femnist/train/all_data_1.json").read_text())["user_data"]["f0003_03"]
                data["f0003_03"]["x"].append(first["x"][0])
                data["f0003_03"]["y"].append(first["y"][0])
            content = {"users": users, "num_samples": [len(data[u]["y"]) for u in users], "user_data": data}
            path = root / "femnist" / part / f"all_data_{file}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))


def iwildcam(root):
    """Three training cameras, two new ones; sequences of three images each."""
    base = root / "iwildcam" / "iwildcam_v2.0"
    names = ["empty", "ocelot", "puma", "tapir", "agouti"]
    fields = ["", "split", "location", "category_id", "y", "datetime", "filename"]
    fields += ["image_id", "location_remapped", "sequence_remapped"]
    rows = []
    for camera, split in ((0, "train"), (1, "train"), (2, "train"), (7, "val"), (9, "test")):
        kinds = range(5) if split == "train" else (0, 1, 2) if camera == 7 else (0, 2, 3)
        for sequence in range(12):
            for frame in range(3):
                label = list(kinds)[sequence % len(kinds)]
                file = f"{uuid.uuid5(uuid.NAMESPACE_URL, f'{camera}-{sequence}-{frame}')}.jpg"
                photo(base / "train" / file, label, len(rows))
                own = "id_test" if split == "train" and sequence == 11 else split
                sequence_id = 100 * camera + sequence
                when = f"2013-06-05 05:{sequence:02d}:{frame:02d}"
                rows.append([len(rows), own, camera, label * 7, label, when, file, file, camera, sequence_id])
    with open(base / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])
    with open(base / "categories.csv", "w", newline="") as file:
        categories = [[y, y * 7, name] for y, name in enumerate(names)] + [[99999, 999, "not in this set"]]
        csv.writer(file).writerows([["y", "category_id", "name"], *categories])


def inat_fungi(root):
    for folder, n in (("2021_train_mini", 10), ("val", 10)):  # torchvision's name, and the archive's
        for i in range(4):
            tree(root / "inat_fungi" / folder, [f"0{5000 + i}_Fungi_Ascomycota_C_O_F_Genus_s{i}"], n)
            tree(root / "inat_fungi" / folder, [f"0{i:04d}_Animalia_Arthropoda_C_O_F_Genus_s{i}"], 1)


def cifar100(root):
    """With torchvision's checksums set to those of this replica."""
    from torchvision.datasets import CIFAR100

    base = root / "vtab" / "cifar-100-python"
    base.mkdir(parents=True)
    names = ["apple", "aquarium_fish", "baby", "bear"]
    for part, n in (("train", 10), ("test", 5)):
        labels = np.repeat(np.arange(4), n)
        pixels = (np.arange(3072)[None] % 50 + 50 * labels[:, None]).astype(np.uint8)
        content = {"data": pixels, "fine_labels": labels.tolist(), "filenames": ["x.png"] * len(labels)}
        (base / part).write_bytes(pickle.dumps(content, protocol=2))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    CIFAR100.train_list, CIFAR100.test_list = [["train", md5["train"]]], [["test", md5["test"]]]
    CIFAR100.meta = CIFAR100.meta | {"md5": md5["meta"]}


def vtab(root):
    """All eight, as torchvision unpacks them."""
    from scipy.io import savemat

    base = root / "vtab"
    cifar100(root)
    tree(base / "caltech101" / "101_ObjectCategories", ["BACKGROUND_Google", "Faces_easy", "accordion", "wild_cat"], 10)
    tree(base / "dtd" / "dtd" / "images", ["banded", "dotted", "woven"], 9)
    (base / "dtd" / "dtd" / "labels").mkdir()
    for i, part in enumerate(("train", "val", "test")):
        lines = [f"{name}/{3 * i + k:05d}.jpg\n" for name in ("banded", "dotted", "woven") for k in range(3)]
        (base / "dtd" / "dtd" / "labels" / f"{part}1.txt").write_text("".join(lines))
    tree(base / "eurosat" / "2750", ["AnnualCrop", "Forest", "SeaLake"], 10)
    flowers, ids = base / "flowers-102", np.arange(1, 409)
    for i in ids:
        photo(flowers / "jpg" / f"image_{i:05d}.jpg", i % 102, i)
    savemat(flowers / "imagelabels.mat", {"labels": (ids % 102 + 1)[None]})
    savemat(flowers / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    pets, breeds = base / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "yorkshire_terrier"]
    for label, name in enumerate(breeds):
        for i in range(1, 9):
            photo(pets / "images" / f"{name}_{i}.jpg", label, i)
    (pets / "annotations").mkdir()
    for part, numbers in (("trainval", range(1, 6)), ("test", range(6, 9))):
        lines = [f"{name}_{i} {label + 1} 1 1\n" for label, name in enumerate(breeds) for i in numbers]
        (pets / "annotations" / f"{part}.txt").write_text("".join(lines))
    for name in ("abbey", "apartment_building/outdoor", "zen_garden"):
        tree(base / "SUN397" / name[0], [name], 10)
    (base / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n/z/zen_garden\n")
    tree(base / "resisc45", ["airplane", "baseball_diamond", "wetland"], 10)


def folder(root):
    """Two domains; the target lacks one class."""
    tree(root / "folder" / "camera", ["cup", "fork", "knife", "plate"], 10, "png")
    tree(root / "folder" / "drawing", ["cup", "fork", "plate"], 10)
    (root / "folder" / "drawing" / "plate" / "notes.txt").write_text("no image")
    (root / "folder" / "drawing" / "plate" / "._00000.jpg").write_bytes(b"what a Mac leaves on a stick")
