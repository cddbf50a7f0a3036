"""task.target_unlabelled: whose images are in it, and whose are not."""

import dataclasses

import numpy as np
import pytest
import replicas
import torch
from conftest import load_task as load_flags

import data
from files import InputError

SETS = {
    "digits": ("mnist", "optdigits"),
    "glyphs": ("sans", "serif"),
    "office_home": ("Art", "Real_World"),
    "domainnet": ("real", "clipart"),
    "femnist": ("train", None),
    "iwildcam": ("train", "7"),
    "vtab": ("clip", "eurosat"),
    "inat_fungi": (None, None),
    "folder": ("camera", "drawing"),
}


@dataclasses.dataclass
class Args(data.PoolArgs, data.TaskArgs):
    pass


def load(root, dataset, **flags):
    source, target = SETS[dataset]
    size = {} if dataset in ("digits", "glyphs", "femnist") else {"image_size": 16}
    place = {"data_root": str(root / "folder" if dataset == "folder" else root)}
    flags = {"seen_classes": "4", **flags} if dataset == "office_home" else flags
    return data.load_task(Args(dataset=dataset, source=source, target=target, **place, **size, **flags), pool=True)


def pixels(split):
    """The images as bytes, in order."""
    return [image.numpy().tobytes() for image in split.images[torch.arange(len(split.labels))]]


WHOLE = [(dataset, None) for dataset in SETS]
PSEUDO = [(dataset, k) for dataset in SETS if dataset not in ("glyphs", "femnist", "vtab") for k in (0, 1)]


@pytest.mark.parametrize("dataset, pseudo_split", WHOLE + PSEUDO)
def test_the_pool_shares_no_image_and_no_group_with_the_test_set(dataset, pseudo_split, root):
    task = load(root, dataset, pseudo_split=pseudo_split)
    pool, test = task.target_unlabelled, task.target_test
    whole = load(root, dataset, oracle=True) if pseudo_split is None and dataset in ("digits", "glyphs") else None
    assert set(pool.labels.tolist()) == {-1}
    assert pixels(pool)[: len(task.target_train.labels)] == pixels(task.target_train)
    if isinstance(pool.images, data.Images):
        assert not set(pool.images.index.tolist()) & set(test.images.index.tolist())
        assert len(set(pool.images.index.tolist())) == len(pool.labels)
    else:
        assert not set(pixels(pool)) & set(pixels(test))
    if test.group is not None:
        assert not set(pool.group.tolist()) & set(test.group.tolist())
    if whole:  # what the oracle is given with labels
        assert sorted(pixels(pool)) == sorted(pixels(whole.target_train))


def test_a_script_that_does_not_ask_gets_none(root):
    assert data.load_task(data.TaskArgs()).target_unlabelled is None
    assert load_flags("folder", "camera", "drawing", data_root=root / "folder", image_size=16).target_unlabelled is None


def test_pseudo_unseen_images_stay_in_the_pool(root):
    whole, pseudo = (load(root, "digits", pseudo_split=k) for k in (None, 0))
    gone = set(pixels(pseudo.target_test))
    assert sorted(pixels(pseudo.target_unlabelled)) == sorted(
        p for p in pixels(whole.target_unlabelled) if p not in gone
    )


@pytest.fixture
def folders(tmp_path):
    replicas.tree(tmp_path / "a", ["x", "y", "z"], 10)
    replicas.tree(tmp_path / "b", ["x", "y"], 10)
    for i in range(5):
        replicas.photo(tmp_path / "b" / "unlabelled" / f"{i}.jpg", 2, i)
        replicas.photo(tmp_path / "heap" / f"{i}.png", 2, 10 + i)
    return tmp_path


def load_folders(root, unlabelled=None, pool=True, **flags):
    where = {"dataset": "folder", "source": "a", "target": "b", "data_root": str(root), "image_size": 16}
    return data.load_task(Args(unlabelled=unlabelled, **where, **flags), pool)


def test_folders_of_unlabelled_images(folders):
    plain = load_folders(folders, pool=False)
    assert plain.classes == ["x", "y", "z"] and len(plain.target_train.labels) == 14, "unlabelled is no class"
    own, heap = (load_folders(folders, where) for where in (None, str(folders / "heap")))
    for task in (own, heap):
        assert len(task.target_unlabelled.labels) == 19
        for part in ("source_train", "target_train", "target_test"):
            assert pixels(getattr(task, part)) == pixels(getattr(plain, part))
        assert pixels(task.target_unlabelled)[:14] == pixels(plain.target_train)
    assert not set(pixels(own.target_unlabelled)[14:]) & set(pixels(heap.target_unlabelled)[14:])
    assert np.bincount(own.target_train.labels, minlength=3).tolist() == [7, 7, 0]


