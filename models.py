"""A Classifier (backbone and linear head) and the source model that adaptation starts from.

model = source_model(task, "small_cnn", device="cpu")           # trained once, then read from the cache
logits, features = model(images, return_features=True)
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

from eval import (
    Checkpoint,
    InputError,
    check_progress,
    interruptible,
    predict,
    read_checkpoint,
    take_lock,
    write_checkpoint,
)

SOURCE_VERSION = 3  # raise it when a change below makes another source model from the same arguments
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Classifier(nn.Module):
    """logits = head(backbone((images - mean) / std)); mean and std, a value per channel, belong to the model.

    forward(images): uint8, or float in [0, 1], [N, 1 or 3, H, W]; one channel is repeated where mean has three.
    Returns float32 logits [N, C]; with return_features also the head's input, float32 features [N, D].
    amp: the dtype that backbone and head are autocast to, or None.
    """

    def __init__(self, backbone, head, mean, std):
        super().__init__()
        self.backbone, self.head, self.amp = backbone, head, None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images, return_features=False):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            features = self.backbone((images - self.mean) / self.std)
            logits = self.head(features)
        return (logits.float(), features.float()) if return_features else logits.float()


# ------------------------------------------------------------------------------------------ architectures


def small_cnn(channels, side):
    """Three 3x3 convolutions with BatchNorm and one hidden layer, 128 features: quick on a CPU at about 28x28."""
    layers, before = [], channels
    for width in (16, 32, 64):
        conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * (side // 8) ** 2, 128), nn.ReLU()), 128


def lenet(channels, side):
    """LeNet-5 with ReLU and max pooling, 84 features (LeCun et al. 1998). It has no BatchNorm."""
    layers = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * ((side // 2 - 4) // 2) ** 2, 120), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(120, 84), nn.ReLU()), 84


SMALL = {"small_cnn": small_cnn, "lenet": lenet}


def build(arch, classes, image_shape, weights=None):
    """A Classifier with a new head for `classes` classes and images of image_shape (c, H, W).

    arch: small_cnn, lenet, or a classifier of torchvision by name (resnet18, resnet50, vit_b_16, ...).
    weights, for torchvision's: "imagenet" (its default weights, downloaded), "none" (random), or a file with a state
    dict; None is "imagenet". Raises InputError where one of these does not exist or does not fit.
    """
    channels, *sides = image_shape
    if arch in SMALL:
        if weights not in (None, "none"):
            raise InputError(f"--weights {weights}: there are no pretrained weights for {arch}; leave the flag out")
        backbone, features = SMALL[arch](channels, sides[0])
        return Classifier(backbone, nn.Linear(features, classes), [0.5] * channels, [0.5] * channels)
    if arch not in torchvision.models.list_models(torchvision.models):
        known = ", ".join([*SMALL, "resnet18", "resnet50", "vit_b_16"])
        raise InputError(f"--arch {arch}: unknown; choose {known} or another classifier of torchvision")
    if arch.startswith("vit") and sides != [224, 224]:
        raise InputError(f"--arch {arch}: needs images of 224x224, these are {sides[0]}x{sides[1]}")
    try:
        backbone = torchvision.models.get_model(arch, weights="DEFAULT" if weights in (None, "imagenet") else None)
    except OSError as error:
        raise InputError(
            f"--weights imagenet: torchvision's weights for {arch} could not be downloaded ({error}); "
            "pass a state dict as --weights FILE, or --weights none to start from a random network"
        ) from error
    if weights not in (None, "imagenet", "none"):
        load_state(backbone, read_checkpoint(weights, "--weights"), f"--weights {weights}")
    name, last = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)][-1]
    backbone.set_submodule(name, nn.Identity())
    return Classifier(backbone, nn.Linear(last.in_features, classes), IMAGENET_MEAN, IMAGENET_STD)


def batchnorms(model):
    """The model's BatchNorm layers."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# ------------------------------------------------------------------------------------------ device and files


def device_and_amp(device, amp):
    """(torch.device, autocast dtype or None) for --device auto|cpu|cuda|cuda:N|mps and --amp auto|bfloat16|float16|off.

    auto: CUDA where there is one; there bfloat16 where it is supported, else float16; float32 anywhere else.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the device meta holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error
    if amp == "auto" and torch.device(device).type == "cuda":
        amp = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32; no effect on a CPU
    torch.backends.cudnn.allow_tf32 = True
    return torch.device(device), None if amp in ("auto", "off") else getattr(torch, amp)


def load_state(model, state, where):
    """model.load_state_dict, with an InputError that lists keys that are missing, unexpected, of another shape or not
    finite."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    its = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()} if isinstance(state, dict) else {}
    both = [key for key in own if key in its and own[key] != its[key]]
    problems = {
        "missing": [key for key in own if key not in its],
        "unexpected": [key for key in its if key not in own],
        "of another shape": [f"{key} {its[key]}, not {own[key]}" for key in both],
        "not finite": [key for key in its if torch.is_tensor(state[key]) and not state[key].isfinite().all()],
    }
    if any(problems.values()):
        listed = [f"{kind}: {', '.join(keys[:6])}{' ...' * (len(keys) > 6)}" for kind, keys in problems.items() if keys]
        raise InputError(f"{where}: does not fit the model; {'; '.join(listed)}")
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------ source model


