import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_task
from sklearn.datasets import load_digits

import data
from files import InputError


@pytest.mark.parametrize(
    "dataset, source, target, classes", [("digits", "mnist", "optdigits", 10), ("glyphs", "sans", "stix", 62)]
)
def test_task_splits(dataset, source, target, classes):
    task = load_task(dataset, source, target, split_seed=3)
    whole = load_task(dataset, source, target, split_seed=3, oracle=True)
    assert len(task.classes) == classes and int(task.seen.sum()) == classes // 2
    assert torch.equal(task.seen, whole.seen)
    # only seen classes in training, all of them, and exactly the oracle's images of them
    assert set(task.target_train.labels.tolist()) == set(torch.nonzero(task.seen).flatten().tolist())
    kept = task.seen[whole.target_train.labels]
    assert torch.equal(task.target_train.images, whole.target_train.images[kept])
    assert torch.equal(task.target_test.images, whole.target_test.images)
    # 7:3 within each class, rounded down, and nothing in both parts
    for label in range(classes):
        train, test = (int((s.labels == label).sum()) for s in (whole.target_train, whole.target_test))
        assert train == int(0.7 * (train + test) + 1e-9)
    train, test = ({image.numpy().tobytes() for image in s.images} for s in (whole.target_train, whole.target_test))
    assert not train & test
    for split in (task.source_train, task.source_test, task.target_train, task.target_test):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (1, 28, 28)
        assert split.labels.dtype == torch.int64 and len(split.labels) == len(split.images)


def test_digits_are_the_published_images():
    mnist, labels, _ = data.digits("mnist")
    assert mnist.shape == (5000, 1, 28, 28) and (np.bincount(labels) == 500).all()
    small, labels, _ = data.digits("optdigits")
    assert small.shape == (1797, 1, 28, 28) and small.max() == 255
    published = load_digits()
    assert np.array_equal(labels, published.target)
    ink = F.interpolate(torch.from_numpy(published.images)[:, None] / 16 * 255, (20, 20), mode="bilinear")
    assert np.abs(small[:, :, 4:24, 4:24] - ink.numpy()).max() <= 0.5 + 1e-4
    border = small.copy()
    border[:, :, 4:24, 4:24] = 0
    assert border.max() == 0, "the ink lies in the middle 20x20, as MNIST's does"


def test_split_seed_changes_classes_and_images_and_not_the_source():
    a, b, c = (load_task("digits", split_seed=s) for s in (0, 0, 1))
    assert torch.equal(a.seen, b.seen) and torch.equal(a.target_test.images, b.target_test.images)
    assert not torch.equal(a.seen, c.seen) and not torch.equal(a.target_test.images, c.target_test.images)
    assert torch.equal(a.source_train.images, c.source_train.images)


def test_seen_classes_from_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("7\n\n2\n 7 \n")
    assert load_task("digits", seen_classes=str(file)).seen.nonzero().flatten().tolist() == [2, 7]
    file.write_bytes(b"\xef\xbb\xbf7\r\n2\r\n")  # as an editor on Windows saves it
    assert load_task("digits", seen_classes=str(file)).seen.nonzero().flatten().tolist() == [2, 7]
    file.write_text("7\neight\n")
    with pytest.raises(InputError, match=r"eight.*classes are 0, 1"):
        load_task("digits", seen_classes=str(file))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dataset": "imagenet"}, "--dataset imagenet: unknown; choose from digits"),
        ({"source": "svhn"}, "--source svhn: digits has no such domain; choose from mnist, optdigits"),
        ({"target": "svhn"}, "--target svhn"),
        ({"target": "mnist"}, "is the source too"),
        ({"seen_classes": "0"}, "makes 0 of 10"),
        ({"seen_classes": "-3"}, "makes -3 of 10"),
        ({"seen_classes": "10"}, "makes 10 of 10"),
        ({"seen_classes": "11"}, "makes 11 of 10"),
        ({"seen_classes": "nowhere.txt"}, "neither a number nor a file"),
        ({"split_seed": -1}, "--split-seed -1"),
    ],
)
def test_bad_tasks_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        load_task(**{"dataset": "digits", **flags})


