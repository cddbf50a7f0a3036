"""Damaged lists, tables, image files and caches of data sets: named in one error, or no image gets another label."""

import random
import shutil

import pytest
import replicas
import torch
from conftest import load_task
from test_runs_bad_input import damaged

from data import femnist, iwildcam
from files import InputError

SIZED = {"image_size": 16}
OFFICE = {**SIZED, "target": "Real_World", "seen_classes": "3"}
# data set, the file's pattern below the data root, the flags of the task
KINDS = {
    "list of office_home": ("office_home", "office_home/image_list/Art_training.txt", OFFICE),
    "list of domainnet": ("domainnet", "domainnet/clipart_train.txt", SIZED),
    "metadata of iwildcam": ("iwildcam", "iwildcam/iwildcam_v2.0/metadata.csv", SIZED),
    "categories of iwildcam": ("iwildcam", "iwildcam/iwildcam_v2.0/categories.csv", SIZED),
    "LEAF json": ("femnist", "femnist/train/all_data_0.json", {}),
    "cache of femnist": ("femnist", ".cache/femnist-*.pt", {}),
    "image": ("office_home", "office_home/Art/TV/00001.jpg", OFFICE),
    "cache": ("office_home", ".cache/office_home-Art-16-????????????????.npy", OFFICE),
    "checksums": ("office_home", ".cache/office_home-Art-16-*.sums.npy", OFFICE),
}
CASES = 14


def everything(task):
    """{the image's bytes: its class name} of the target, and of the source."""
    result = []
    for splits in ((task.target_train, task.target_test), (task.source_train, task.source_test)):
        pixels = torch.cat([split.images[torch.arange(len(split.labels))] for split in splits])
        labels = torch.cat([split.labels for split in splits]).tolist()
        names = [task.classes[label] for label in labels]
        result.append({image.numpy().tobytes(): name for image, name in zip(pixels, names, strict=True)})
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data(kind, tmp_path):
    dataset, pattern, flags = KINDS[kind]
    getattr(replicas, dataset)(tmp_path)

    def load(**more):
        femnist.read.cache_clear()
        iwildcam.read.cache_clear()
        return load_task(dataset, data_root=str(tmp_path), **{**flags, **more})

    whole = everything(load(oracle=flags is OFFICE or dataset == "domainnet"))
    if dataset == "iwildcam":  # a row may now be of the other new camera
        flags = {**flags, "target": "7"}
        whole[0] |= everything(load(target="9"))[0]
    (file,) = tmp_path.glob(pattern)
    content, rng, named = file.read_bytes(), random.Random(kind + "4"), 0
    cached = {path: path.read_bytes() for path in (tmp_path / ".cache").iterdir()}
    for case in range(CASES):
        bad = damaged(content, [b"", b"{}", bytes(range(256)), b"Art/TV/00001.jpg\n"], rng)
        file.write_bytes(bad)
        try:
            found = everything(load())
        except InputError as error:
            named += 1
            told = str(error)
            names = file.name.partition(".")[0], str(tmp_path / dataset), "--seen-classes"  # too few classes are left
            assert any(name in told for name in names), (case, told)
        else:
            for after, before in zip(found, whole, strict=True):
                names = {(before[image], name) for image, name in after.items() if image in before}
                strange = [image for image in after if image not in before]
                if kind in ("LEAF json", "metadata of iwildcam"):  # a digit for a digit: what no reader can notice
                    wrong = [image for image, name in after.items() if before.get(image, name) != name]
                    assert len(wrong) <= 1 and len(strange) <= 2, (case, bad[:80])
                else:  # a class may have another name, but all of its images have it
                    assert len(dict(names)) == len(names) == len({b: a for a, b in names}), (case, names)
                    assert len(strange) <= (kind == "image"), (case, bad[:80])
        shutil.rmtree(tmp_path / ".cache")
        (tmp_path / ".cache").mkdir()
        for path, original in cached.items():
            path.write_bytes(original)
        file.write_bytes(content)
    assert named > (0 if kind in ("image", "LEAF json") else CASES // 3), named