def test_a_heap_takes_the_place_of_images_of_unseen_classes(folders):
    """Without one the training images of every class are the pool; with one, those of unseen classes stay out of it."""
    own, heap = (load_folders(folders, where, seen_classes="1") for where in (None, str(folders / "heap")))
    assert len(own.target_train.labels) == 7 and len(own.target_unlabelled.labels) == 7 + 7 + 5
    assert len(heap.target_unlabelled.labels) == 7 + 5
    assert pixels(heap.target_unlabelled)[:7] == pixels(heap.target_train)
    assert not set(pixels(heap.target_unlabelled)[7:]) & set(pixels(own.target_unlabelled))


def test_an_empty_heap_that_nobody_asked_for_is_none(folders):
    for file in (folders / "b" / "unlabelled").iterdir():
        file.unlink()
    assert len(load_folders(folders).target_unlabelled.labels) == 14


def test_a_bad_image_of_the_heap_is_named_or_left_out(folders):
    (folders / "heap" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        load_folders(folders, str(folders / "heap"))
    (folders / "heap" / "gone.jpg").symlink_to(folders / "on another disk.jpg")
    with pytest.raises(InputError, match=r"gone\.jpg"):
        load_folders(folders, str(folders / "heap"))
    task = load_folders(folders, str(folders / "heap"), skip_bad_images=True)
    assert len(task.target_unlabelled.labels) == 19


def test_a_heap_that_cannot_be(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "b"):
        with pytest.raises(InputError, match=rf"--unlabelled .*{name}: no image directly in it"):
            load_folders(folders, str(tmp_path / name))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "own.jpg").symlink_to(folders / "b" / "x" / "00000.jpg")
    for name, count in (("b/x", 10), ("links", 1)):
        with pytest.raises(InputError, match=rf"--unlabelled .*: {count} of the target's own images are in it"):
            load_folders(folders, str(folders / name))
    assert len(load_folders(folders, str(folders / "b" / "unlabelled")).target_unlabelled.labels) == 19
    with pytest.raises(InputError, match="--unlabelled: digits is not of image files"):
        data.load_task(Args(unlabelled=str(folders / "heap")), pool=True)


def test_a_script_learns_from_a_heap_and_warns(folders, run_method, tmp_path_factory, capsys):
    flags = ("--dataset", "folder", "--data-root", str(folders), "--source", "a", "--target", "b")
    flags += ("--arch", "small_cnn", "--image-size", "16", "--batch-size", "8", "--unlabelled", str(folders / "heap"))
    names = run_method("infomax", *flags, runs=tmp_path_factory.mktemp("runs"))[0]
    assert len(names["task"].target_unlabelled.labels) == len(names["task"].target_train.labels) + 5
    assert "warning: unlabelled images: 5 besides the labelled ones are few" in capsys.readouterr().err


def test_a_heap_is_none_of_the_images_of_a_set_that_keeps_them_elsewhere(root):
    place = {"data_root": str(root), "image_size": 16}
    flowers = next((root / "vtab").glob("flowers*/jpg"))
    args = Args("vtab", "clip", "flowers102", unlabelled=str(flowers), **place)
    with pytest.raises(InputError, match="of the target's own images are in it"):
        data.load_task(args, pool=True)
    heap = next((root / "iwildcam").rglob("train"))
    with pytest.raises(InputError, match="36 of the target's own images are in it"):
        data.load_task(Args("iwildcam", "train", "7", unlabelled=str(heap), **place), pool=True)


def test_a_sequence_that_a_pseudo_split_tests_on_leaves_the_pool():
    """Also where it shows a class besides that is not labelled: an animal and an empty frame."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    labels, group = torch.arange(40) % 4, np.arange(40) // 4  # each group of four images shows all four classes
    split = data.Split(images, labels, {}, group)
    labelled = split.take(np.flatnonzero(labels < 3))
    unlabelled = split.take(np.concatenate([np.flatnonzero(labels < 3), np.flatnonzero(labels == 3)]))
    pool = data.Split(unlabelled.images, torch.full((40,), -1), {}, unlabelled.group)
    seen = torch.tensor([True, True, True, False])
    task = data.Task("d", "a", "b", list("wxyz"), seen, None, None, labelled, labelled, {}, {}, "3", pool)
    pseudo = data.splits.pseudo_task(task, 0, 0)
    assert len(pseudo.target_test.labels) and not set(pseudo.target_unlabelled.group) & set(pseudo.target_test.group)