def test_a_pseudo_task_shows_nothing_of_truly_unseen_classes():
    task = load_task("digits", seen_classes="5", split_seed=4)
    known = {image.numpy().tobytes() for image in task.target_train.images}
    left_out = []
    for number in range(5):
        pseudo = data.pseudo_task(task, 4, number)
        train, test = pseudo.target_train, pseudo.target_test
        assert pseudo.seen.sum() == 3 and not (pseudo.seen & ~task.seen).any()
        assert set(train.labels.tolist()) == set(torch.nonzero(pseudo.seen).flatten().tolist())
        assert set(test.labels.tolist()) == set(torch.nonzero(task.seen).flatten().tolist())
        bytes_of = [{image.numpy().tobytes() for image in split.images} for split in (train, test)]
        assert bytes_of[0] | bytes_of[1] <= known and not bytes_of[0] & bytes_of[1]
        for label in torch.nonzero(task.seen).flatten().tolist():
            held_out = int((task.target_train.labels == label).sum()) - int(
                0.7 * (task.target_train.labels == label).sum()
            )
            assert int((test.labels == label).sum()) == held_out
        left_out += torch.nonzero(task.seen & ~pseudo.seen).flatten().tolist()
        assert pseudo.source_train is task.source_train and train.augmentation == task.target_train.augmentation
        # 30 % of each class, drawn by these three numbers since the published tables were made
        rng, held_out = np.random.default_rng((4, 3, number)), []
        for label in torch.nonzero(task.seen).flatten():
            index = rng.permutation(torch.nonzero(task.target_train.labels == label).flatten().numpy())
            held_out += index[int(0.7 * len(index) + 1e-9) :].tolist()
        assert torch.equal(test.images, task.target_train.images[sorted(held_out)])
    assert [left_out.count(label) for label in set(left_out)] == [2] * 5, "each class gets its turn"
    again, other = data.pseudo_task(task, 4, 1), data.pseudo_task(task, 5, 1)
    assert torch.equal(again.target_test.images, data.pseudo_task(task, 4, 1).target_test.images)
    assert not torch.equal(again.target_test.images, other.target_test.images)


def test_pseudo_tasks_that_cannot_be():
    task = load_task("digits", seen_classes="2")
    assert data.pseudo_task(task, 0, 0).seen.sum() == 1
    one, oracle = load_task("digits", seen_classes="1"), load_task("digits", oracle=True)
    for given, number in ((task, -1), (one, 0), (oracle, 0)):
        with pytest.raises(InputError, match=f"--pseudo-split {number}: must be 0 or more, without --oracle"):
            data.pseudo_task(given, 0, number)


def ramp(n=6):
    images = torch.arange(n * 8 * 8, dtype=torch.float32).remainder(251).byte().view(n, 1, 8, 8)
    return data.Split(images, torch.arange(n), {})


def test_batches_are_a_function_of_seed_and_step():
    split = data.Split(ramp().images, ramp().labels, {"degrees": 20.0, "shift": 0.1})
    a, b = split.batches(2, "cpu", seed=1), split.batches(2, "cpu", seed=1)
    forward = [a(step) for step in range(7)]
    for step in (6, 0, 3, 5):  # another order of asking, as after a restart
        assert all(torch.equal(x, y) for x, y in zip(forward[step], b(step), strict=True))
    assert len(a) == 3
    for epoch in range(2):  # each pass shows every image once, in another order
        assert sorted(torch.cat([forward[epoch * 3 + i][1] for i in range(3)]).tolist()) == list(range(6))
    assert not torch.equal(forward[0][0], split.batches(2, "cpu", seed=2)(0)[0])
    assert forward[0][0].is_contiguous(memory_format=torch.channels_last)


def test_batches_without_augmentation_are_the_images():
    split = ramp()
    images, labels = split.batches(6, "cpu", seed=0)(0)
    assert torch.equal(images[labels.argsort()], split.images.float() / 255)


@pytest.mark.parametrize("batch_size", [0, -1, 7])
def test_batch_that_does_not_fit(batch_size):
    with pytest.raises(InputError, match=f"--batch-size {batch_size}: the training set has 6 images"):
        ramp().batches(batch_size, "cpu", seed=0)