def train_source(model, task, seed, checkpoint, steps, batch_size, lr, backbone_lr):
    """Train on all classes of the source domain: cross-entropy, SGD with nesterov momentum, cosine schedule. Goes on
    from the Checkpoint where it has a content."""
    device = model.mean.device
    batches = task.source_train.batches(batch_size, device, seed)
    rates = [{"params": model.backbone.parameters(), "lr": backbone_lr}, {"params": model.head.parameters(), "lr": lr}]
    optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp is torch.float16)
    threads = torch.get_num_threads()
    if device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < 1_000_000:
        torch.set_num_threads(1)  # costs little, and the weights do not depend on how many cores there are
    first, losses = (checkpoint.content or {}).get("steps", 0), []
    checkpoint.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    model.train()
    bar = tqdm(range(first, steps), f"source model on {task.source}", initial=first, total=steps, unit="step")
    for step in bar:
        images, labels = batches(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(loss.detach())
        if checkpoint.due() or step == steps - 1:
            check_progress(checkpoint, torch.stack(losses).tolist(), step + 1, lr, backbone_lr)
            checkpoint.save(steps=step + 1)
            losses = []
    interruptible()
    torch.set_num_threads(threads)
    correct = predict(model, task.source_test.images).argmax(1) == task.source_test.labels.numpy()
    print(f"source model: {100 * correct.mean():.2f} % on {len(correct)} test images of {task.source}")


def source_model(task, arch, device="cpu", amp=None, weights=None, checkpoint=None, seed=0, cache="runs"):
    """The Classifier that knows all of task.classes in the source domain, in eval mode, on the device.

    checkpoint: a file with {"model": state dict, "classes": names}, as runs and this function write it, or with a bare
    state dict. Otherwise it is read from the folder cache/source_models, or trained on task.source_train and put
    there, under a key of everything that determines it; of several processes one trains and the others wait. Raises
    InputError if the checkpoint does not fit, or the cached file is not what was put there.
    """
    shape = tuple(task.source_train.images.shape[1:])
    if checkpoint is not None:
        model, path, key = build(arch, len(task.classes), shape, "none"), Path(checkpoint), None
    else:
        torch.manual_seed(seed)
        model = build(arch, len(task.classes), shape, weights)
        recipe = {"version": SOURCE_VERSION, "arch": arch, "seed": seed, "amp": str(amp), **task.source_recipe}
        recipe |= {"weights": weights, "augmentation": task.source_train.augmentation, "classes": task.classes}
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        key.update(task.source_train.images.numpy().tobytes() + task.source_train.labels.numpy().tobytes())
        key = key.hexdigest()
        path = Path(cache) / "source_models" / f"{task.dataset}-{task.source}-{arch}-{key[:16]}.pt"
    model = model.to(device, memory_format=torch.channels_last)
    model.amp = amp
    unfinished = path.with_suffix(".unfinished") if key else None
    if key and (unfinished.exists() or not path.exists()):
        lock = take_lock(path.with_suffix(".lock"), f"{path.stem}*")
        if lock is None:
            print(f"another process trains the source model {path}: waiting for it", flush=True)
            lock = take_lock(path.with_suffix(".lock"), f"{path.stem}*", wait=True)
        try:
            if not path.exists():
                train_source(model, task, seed, Checkpoint(unfinished, {"key": key}), **task.source_recipe)
                content = {"model": model.state_dict(), "classes": task.classes, "arch": arch, "key": key}
                write_checkpoint(path, content)
            unfinished.unlink(missing_ok=True)
        except torch.OutOfMemoryError as error:
            size = task.source_recipe["batch_size"]
            raise InputError(
                f"source model, batches of {size} images: {device} is out of memory; use another"
            ) from error
        finally:
            lock.release()
    saved, where = read_checkpoint(path, "--source-checkpoint"), f"--source-checkpoint {path}"
    if key and not (isinstance(saved, dict) and saved.get("key") == key):
        raise InputError(f"{path}: not the source model that was put there; delete it, to train it again")
    if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
        if list(saved.get("classes", task.classes)) != list(task.classes):
            raise InputError(f"{where}: its classes or their order are not those of {task.dataset}")
        saved = saved["model"]
    load_state(model, saved, where)
    return model.eval()
