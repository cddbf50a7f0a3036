"""Random changes of training images, for a whole batch on its device, with parameters of each image's own.

The parameters are drawn and computed on the CPU, then copied in one piece: every kind of device sees the same crops.
"""

import numpy as np
import torch
import torch.nn.functional as F


def generator(device, *seed):
    """A torch.Generator on `device` seeded by a tuple of non-negative ints: (1, 2) and (2, 1) differ."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(state)


def random_affine(images, rng, degrees=0.0, scale=0.0, shift=0.0, shear=0.0):
    """Every image gets its own random rotation, scale, shear and shift (torchvision gives a batch one and the same).

    images [N, c, H, W] float; rotation in +-degrees, its cosine and its sine each divided by a factor of 1 +- scale, so
    that it scales and skews; shear in +-shear (a slope); shift in +-shift of the image's side. What comes in from
    outside the image is 0. All drawn from `rng`, which is on the CPU.
    """
    u = torch.rand(6, len(images), generator=rng) * 2 - 1
    angle = u[0] * (degrees * torch.pi / 180)
    cos, sin, slope = angle.cos() / (1 + scale * u[1]), angle.sin() / (1 + scale * u[2]), shear * u[3]
    theta = torch.stack([cos, slope * cos - sin, 2 * shift * u[4], sin, slope * sin + cos, 2 * shift * u[5]], 1)
    theta = theta.to(images.device, non_blocking=True).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)


# ------------------------------------------------------------------------------------------ photographs

GRAY = (0.2989, 0.587, 0.114)  # of red, green and blue in a pixel's brightness


def to_gray(images):
    """[N, 3, H, W] to [N, 1, H, W]."""
    return sum(weight * colour for weight, colour in zip(GRAY, images.split(1, 1), strict=True))


def crop_resize(images, top, left, height, width, flip):
    """Every image's own box, enlarged to the whole image's size (bilinear) and, where flip, mirrored left to right.

    images [N, c, H, W] float; top, left, height, width [N] in pixels, inside the image; flip [N] bool.
    """

    def coordinates(start, length, side):
        at = start[:, None] + (torch.arange(side, device=images.device) + 0.5) * length[:, None] / side
        at = at.maximum(start[:, None] + 0.5).minimum((start + length)[:, None] - 0.5)  # nothing from beyond the box
        return 2 * at / side - 1

    y, x = coordinates(top, height, images.shape[2]), coordinates(left, width, images.shape[3])
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False, padding_mode="border")


def shift_hue(images, turn):
    """The hue of [N, 3, H, W] in [0, 1] turned by turn [N, 1, 1], in turns of the colour circle of HSV."""
    r, g, b = images.unbind(1)
    top, low = r.maximum(g).maximum(b), r.minimum(g).minimum(b)
    spread = top - low
    safe = torch.where(spread == 0, 1, spread)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue += 6 * turn  # in sixths of the circle
    turned = torch.empty_like(images)
    for channel, at in enumerate((0, 2, 4)):  # the top less a trapezoid of the hue's distance to the channel's
        away = (hue - at) / 6
        away = (away - away.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
        turned[:, channel] = top - spread * away
    return turned


def change_colours(images, brightness, contrast, saturation, hue, gray, order=(0, 1, 2, 3)):
    """Brightness, contrast, saturation and hue as torchvision's functions of these names change them, in that order or
    another, each image with a factor of its own; then no colour where gray.

    images [N, 3, H, W] float in [0, 1]; the factors float [N] (1 changes nothing; hue in turns, 0 changes nothing);
    gray [N] bool.
    """

    def blend(images, others, factor):
        factor = factor.view(-1, 1, 1, 1)
        return (factor * images + (1 - factor) * others).clamp_(0, 1)

    for which in order:
        if which == 0:
            images = (images * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
        elif which == 1:
            images = blend(images, to_gray(images).mean((1, 2, 3), keepdim=True), contrast)
        elif which == 2:
            images = blend(images, to_gray(images), saturation)
        else:
            images = shift_hue(images, hue.view(-1, 1, 1))
    return blend(images, to_gray(images), 1 - gray.to(images.dtype))


def random_photo(images, rng, crop=0.7, jitter=0.3, gray=0.1, flip=0.5):
    """The published recipe for photographs: RandomResizedCrop of scale crop..1 and ratio 3/4..4/3, a flip with
    probability flip, ColorJitter with jitter for all four of its changes, grayscale with probability gray. All drawn
    from `rng`, on the CPU.

    images [N, 3, H, W] float in [0, 1]. Two things differ from torchvision: the crop is of the image that was already
    resized to the square, and the four colour changes come in one random order for the whole batch.
    """
    n, (height, width) = len(images), images.shape[2:]
    u = torch.rand(28, n, generator=rng)
    # ten tries of a box, the first that fits; else the whole image
    area, ratio = height * width * (crop + (1 - crop) * u[:10]), torch.exp((2 * u[10:20] - 1) * np.log(4 / 3))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height)
    first, any_fits = fits.float().argmax(0, keepdim=True), fits.any(0)
    w = torch.where(any_fits, w.gather(0, first)[0], width)
    h = torch.where(any_fits, h.gather(0, first)[0], height)
    top, left = (u[20] * (height - h + 1)).floor(), (u[21] * (width - w + 1)).floor()
    factors, hue = 1 + jitter * (2 * u[23:26] - 1), jitter * (2 * u[26] - 1)
    mirrored, no_colour = u[22] < flip, u[27] < gray
    parameters = torch.stack([top, left, h, w, mirrored, *factors, hue, no_colour]).to(images.device, non_blocking=True)
    top, left, h, w, mirrored, *factors, hue, no_colour = parameters
    images = crop_resize(images, top, left, h, w, mirrored.bool())
    order = np.random.default_rng(rng.initial_seed()).permutation(4)
    return change_colours(images, *factors, hue, no_colour.bool(), order)