def test_affine_is_drawn_per_sample():
    images = torch.rand(1, 1, 16, 16).repeat(8, 1, 1, 1)
    moved = data.random_affine(images, data.generator("cpu", 0), degrees=20.0, scale=0.2, shift=0.1, shear=0.1)
    assert len({image.numpy().tobytes() for image in moved}) == 8


def test_affine_limits():
    images = torch.rand(4, 3, 16, 16)
    same = data.random_affine(images, data.generator("cpu", 0))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    # every parameter stays within its bound: read theta back from where the corners and the middle are sampled
    n = 2000
    x, y = torch.meshgrid(torch.linspace(-1, 1, 41), torch.linspace(-1, 1, 41), indexing="xy")
    coordinates = torch.stack([x, y])[None].repeat(n, 1, 1, 1)
    turned = data.random_affine(coordinates, data.generator("cpu", 1), degrees=30.0)
    angle = torch.atan2(turned[:, 1, 20, 25] - turned[:, 1, 20, 20], turned[:, 0, 20, 25] - turned[:, 0, 20, 20])
    assert 29 < torch.rad2deg(angle).max() < 30.1 and -30.1 < torch.rad2deg(angle).min() < -29
    shifted = data.random_affine(coordinates, data.generator("cpu", 1), shift=0.1)[:, :, 20, 20]
    # a shift of 0.1 of the side is 0.2 of the coordinates' -1..1, and these pixels' centres span 40/41 of the side
    assert 0.19 < shifted.abs().max() * 40 / 41 < 0.21


