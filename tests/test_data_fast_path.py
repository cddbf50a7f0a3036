"""The fast path (whole batches, channels-last) gives what a naive one gives: image by image, NCHW, in float64."""

import colorsys
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv

import data
import models
from data import augmentation


@pytest.fixture
def float64():
    """Everything that is drawn or made from here on is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def naive_affine(image, u, degrees, scale, shift, shear):
    """random_affine for one image [H, W], with u [6] in -1..1, pixel by pixel: where the pixel's centre comes from, and
    the four pixels around it."""
    side, result = image.shape[0], torch.zeros_like(image)
    angle, slope = u[0] * math.radians(degrees), shear * u[3]
    cos, sin = math.cos(angle) / (1 + scale * u[1]), math.sin(angle) / (1 + scale * u[2])
    for i in range(side):
        for j in range(side):
            x, y = (2 * j + 1) / side - 1, (2 * i + 1) / side - 1
            from_x = cos * x + (slope * cos - sin) * y + 2 * shift * u[4]
            from_y = sin * x + (slope * sin + cos) * y + 2 * shift * u[5]
            column, row = ((v + 1) * side / 2 - 0.5 for v in (from_x, from_y))
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < side and 0 <= c < side:
                        result[i, j] += image[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return result


def naive_hue(image, turn):
    """The hue of [3, H, W] turned, pixel by pixel, with Python's own colorsys (torchvision's has float32 in it)."""
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.flatten(1).T.tolist()]
    pixels = [colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value) for hue, saturation, value in pixels]
    return torch.tensor(pixels).T.view(image.shape)


def naive_photo(image, box, flip, factors, hue, gray, order):
    """crop_resize and change_colours for one image [3, H, W], with torchvision's functions and naive_hue."""
    top, left, height, width = (int(value) for value in box)
    image = F.interpolate(
        image[None, :, top : top + height, left : left + width], image.shape[1:], mode="bilinear", align_corners=False
    )[0]
    image = image.flip(2) if flip else image
    change = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, naive_hue]
    for which in order:
        image = change[which](image, float((*factors, hue)[which]))
    return tv.rgb_to_grayscale(image, 3) if gray else image


def loss_and_gradients(model, batch, labels):
    """Cross-entropy, the mean over the batch, and its gradient for every parameter."""
    model = copy.deepcopy(model)
    loss = F.cross_entropy(model(batch), labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def one_by_one(model, images, labels):
    """The same as a sum over single images, in NCHW."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    total = 0
    for image, label in zip(images, labels, strict=True):
        logits = model.head(model.backbone((image[None].contiguous() - model.mean) / model.std))[0]
        loss = (logits.exp().sum().log() - logits[label]) / len(images)
        loss.backward()
        total += loss.detach()
    return [total, *(parameter.grad for parameter in model.parameters())]


def check(model, fast, naive, labels):
    torch.testing.assert_close(fast, naive, rtol=0, atol=1e-9)
    fast = fast.contiguous(memory_format=torch.channels_last)
    for a, b in zip(loss_and_gradients(model, fast, labels), one_by_one(model, naive, labels), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_digits(float64):
    task = data.load_task(data.TaskArgs("digits"))
    strength = task.target_train.augmentation
    batch, labels = task.target_train.images[:4].double() / 255, task.target_train.labels[:4]
    fast = data.random_affine(batch, data.generator("cpu", 1), **strength)
    u = torch.rand(6, 4, generator=data.generator("cpu", 1)) * 2 - 1
    naive = torch.stack([naive_affine(batch[i, 0], u[:, i].tolist(), **strength)[None] for i in range(4)])
    assert (fast - batch).abs().max() > 0.5, "they were changed"
    torch.manual_seed(0)
    model = models.build("small_cnn", 10, (1, 28, 28)).double().eval().to(memory_format=torch.channels_last)
    check(model, fast, naive, labels)


def test_photographs(float64, monkeypatch):
    rng = np.random.default_rng(0)
    batch = F.interpolate(torch.from_numpy(rng.random((6, 3, 8, 8))), (48, 48), mode="bilinear")
    labels, drawn = torch.arange(6) % 3, {}

    def remember(name):
        function = getattr(augmentation, name)

        def call(images, *arguments):
            drawn[name] = arguments
            return function(images, *arguments)

        return call

    for name in ("crop_resize", "change_colours"):
        monkeypatch.setattr(augmentation, name, remember(name))
    fast = data.random_photo(batch, data.generator("cpu", 2), gray=0.3)
    *box, flip = drawn["crop_resize"]
    *factors, hue, gray, order = drawn["change_colours"]
    assert flip.any() and not flip.all() and gray.any() and not gray.all()
    u = torch.rand(28, 6, generator=data.generator("cpu", 2))  # on the CPU, in one piece, whatever the images' device
    assert torch.equal(flip, u[22] < 0.5) and torch.equal(gray, u[27] < 0.3)
    assert torch.equal(torch.stack([*factors, hue + 1]), 1 + 0.3 * (2 * u[23:27] - 1))
    naive = [
        naive_photo(batch[i], [b[i] for b in box], flip[i], [f[i] for f in factors], hue[i], gray[i], order)
        for i in range(6)
    ]
    torch.manual_seed(0)
    model = models.build("resnet18", 3, (3, 48, 48), "none").double().eval().to(memory_format=torch.channels_last)
    check(model, fast, torch.stack(naive), labels)


@pytest.mark.parametrize("change", [data.random_affine, data.random_photo])
def test_augmentation_draws_on_the_cpu_for_any_device(change):
    """The device meta holds no numbers: whoever draws there, or waits for a number from there, fails."""
    rng, other = data.generator("cpu", 3), data.generator("cpu", 3)
    images = torch.rand(5, 3, 16, 16)
    there = change(images.to("meta"), rng)
    assert there.device.type == "meta" and there.shape == images.shape
    change(images, other)
    assert torch.equal(rng.get_state(), other.get_state())


@pytest.mark.parametrize("arch", ["small_cnn", "resnet18"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_channels_last_is_kept_through_the_model(arch, amp):
    model = models.build(arch, 7, (3, 32, 32), None if arch in models.SMALL else "none")
    model.to(memory_format=torch.channels_last).amp = amp
    wrong, count = [], []

    def look(module, _, output):
        if output.ndim == 4 and min(output.shape[1:]) > 1:
            count.append(output.dtype)
            if not output.is_contiguous(memory_format=torch.channels_last):
                wrong.append(module)

    for module in model.modules():
        module.register_forward_hook(look)
    split = data.Split(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 7, {"crop": 0.7})
    images, labels = split.batches(4, "cpu", 0)(0)
    F.cross_entropy(model(images), labels).backward()
    assert not wrong and len(count) > 3 and (amp is None or torch.bfloat16 in count)
    for parameter in model.parameters():
        assert parameter.ndim < 4 or parameter.grad.is_contiguous(memory_format=torch.channels_last)
