"""Every data set in its published layout, read and run through the command line."""

import json
import os
import shutil

import numpy as np
import pytest
import replicas
import torch
from conftest import ROOT, load_task

import benchmark
import data
from files import InputError

SMALL = ("--arch", "small_cnn", "--image-size", "16", "--batch-size", "8")


@pytest.fixture
def load(root):
    return lambda dataset, *a, **k: load_task(
        dataset, *a, **{"data_root": str(root / "folder" if dataset == "folder" else root), **sized(dataset, *a), **k}
    )


def sized(dataset, source=None, target=None):
    return {} if dataset == "femnist" or target == "cifar100" else {"image_size": 16}


@pytest.fixture
def tiny_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is optional: requirements-optional.txt")
    (tmp_path / "tiny.json").write_text(json.dumps(replicas.TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny.json")
    return open_clip


def colours(split):
    """The label that the colour of each image tells, by replicas.photo."""
    means = split.images[torch.arange(len(split.labels))].float().mean((2, 3))
    label = torch.arange(10)
    known = torch.stack([40 * label % 256, 90 * label % 256, 200 - 25 * label % 256], 1).clamp(0, 255)
    return torch.cdist(means, known.float()).argmin(1)


def counts(task):
    is_seen = task.seen[task.target_test.labels]
    return len(task.target_train.labels), int(is_seen.sum()), int((~is_seen).sum())


def test_office_home_takes_the_published_lists(load, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Bike\nTV\nDrill\n")
    task = load("office_home", "Art", "Real_World", seen_classes=str(names))
    assert task.classes == sorted(replicas.OFFICE) and task.target == "Real_World"
    assert counts(task) == (3 * 7, 3 * 3, 4 * 3) and len(task.source_train.labels) == 7 * 7
    # ids are those of the names, not those of the lists; the image that no list names is not read
    for split in (task.source_train, task.source_test, task.target_train, task.target_test):
        assert torch.equal(colours(split), split.labels)
    # the published split does not depend on --split-seed
    again = load("office_home", "Art", "Real_World", seen_classes=str(names), split_seed=3)
    assert again.target_test.images.fingerprint() == task.target_test.images.fingerprint()


def test_office_home_paper_classes():
    for source, names in data.DATASETS["office_home"]["paper"].items():
        assert len(set(names.split())) == 30, source
    published = data.DATASETS["office_home"]["paper"]["Art"]
    classes = sorted({*published.split(), "Drill", "Bed"})
    mask = data.choose_seen("paper", classes, np.ones(32, bool), 0, published)
    assert [name for name, seen in zip(classes, mask, strict=True) if not seen] == ["Bed", "Drill"]
    with pytest.raises(InputError, match=r"paper: no such list is published"):
        data.choose_seen("paper", classes, np.ones(32, bool), 0)


def test_office_home_without_lists_is_split_by_class(root, tmp_path):
    for domain in ("Art", "Real_World"):  # this name of the folder is as good
        replicas.tree(tmp_path / "office_home" / domain, ["A", "B", "C"], 9)
    a, b = (
        load_task("office_home", "Art", "Real_World", "2", split_seed=s, data_root=tmp_path, image_size=16)
        for s in (0, 1)
    )
    assert counts(a) == (2 * 6, 2 * 3, 3)
    assert a.target_test.images.fingerprint() != b.target_test.images.fingerprint()


def test_domainnet_ids_come_from_the_lists(load):
    task = load("domainnet", "real", "clipart", seen_classes="2")
    assert task.classes == replicas.DOMAINNET and task.classes != sorted(task.classes)
    assert counts(task) == (2 * 7, 2 * 3, 3 * 3)
    for split in (task.source_train, task.target_train, task.target_test):
        assert torch.equal(colours(split), split.labels)


def test_domainnet_says_which_listed_images_are_missing(root, tmp_path):
    replicas.domainnet(tmp_path)
    (tmp_path / "domainnet" / "clipart" / "t-shirt" / "00003.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 50 images of domainnet-clipart are missing.*\n  clipart/t-shirt/00003"):
        load_task("domainnet", "real", "clipart", data_root=tmp_path, image_size=16)
    task = load_task(
        "domainnet", "real", "clipart", "3", oracle=True, data_root=tmp_path, image_size=16, skip_bad_images=True
    )
    assert len(task.target_train.labels) == 5 * 7 - 1 and torch.equal(
        colours(task.target_train), task.target_train.labels
    )


def test_femnist_writers_are_tasks(load, root):
    writers = data.targets("femnist", "train", root)
    assert len(writers) == 10
    raw = {}
    for part in ("train", "test"):
        for path in (root / "femnist" / part).glob("*.json"):
            for user, content in json.loads(path.read_text())["user_data"].items():
                raw[user, part] = content
    for writer in writers[:3]:
        task = load("femnist", target=writer)
        assert len(task.classes) == 62 and task.classes[10] == "A" and task.classes[36] == "a"
        assert set(torch.nonzero(task.seen).flatten().tolist()) == set(raw[writer, "train"]["y"])
        # white on black: ink, 0 in the file, is 255
        image = 255 * (1 - np.array(raw[writer, "train"]["x"][0]))
        assert any(np.abs(own[0].numpy() - image.reshape(28, 28)).max() < 1 for own in task.target_train.images)
        train, test = ({i.numpy().tobytes() for i in s.images} for s in (task.target_train, task.target_test))
        assert not train & test
    everyone = sum(len(content["y"]) for content in raw.values())
    source = load("femnist")
    targets = sum(len(raw[writer, part]["y"]) for writer in writers for part in ("train", "test"))
    twice = "f0003_03" not in writers
    assert len(source.source_train.labels) + len(source.source_test.labels) == everyone - targets - twice


def test_femnist_drops_the_image_that_stands_in_train_and_test(root):
    found = data.femnist.read(root / "femnist")
    own = found["writers"] == "f0003_03"
    images = [image.tobytes() for image in found["images"][own]]
    assert len(images) == len(set(images)) == 42 and found["test"][own].sum() == 12


def test_iwildcam_keeps_sequences_together(load, root):
    assert sorted(data.targets("iwildcam", "train", root)) == ["7", "9"]
    for seed in range(3):
        task = load("iwildcam", target="9", split_seed=seed)
        assert task.classes == ["empty", "ocelot", "puma", "tapir", "agouti"]
        train, test = (set((split.images.index // 3).tolist()) for split in (task.target_train, task.target_test))
        assert not train & test and len(train) == 8 and len(test) == 4  # 12 sequences of 3 images, 7:3
        assert set(task.target_train.labels.tolist()) == set(torch.nonzero(task.seen).flatten().tolist()) <= {0, 2, 3}
        assert len(task.source_train.labels) == 3 * 33 and len(task.source_test.labels) == 3 * 3  # id_test
        assert torch.equal(colours(task.target_test), task.target_test.labels)


def test_iwildcam_keeps_sequences_together_in_pseudo_splits(load):
    for target in ("7", "9"):
        for number in range(5):
            whole, pseudo = (load("iwildcam", target=target, pseudo_split=k) for k in (None, number))
            sides = (pseudo.target_train, pseudo.target_test, whole.target_test)
            train, test, held_out = (set((split.images.index // 3).tolist()) for split in sides)
            assert len(test) == 3 and not train & test and not (train | test) & held_out  # 3 of 8 sequences
            shown = set(torch.nonzero(pseudo.seen).flatten().tolist())
            assert set(pseudo.target_train.labels.tolist()) == shown < set(torch.nonzero(whole.seen).flatten().tolist())


def test_a_pseudo_split_of_one_sequence_is_an_error():
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 3
    split = data.Split(images, labels, {}, group=np.zeros(6, int))
    task = data.Task("x", "a", "b", list("abc"), torch.ones(3, dtype=torch.bool), None, None, split, split, {}, {}, "2")
    with pytest.raises(InputError, match=r"--pseudo-split 0: no image is left to train on"):
        data.pseudo_task(task, 0, 0)


def test_inat_takes_only_fungi(load):
    task = load("inat_fungi", seen_classes="2")
    assert task.classes == [f"Fungi_Ascomycota_C_O_F_Genus_s{i}" for i in range(4)]
    assert counts(task) == (2 * 7, 2 * 3, 2 * 3) and len(task.source_train.labels) == 4 * 9


VTAB = {  # target: classes, of them the first, images in the training and the test part
    "cifar100": (4, "apple", 40, 20),
    "caltech101": (4, "BACKGROUND_Google", 28, 12),  # as published, with the background
    "dtd": (3, "banded", 18, 9),
    "eurosat": (3, "AnnualCrop", 21, 9),
    "flowers102": (102, "pink primrose", 204, 204),
    "pets": (3, "Abyssinian", 15, 9),
    "sun397": (3, "abbey", 21, 9),
    "resisc45": (3, "airplane", 21, 9),
}


@pytest.mark.parametrize("target", VTAB)
def test_vtab_layouts(target, load):
    task = load("vtab", "clip", target, seen_classes="2", oracle=True)
    got = len(task.classes), task.classes[0], len(task.target_train.labels), len(task.target_test.labels)
    assert got == VTAB[target] and task.source_train is None
    assert task.source_recipe == {}
    if target == "sun397":
        assert task.classes[1] == "apartment_building/outdoor"
    if target not in ("cifar100", "flowers102", "sun397"):
        assert torch.equal(colours(task.target_test), task.target_test.labels)
    if target == "flowers102":
        rows = task.target_test.images.index
        assert ((rows + 1) % 102 == task.target_test.labels.numpy()).all()


def test_clip_sees_the_middle_of_its_images_and_others_all(load):
    """Task and cache by --arch: CLIP's preprocessing crops, that of all others squashes."""
    squash, crop, other = (
        load("vtab", "clip", "pets", seen_classes="2", arch=arch, image_size=16)
        for arch in ("resnet50", "clip:tiny", None)
    )
    kinds = [task.target_test.images.key for task in (squash, crop, other)]
    assert kinds[0] != kinds[1] == kinds[2], "the recipe's own architecture is a CLIP"
    own = load("folder", "camera", "drawing", arch="clip:tiny").target_test.images
    assert not torch.equal(own[:], load("folder", "camera", "drawing").target_test.images[:])


def test_cifar100_runs_no_code(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    replicas.cifar100(tmp_path)
    (tmp_path / "vtab" / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(InputError, match=r"cifar-100-python: other files than CIFAR-100's"):
        load_task("vtab", "clip", "cifar100", data_root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_folder_target_that_lacks_a_class(load):
    task = load("folder", "camera", "drawing")
    assert task.classes == ["cup", "fork", "knife", "plate"] and task.seen_classes == "data"
    assert task.seen.tolist() == [True, True, False, True] and counts(task) == (21, 9, 0)
    assert set(task.target_test.labels.tolist()) == {0, 1, 3}, "the class it lacks does not shift the others"
    assert len(load("folder", "camera", "drawing", seen_classes="2").target_train.labels) == 14
    with pytest.raises(InputError, match=r"--oracle: the target drawing has training images of the seen classes only"):
        load("folder", "camera", "drawing", oracle=True)


def test_folder_with_a_split_of_ones_own(tmp_path):
    replicas.tree(tmp_path / "a", ["x", "train", "z"], 10)  # a class called train is no part
    replicas.tree(tmp_path / "b" / "train", ["x"], 4)
    replicas.tree(tmp_path / "b" / "test", ["train", "x", "z"], 3)
    task = load_task("folder", "a", "b", data_root=tmp_path, image_size=16)
    assert task.classes == ["train", "x", "z"] and task.seen.tolist() == [False, True, False]
    assert counts(task) == (4, 3, 6)


def test_folder_that_is_no_folder_or_a_size_that_is_none(tmp_path):
    for domain in "ab":
        replicas.tree(tmp_path / domain, ["x", "y"], 5)
    with pytest.raises(InputError, match="--image-size 0: choose 8 to 4096"):
        load_task("folder", "a", "b", "1", data_root=tmp_path, image_size=0)
    with pytest.raises(InputError, match="no folder with class folders in it"):
        load_task("folder", "a", "b", data_root=next((tmp_path / "a" / "x").iterdir()))


def test_folder_with_a_class_that_the_source_does_not_know(tmp_path):
    replicas.tree(tmp_path / "a", ["x", "y"], 5)
    replicas.tree(tmp_path / "b", ["ufo", "x", "y"], 5)
    with pytest.raises(InputError, match=r"--target b: the source does not know its class ufo; --ignore-unknown"):
        load_task("folder", "a", "b", "1", data_root=tmp_path, image_size=16)
    task = load_task("folder", "a", "b", "1", data_root=tmp_path, image_size=16, ignore_unknown_classes=True)
    assert task.classes == ["x", "y"] and counts(task) == (3, 2, 2)
    with pytest.raises(InputError, match=r"--seen-classes data: makes 2 of 2 classes seen"):
        load_task("folder", "a", "b", data_root=tmp_path, image_size=16, ignore_unknown_classes=True)


def test_folder_with_a_model_instead_of_source_images(tmp_path):
    replicas.tree(tmp_path / "new", ["x", "z"], 10)
    (tmp_path / "names.txt").write_text("z\ny\nx\n")
    torch.save({"classes": ["x", "y", "z"]}, tmp_path / "hers.pt")
    own, file = {"data_root": tmp_path, "image_size": 16}, str(tmp_path / "hers.pt")
    task = load_task("folder", source_checkpoint=file, **own)
    assert (task.source, task.target, task.classes) == ("hers", "new", ["x", "y", "z"])
    assert task.seen.tolist() == [True, False, True] and counts(task) == (14, 6, 0)
    assert task.source_train is None and task.source_test is None and task.source_recipe == {}
    assert load_task("folder", "hers", "new", source_checkpoint=file, **own).source == "hers", "as a grid names it"
    task = load_task("folder", source_checkpoint=file, classes=str(tmp_path / "names.txt"), **own)
    assert task.classes == ["z", "y", "x"] and task.target_train.labels.unique().tolist() == [0, 2]
    for wrong, message in (
        ({}, "--data-root: one domain, new, and no source; .* pass a model .* with --source-checkpoint FILE"),
        ({"source": "new"}, "one domain, new, and no source"),
        ({"source_checkpoint": file, "source": "his"}, "--source his: folder has no such domain; choose from new"),
        ({"source_checkpoint": file, "target": "old"}, "--target old: folder has no such domain"),
        ({"source_checkpoint": file, "source_steps": 5}, "--source-steps 5: the source model comes trained"),
    ):
        with pytest.raises(InputError, match=message):
            load_task("folder", **own, **wrong)


def test_which_folder_is_the_source_is_asked_for_where_it_is_not_plain(tmp_path):
    for name in ("a", "b"):
        replicas.tree(tmp_path / name, ["x", "y", "z"][: 3 - (name == "b")], 10)
    torch.save({"classes": ["x", "y", "z"]}, tmp_path / "b.pt")
    own, file = {"data_root": tmp_path, "image_size": 16}, str(tmp_path / "b.pt")
    with pytest.raises(InputError, match="--source and --target: say which of a, b is which"):
        load_task("folder", **own)
    for flags in ({"source": "a"}, {"target": "b"}):
        task = load_task("folder", **flags, **own)
        assert (task.source, task.target) == ("a", "b") and task.source_train is not None
    with pytest.raises(InputError, match="--target: say which of a, b is to be adapted to"):
        load_task("folder", source_checkpoint=file, **own)
    task = load_task("folder", target="b", source_checkpoint=file, **own)
    assert (task.source, task.target, task.source_train) == ("b.pt", "b", None), "no domain's name"
    shutil.rmtree(tmp_path / ".cache")
    task = load_task("folder", "a", "b", source_checkpoint=file, **own)
    assert task.source_train is None and {path.name[:9] for path in (tmp_path / ".cache").iterdir()} == {"folder-b-"}


def test_share_of_the_test_images(load, tmp_path):
    for share, want in ((None, (21, 9, 0)), (0.3, (21, 9, 0)), (0.5, (15, 15, 0)), (0.0, (30, 30, 0))):
        task = load("folder", "camera", "drawing", test_share=share)
        assert counts(task) == want and task.recipe["steps_per_epoch"] >= 5
    assert task.target_test is task.target_train
    task = load("folder", "camera", "drawing", seen_classes="2", test_share=0.0)
    assert counts(task) == (20, 20, 0), "nothing is tested that was not trained on"
    task = load("folder", "camera", "drawing", test_share=0.0, pseudo_split=0)
    assert counts(task) == (14, 6, 3), "a pseudo split has test images of its own"
    replicas.tree(tmp_path / "a", ["x", "y"], 4)
    replicas.tree(tmp_path / "b" / "train", ["x"], 4)
    replicas.tree(tmp_path / "b" / "test", ["x", "y"], 3)
    with pytest.raises(InputError, match=r"--test-share 0.0: b has a split of its own; leave the flag out"):
        load_task("folder", "a", "b", data_root=tmp_path, image_size=16, test_share=0.0)


def test_where_decoded_images_are_kept(root, tmp_path):
    where, size = str(root / "folder"), 13
    load_task("folder", "camera", "drawing", data_root=where, image_size=size, cache_dir=str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").glob("folder-*-13-*.sums.npy"))) == 2
    assert not list((root / "folder" / ".cache").glob("*-13-*"))
    args = data.TaskArgs("folder", data_root=where)
    beside_runs = data.cache_folders(args, root / "folder")[1]
    assert (str(beside_runs), data.cache_folders(args, root)[0]) == ("runs/.cache", root / ".cache")
    args.runs_dir = str(tmp_path)
    assert data.cache_folders(args, root / "folder") == [root / "folder" / ".cache", tmp_path / ".cache"]
    assert data.cache_folders(data.TaskArgs("vtab"), root / "vtab")[0] == root / ".cache"


def test_no_flip(load, root):
    flags = ("folder", "camera", "drawing")
    plain, flipless = load(*flags), load(*flags, no_flip=True)
    for split in (flipless.source_train, flipless.target_train):
        assert split.augmentation == plain.target_train.augmentation | {"flip": 0.0}
    size = torch.linspace(0, 1, 16).expand(64, 3, 16, 16)  # bright on the right
    for flip, mirrored in ((0.0, 0), (1.0, 64)):
        changed = data.random_photo(size, data.generator("cpu", 0), jitter=0, flip=flip)
        assert (changed[..., 0] > changed[..., -1]).all((1, 2)).sum() == mirrored
    with pytest.raises(InputError, match="--no-flip: images of digits are never flipped; leave the flag out"):
        load_task("digits", no_flip=True)


def test_a_run_on_all_images_says_that_it_tests_on_them(root, run_method, read, capsys):
    flags = ("--dataset", "folder", "--data-root", str(root / "folder"), "--source", "camera", "--target", "drawing")
    folder = run_method("naive_ft", *flags, *SMALL, "--test-share", "0", "--name", "all of them")[1]
    before_training = capsys.readouterr().out.partition("\nepoch ")[0]
    assert "no test images (--test-share 0): all figures are of the training images" in before_training
    done, arrays, _ = read(folder)
    assert done["tested_on_training_images"] is True and done["final"]["overall"] is None
    assert np.array_equal(arrays["test_logits"], arrays["train_logits"]) and len(arrays["test_labels"]) == 30
    folder = run_method("naive_ft", *flags, *SMALL, "--name", "some of them")[1]
    assert read(folder)[0]["tested_on_training_images"] is False
    assert "--test-share" not in capsys.readouterr().out


def test_few_images_get_fewer_steps_at_higher_rates(tmp_path):
    from data.folder import PHOTO_RECIPE, PHOTO_SOURCE, recipe_for, source_recipe_for

    assert recipe_for(100_000) == PHOTO_RECIPE, "the published one"
    assert source_recipe_for(100_000) == {**PHOTO_SOURCE, "steps": 10_000}
    for images, batch_size, steps in (
        (5, 5, 100),
        (20, 8, 140),
        (244, 30, 420),
        (1500, 64, 1180),
        (20_000, 64, 10_000),
    ):
        recipe = recipe_for(images)
        assert (recipe["batch_size"], recipe["epochs"] * recipe["steps_per_epoch"]) == (batch_size, steps)
        assert recipe["lr"] >= recipe["backbone_lr"] and 0.2 < recipe["backbone_lr"] * steps < 1.1
    replicas.tree(tmp_path / "a", ["x", "y", "z"], 10)
    replicas.tree(tmp_path / "b", ["x", "y", "z"], 10)
    flags = ("folder", "a", "b", "2")
    task, oracle = (load_task(*flags, data_root=tmp_path, image_size=16, oracle=oracle) for oracle in (False, True))
    assert task.recipe == oracle.recipe == recipe_for(14), "an upper bound trains no longer than what it bounds"


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill"])
@pytest.mark.parametrize("dataset", ["office_home", "domainnet", "femnist", "iwildcam", "inat_fungi", "folder"])
def test_methods_run_on_every_set(dataset, method, root, run_method, read):
    pairs = {"office_home": ("--source", "Art", "--target", "Real_World", "--seen-classes", "3")}
    pairs |= {"folder": ("--source", "camera", "--target", "drawing")}
    pairs |= {"femnist": ("--batch-size", "8")}
    flags = pairs.get(dataset, ()) if dataset == "femnist" else (*SMALL, *pairs.get(dataset, ()))
    where = root / "folder" if dataset == "folder" else root
    names, folder = run_method(method, "--dataset", dataset, "--data-root", str(where), *flags)
    done, arrays, _ = read(folder)
    task = names["task"]
    assert arrays["test_logits"].shape == (len(task.target_test.labels), len(task.classes))
    assert done["final"]["seen"] is not None and np.isfinite(arrays["test_logits"]).all()
    assert (done["args"]["image_size"] == 16) == (dataset != "femnist")


OTHERS = sorted({path.stem for path in (ROOT / "methods").glob("*.py")} - {"naive_ft", "ht_distill"})


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_runs_on_images_in_a_cache_file(method, root, run_method, read):
    _, arrays, _ = read(run_method(method, "--dataset", "domainnet", "--data-root", str(root), *SMALL)[1])
    assert np.isfinite(arrays["test_logits"]).all() and arrays["test_logits"].shape == (15, 5)


def test_runs_on_two_folders_of_images_are_not_mixed_up(root, run_method, tmp_path, capsys):
    flags = ("--dataset", "folder", "--data-root", str(root / "folder"), *SMALL, "--name", "mixed")
    flags += ("--source", "camera", "--target", "drawing")
    run_method("naive_ft", *flags)
    shutil.copytree(root / "folder", tmp_path / "copy")
    with pytest.raises(SystemExit) as stop:
        run_method("naive_ft", *flags[:3], str(tmp_path / "copy"), *flags[4:])
    assert stop.value.code == 2 and f"data_root {root / 'folder'} (now" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill"])
def test_vtab_starts_from_clip_without_training(method, root, run_method, read, tiny_clip, monkeypatch, tmp_path):
    import models

    monkeypatch.setattr(models, "train_source", lambda *a, **k: pytest.fail("CLIP is its own source model"))
    flags = ("--dataset", "vtab", "--target", "pets", "--arch", "clip:tiny", "--weights", "none")
    flags += ("--seen-classes", "2", "--batch-size", "8", "--image-size", "32", "--data-root", str(root))
    done, arrays, _ = read(run_method(method, *flags)[1])
    assert arrays["test_logits"].shape == (9, 3) and done["source"]["overall"] is not None


def test_what_to_download_fits_on_one_screen(tmp_path, run_method, capsys):
    with pytest.raises(SystemExit) as stop:
        run_method("ht_distill", "--dataset", "domainnet", "--data-root", str(tmp_path), runs=tmp_path / "runs")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) <= 24 and max(map(len, error.splitlines())) <= 120
    for part in (str(tmp_path / "domainnet"), "csr.bu.edu", "groundtruth/clipart.zip", "5.6 GB", "--download"):
        assert part in error


@pytest.mark.parametrize("dataset", [name for name, entry in data.DATASETS.items() if "about" in entry])
def test_missing_data_say_what_to_put_where(dataset, tmp_path):
    with pytest.raises(InputError, match=r"not there\n\n(?s:.*)--data-root") as error:
        load_task(dataset, data_root=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(error.value)


def test_a_pair_for_every_target(root):
    assert benchmark.expand("digits:mnist:optdigits", "") == ["digits:mnist:optdigits"]
    pairs = benchmark.expand("iwildcam:train:all", f"--data-root {root}")
    assert sorted(pairs) == ["iwildcam:train:7", "iwildcam:train:9"]
    assert benchmark.expand("glyphs:sans:all", "") == [f"glyphs:sans:{d}" for d in ("serif", "mono", "stix")]


def test_image_size_is_an_error_where_it_means_nothing(load):
    with pytest.raises(InputError, match="--image-size 64: the images of mnist have one size"):
        load_task("digits", image_size=64)
    with pytest.raises(InputError, match="--image-size 64: the images of cifar100 have one size"):
        load("vtab", "clip", "cifar100", image_size=64)
    with pytest.raises(InputError, match="--download: not offered for digits"):
        load_task("digits", download=True)


def test_a_folder_of_runs_is_no_domain(tmp_path):
    for name in ("a", "b", "runs"):
        replicas.tree(tmp_path / name, ["x", "y"], 4)
    assert data.domain_names("folder", tmp_path) == ("a", "b")


def test_a_class_with_a_single_image(tmp_path):
    replicas.tree(tmp_path / "a", ["x", "y", "z"], 4)
    replicas.photo(tmp_path / "a" / "lone" / "0.jpg", 3)
    replicas.tree(tmp_path / "b", ["x", "y"], 4)
    replicas.photo(tmp_path / "b" / "z" / "0.jpg", 2)
    task, whole = (load_task("folder", "a", "b", data_root=tmp_path, image_size=16, test_share=s) for s in (None, 0.0))
    assert task.seen.tolist() == [False, True, True, False] and 3 in task.target_test.labels
    assert whole.seen.tolist() == [False, True, True, True] and len(whole.target_train.labels) == 9
    assert (task.source_train.labels == 0).sum() == 1 and not (task.source_test.labels == 0).any()


def test_iwildcam_may_lie_in_either_folder(tmp_path):
    replicas.iwildcam(tmp_path)
    inner, found = tmp_path / "iwildcam" / "iwildcam_v2.0", []
    for _ in range(2):
        data.iwildcam.read.cache_clear()
        found.append(load_task("iwildcam", target="7", data_root=tmp_path, image_size=16).target_test.images[:])
        for path in [*inner.iterdir()] if inner.exists() else ():
            path.rename(tmp_path / "iwildcam" / path.name)
        if inner.exists():
            inner.rmdir()
    assert torch.equal(*found)


def test_files_that_are_no_images_are_said_and_folders_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        replicas.tree(tmp_path / name, ["x", "y"], 4)
    (tmp_path / "b" / "y" / "scan.tif").write_bytes(b"no matter")
    load_task("folder", "a", "b", data_root=tmp_path, image_size=16, seen_classes="1")
    assert "b/y: 1 of 5 files are no images (.jpg, .jpeg" in capsys.readouterr().err
    (tmp_path / "lost+found").mkdir()
    assert data.domain_names("folder", tmp_path) == ("a", "b")
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        data.domain_names("folder", tmp_path)


def test_a_set_of_files_may_have_the_recipe_of_small_images(root, monkeypatch):
    monkeypatch.setitem(data.DATASETS["inat_fungi"], "recipe", data.digits.__globals__["SMALL_RECIPE"])
    task = load_task("inat_fungi", data_root=root, image_size=16)
    assert task.target_test.images.shape[1:] == (3, 16, 16)