def photos(n=6, height=20, width=20):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_crop_against_torchvision():
    import torchvision.transforms.v2.functional as reference

    images = photos(height=24)
    boxes = torch.tensor(
        [[0, 0, 24, 20], [3, 2, 18, 17], [6, 4, 18, 16], [0, 5, 19, 15], [1, 1, 22, 13], [2, 0, 17, 20]]
    )
    flip = torch.tensor([False, True, False, True, True, False])
    got = data.crop_resize(images, *boxes.T.float(), flip)
    for image, box, mirrored, mine in zip(images, boxes.tolist(), flip, got, strict=True):
        want = reference.resized_crop(image, *box, [24, 20], antialias=True)
        torch.testing.assert_close(mine, want.flip(2) if mirrored else want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_colours_against_torchvision(order):
    import torchvision.transforms.v2.functional as reference

    images = photos()
    images[0] = 0.5  # a gray one has no hue
    factors = torch.tensor([[0.7, 1.3, 1, 0.9, 1.2, 0.8], [1.3, 0.7, 0.8, 1, 1.1, 1.2], [0.7, 1, 1.3, 0.8, 1.2, 1]])
    hue, gray = torch.tensor([0.3, -0.3, 0.1, 0.0, -0.05, 0.2]), torch.tensor([False, False, True, False, False, False])
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    got = data.change_colours(images, *factors, hue, gray, order)
    for i, image in enumerate(images):
        for which in order:
            image = getattr(reference, names[which])(image, [*factors[:, i].tolist(), float(hue[i])][which])
        if gray[i]:
            image = reference.rgb_to_grayscale(image, num_output_channels=3)
        torch.testing.assert_close(got[i], image, atol=2e-4, rtol=0)


def test_photo_augmentation_is_the_published_recipe():
    n = 4000
    y, x = torch.meshgrid(torch.linspace(0, 1, 33), torch.linspace(0, 1, 33), indexing="ij")
    where = torch.stack([x, y, torch.zeros_like(x)])[None].repeat(n, 1, 1, 1)  # a pixel's colour is its place
    rng = data.generator("cpu", 0)
    moved = data.random_photo(where, rng, jitter=0.0, gray=0.0)
    left, right, top, bottom = moved[:, 0, 16, 0], moved[:, 0, 16, -1], moved[:, 1, 0, 16], moved[:, 1, -1, 16]
    assert 0.45 < (left > right).float().mean() < 0.55
    # pixels' centres span 32/33 of the side
    width, height = (right - left).abs() * 32 / 33 + 1 / 33, (bottom - top) * 32 / 33 + 1 / 33
    area, ratio = width * height, width / height
    assert 0.66 < area.min() < 0.72 and area.max() < 1.001 and 0.80 < area.mean() < 0.88
    assert 0.70 < ratio.min() < 0.80 and 1.25 < ratio.max() < 1.40
    assert left.minimum(right).min() > -1e-3 and bottom.max() < 1 + 1e-3
    # each its own colours, all within the bounds; the same again with the same seed
    flat = torch.full((n, 3, 4, 4), 0.5)
    bright = data.random_photo(flat, data.generator("cpu", 1))
    assert 0.345 < bright.mean((1, 2, 3)).min() < 0.36 and 0.64 < bright.mean((1, 2, 3)).max() < 0.655
    assert torch.equal(bright, data.random_photo(flat, data.generator("cpu", 1)))
    red = torch.tensor([0.8, 0.3, 0.3]).view(1, 3, 1, 1).repeat(n, 1, 4, 4)
    coloured = data.random_photo(red, data.generator("cpu", 2))
    gray = (coloured.amax(1) - coloured.amin(1)).amax((1, 2)) < 1e-6
    assert 0.08 < gray.float().mean() < 0.12


@pytest.mark.parametrize("classes", [None, "every other"])
def test_batches_are_the_same_however_the_images_are_kept(tmp_path, classes):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 12, 12, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    labels = torch.arange(50) % 5
    mask = None if classes is None else torch.tensor([True, False, True, False, True])
    mapped = data.Images(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(50), "key")
    whole = torch.from_numpy(pixels).movedim(3, 1)
    augmentation = {"crop": 0.7, "jitter": 0.3, "gray": 0.1}
    want = data.Split(whole.contiguous(), labels, augmentation).batches(8, "cpu", 3)
    assert want.reader is None, "what lies in memory needs no thread"
    for images in (mapped, whole):
        for resident in ("auto", "on", "off"):
            batches = data.Split(images, labels, augmentation).batches(8, "cpu", 3, True, resident)
            assert (batches.reader is not None) == (images is mapped and resident != "on")
            for step in (0, 1, 2, 7, 5, 6, 12):  # in order, over the end of a pass, and after a jump
                for a, b in zip(batches(step, mask), want(step, mask), strict=True):
                    assert torch.equal(a, b) and a.is_contiguous(memory_format=torch.channels_last) == (a.ndim == 4)
    other = torch.tensor([False, True, False, True, False])  # what was read ahead for the mask is of no use
    batches = data.Split(mapped, labels, {}).batches(8, "cpu", 3)
    batches(0, mask), batches(1, other)
    assert not set(batches(2, other)[1].tolist()) - {1, 3}


def test_images_that_do_not_fit_where_they_should_stay(monkeypatch):
    split = data.Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), {})
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(InputError, match=r"--resident on: .* GB of images do not fit into the memory of cpu"):
        split.batches(2, "cpu", 0, resident="on")


def test_the_next_batch_is_read_while_one_is_trained_on(tmp_path):
    """Reading goes on in a thread: by the time of the next call the batch is there."""
    np.save(tmp_path / "x.npy", np.zeros((40, 8, 8, 3), np.uint8))
    images, read = data.Images(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(40), "key"), []

    came = threading.Semaphore(0)

    class Noted:
        shape, split = images.shape, images.split

        def __getitem__(self, index):
            read.append(index)
            came.release()
            return images[index]

    batches = data.Split(Noted(), torch.arange(40), {}).batches(8, "cpu", 0, resident="off")
    for step in range(3):
        batches(step)
        for _ in range(2 if step == 0 else 1):  # the next one comes without being asked for
            assert came.acquire(timeout=60)
    assert len(read) == 4


def test_no_augment_gives_the_images_as_they_are():
    split = data.Split(ramp().images, ramp().labels, {"degrees": 20.0})
    images, labels = split.batches(6, "cpu", seed=0, augment=False)(0)
    assert torch.equal(images[labels.argsort()], split.images.float() / 255)
