"""A Classifier (backbone and linear head) and the source model that adaptation starts from.

logits, features = source_model(task, "small_cnn")(images, return_features=True)
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import files
from files import Checkpoint, InputError, Stop, first_line, read_checkpoint, take_lock, write_checkpoint

SOURCE_VERSION = 3  # raise it when a change below makes another source model from the same arguments


class Classifier(nn.Module):
    """logits = head(backbone((images - mean) / std)); mean and std, a value per channel, belong to the model.

    forward(images): uint8, or float in [0, 1], [N, 1 or 3, H, W]; one channel is repeated where mean has three.
    Returns float32 logits [N, C] and, with return_features, the head's input, features [N, D]; float64 after .double().
    amp: the dtype that the backbone is autocast to, or None. The head never is.
    head_name: what torchvision or timm call the head, None where the network is not theirs.
    """

    def __init__(self, backbone, head, mean, std, head_name=None):
        super().__init__()
        self.backbone, self.head, self.amp, self.head_name = backbone, head, None, head_name
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images, return_features=False):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            features = self.backbone((images - self.mean) / self.std)
        if self.amp is not None:
            features = features.float()
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 has steps of 0.125 between 16 and 32
            logits = self.head(features)
        return (logits, features) if return_features else logits


def evaluation_batch(device, image_shape):
    """The number of images (c, H, W) to evaluate at a time: fewer if they are larger. On a CPU 4 to 64, so that a batch
    stays in the cache; elsewhere 16 to 512, and 512 up to 3x224x224."""
    fewest, most, values = (4, 64, 600_000) if device.type == "cpu" else (16, 512, 512 * 3 * 224 * 224)
    return min(most, max(fewest, values // image_shape.numel()))


@torch.inference_mode()
def predict(model, images, return_features=False, batch_size=None):
    """float32 logits [N, C] of a Classifier in eval mode for uint8 images [N, c, H, W], as a numpy array. With
    return_features also the float32 features [N, D]. Every module gets its mode back. A compiled model runs eagerly.
    batch_size: None takes evaluation_batch's. It is halved while memory is short; at 1 that raises OutOfMemoryError."""
    was_training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    cuda = device.type == "cuda"  # there nothing waits for a copy from pinned memory: the next batch is read meanwhile
    size, parts = batch_size or evaluation_batch(device, images.shape[1:]), None
    model.eval()
    while parts is None:
        batches = (batch.pin_memory() if cuda else batch for batch in images.split(size))
        batches = (batch.to(device, non_blocking=cuda, memory_format=torch.channels_last) for batch in batches)
        try:
            with torch.compiler.set_stance("force_eager"):  # new batch sizes would make the training graph dynamic
                parts = [model(batch, return_features) for batch in batches]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
    for module, training in was_training.items():
        module.training = training
    if not return_features:
        return torch.cat(parts).cpu().numpy()
    logits, features = zip(*parts, strict=True)
    return torch.cat(logits).cpu().numpy(), torch.cat(features).cpu().numpy()


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

    arch: small_cnn, lenet, a classifier of torchvision by name (resnet18, vit_b_16, ...), timm:NAME or clip:NAME.
    weights: None or imagenet (the package's default weights, downloaded), none (random), or a file with a state dict.
    SMALL: None or none, both random. clip: see clip_classifier. Raises InputError if one is unknown or does not fit.
    """
    channels, *sides = image_shape
    if arch.startswith("clip:"):
        return clip_classifier(arch, classes, sides, weights)
    if arch in SMALL:
        if weights not in (None, "none"):
            raise InputError(f"--weights {weights}: there are no pretrained weights for {arch}; leave the flag out")
        backbone, features = SMALL[arch](channels, sides[0])
        return Classifier(backbone, nn.Linear(features, classes), [0.5] * channels, [0.5] * channels)
    return pretrained_classifier(arch, classes, sides, weights)


def original(arch, weights="none"):
    """(A network as torchvision or timm make it, with their head; what they call the head). See build."""
    pretrained = weights in (None, "imagenet")
    if arch.startswith("timm:"):
        timm, name = load(arch, importlib.import_module, "timm"), arch.removeprefix("timm:")
        if not timm.is_model(name.partition(".")[0]):
            raise InputError(f"--arch {arch}: timm {timm.__version__} has no such model; see timm.list_models()")
        network = load(arch, timm.create_model, name, pretrained=pretrained)
        head = network.pretrained_cfg["classifier"]
    else:
        import torchvision  # takes a second, so only where one is asked for

        if arch not in torchvision.models.list_models(torchvision.models):
            known = "small_cnn, lenet, resnet18, vit_b_16, another of torchvision's classifiers, timm:NAME or clip:NAME"
            raise InputError(f"--arch {arch}: unknown; choose {known}")
        how = {"weights": "DEFAULT" if pretrained else None}
        if arch.startswith("vit"):  # without weights torchvision assumes 224 pixels; vit_h_14's weights are for 518
            how["image_size"] = torchvision.models.get_model_weights(arch).DEFAULT.transforms().crop_size[0]
        network = load(arch, torchvision.models.get_model, arch, **how)
        heads = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not heads or hasattr(network, "aux_logits"):  # squeezenet; googlenet and inception_v3, which have three
            raise InputError(f"--arch {arch}: does not end in one linear head; choose resnet50, or timm:NAME")
        head = heads[-1]
    if weights not in (None, "imagenet", "none"):
        files.load_state(network, read_checkpoint(weights, "--weights"), f"--weights {weights}")
    return network, head


def pretrained_classifier(arch, classes, sides, weights):
    """The Classifier of a network of torchvision or timm, a new head in place of its own. See build."""
    network, head = original(arch, weights)
    if arch.startswith("timm:"):
        network.reset_classifier(0)
        config = network.pretrained_cfg
        if config.get("fixed_input_size"):
            check_sides(arch, sides, list(config["input_size"][1:]))
    else:
        import torchvision

        preset = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        config = {"mean": preset.mean, "std": preset.std}
        network.set_submodule(head, nn.Identity())
        if arch.startswith("vit"):
            check_sides(arch, sides, [network.image_size] * 2)
    try:
        with torch.no_grad():  # some have more layers before the head than their num_features says
            features = network.eval()(torch.zeros(1, 3, *sides)).shape[1]
    except RuntimeError as error:
        size = f"{'x'.join(map(str, sides))}, see --image-size"
        raise InputError(f"--arch {arch}: does not take images of {size} ({first_line(error)})") from error
    return Classifier(network.train(), nn.Linear(features, classes), config["mean"], config["std"], head)


def check_sides(arch, sides, wanted):
    """Raise InputError if images of the sides [H, W] are not of the wanted ones."""
    if list(sides) != list(wanted):
        needs = f"needs images of {'x'.join(map(str, wanted))}, these are {'x'.join(map(str, sides))}"
        raise InputError(f"--arch {arch}: {needs}; photographs take --image-size {wanted[0]}")


def load(arch, create, *args, **kwargs):
    """create(...) of a package that is optional, or of one that downloads. Raises InputError if it does not come."""
    try:
        return create(*args, **kwargs)
    except ImportError as error:
        raise InputError(f"--arch {arch}: needs an optional package: pip install timm open_clip_torch") from error
    except (OSError, RuntimeError) as error:
        what = f"--weights: the pretrained ones of {arch} could not be downloaded ({first_line(error)})"
        raise InputError(f"{what}; pass --weights FILE, a state dict, or --weights none for random ones") from error


class ClipImages(nn.Module):
    """The image tower of a CLIP; features have L2 norm 1. Images of another size, CIFAR's, are enlarged to its own."""

    def __init__(self, visual):
        super().__init__()
        side = visual.image_size  # of a ResNet a number
        self.visual, self.size = visual, (side, side) if isinstance(side, int) else tuple(side)

    def forward(self, images):
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return F.normalize(self.visual(images), dim=-1)


def clip_classifier(arch, classes, sides, weights=None, names=None, device="cpu"):
    """The Classifier of clip:NAME with a new head, for images [3, *sides]: CLIP's own sides, or at most 32 (CIFAR's).
    names: with the classes' names it is CLIP's zero-shot classifier. A row of the head is a name's mean embedding in
    OpenAI's 80 ImageNet templates, times the logit scale; for some sets OpenAI published other templates. Images are
    cropped; open_clip squashes those of some later models. weights: an open_clip tag (None: openai), a file, or none.
    """
    open_clip, name = load(arch, importlib.import_module, "open_clip"), arch.removeprefix("clip:")
    if name not in open_clip.list_models():
        raise InputError(f"--arch {arch}: open_clip has no such model; it has {', '.join(open_clip.list_models())}")
    if name.startswith("coca"):
        raise InputError(f"--arch {arch}: gives tokens beside its features and is not offered; take clip:ViT-B-32")
    file, tag = Path(weights or "").is_file(), None if weights == "none" else weights or "openai"
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not file and tag not in (None, *tags):
        raise InputError(f"--weights {tag}: neither a file nor a tag of open_clip's {name}; it has {', '.join(tags)}")
    config = open_clip.get_model_config(name)
    quick = bool(config.get("quick_gelu"))
    if not file and tag and bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")) != quick:
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"  # fits, and gives worse features
        raise InputError(f"--arch {arch}: has another activation than the weights {tag}; take clip:{other}")
    if max(sides) > 32:  # CIFAR's images are arrays, which --image-size cannot change
        check_sides(arch, sides, [config["vision_cfg"]["image_size"]] * 2)
    model = load(arch, open_clip.create_model, name, None if file else tag).eval()
    if file:
        files.load_state(model, read_checkpoint(weights, "--weights"), f"--weights {weights}")
    head = nn.Linear(config["embed_dim"], classes)
    if names:
        # AnnualCrop becomes annual crop, apartment_building/outdoor becomes apartment building outdoor
        names = [re.sub(r"(?<=[a-z])(?=[A-Z])|[_/]", " ", label).lower() for label in names]
        tokenize, templates = open_clip.get_tokenizer(name), open_clip.OPENAI_IMAGENET_TEMPLATES
        model.to(device)
        columns = open_clip.build_zero_shot_classifier(model, tokenize, names, templates, device=device, use_tqdm=True)
        rows = model.logit_scale.exp() * columns.T
        head.load_state_dict({"weight": rows, "bias": torch.zeros(classes)})
    return Classifier(ClipImages(model.visual), head, model.visual.image_mean, model.visual.image_std)


def batchnorms(model):
    """The model's BatchNorm layers."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def choose_device(device, amp, arch):
    """(torch.device, autocast dtype or None) for --device, --amp and a network's name. The device auto is CUDA where
    there is one. amp auto is autocast_dtype's, but float32 for SMALL, which gain little. Raises InputError if the
    device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the device meta holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: not available here ({first_line(error)})") from error
    device = torch.device(device)
    if amp == "auto" and arch not in SMALL:
        return device, autocast_dtype(device)
    return device, None if amp in ("auto", "off") else getattr(torch, amp)


def autocast_dtype(device):
    """The dtype to autocast to on this device: bfloat16 if its hardware multiplies in it (a CPU: AVX512-BF16 or AMX),
    float16 on any other CUDA GPU, None (no autocast) elsewhere."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # is_bf16_supported is about the current device
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    can = getattr(torch.cpu, "get_capabilities", dict)()  # an old torch cannot say
    fast = device.type == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
    return torch.bfloat16 if fast else None


def tune_process():
    """Make this process train faster, in two ways. CUDA multiplies float32 matrices in TF32 (10 of 23 mantissa bits),
    with --amp off too, unless the environment has NVIDIA_TF32_OVERRIDE=0. And glibc keeps the memory that a step frees,
    in blocks up to 32 MB, for the next step; by default the system maps and clears most of it anew at every step."""
    torch.set_float32_matmul_precision("high")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, from malloc.h
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


# ------------------------------------------------------------------------------------------ source model


def train_source(model, task, seed, checkpoint, resident, steps, batch_size, lr, backbone_lr):
    """Train on all classes of the source domain: cross-entropy, SGD with nesterov momentum, cosine schedule. Goes on
    from the Checkpoint where it has a content."""
    device = model.mean.device
    batch_size = min(batch_size, len(task.source_train.labels))
    resident = "off" if resident == "off" else "auto"
    batches = task.source_train.batches(batch_size, device, seed, resident=resident)
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
    for step in tqdm(range(first, steps), f"source model on {task.source}", initial=first, total=steps, unit="step"):
        images, labels = batches(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(loss.detach())
        if checkpoint.due() or step == steps - 1:
            advice = f"--source-lr {lr} and --source-backbone-lr {backbone_lr}: try lower ones or --amp off"
            checkpoint.check_finite(torch.stack(losses).tolist(), step + 1, advice)
            checkpoint.save(steps=step + 1)
            losses = []
    checkpoint.stop.release()
    torch.set_num_threads(threads)
    if len(task.source_test.labels):
        correct = predict(model, task.source_test.images).argmax(1) == task.source_test.labels.numpy()
        print(f"source model: {100 * correct.mean():.2f} % on {len(correct)} test images of {task.source}")


def source_key(task, arch, weights, seed, device, amp):
    """A name for all that determines a source model, but for its last bits: those depend on the machine, and on CUDA on
    chance too (cudnn.deterministic is not set)."""
    recipe = {"version": SOURCE_VERSION, "arch": arch, "seed": seed, "amp": str(amp), **task.source_recipe}
    recipe |= {"weights": weights, "classes": task.classes}
    if device.type != "cpu":
        recipe["device"] = device.type
    if weights is not None and Path(weights).is_file():
        recipe["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    if not arch.startswith("clip:"):
        images, labels = task.source_train.images, task.source_train.labels
        key.update(json.dumps(task.source_train.augmentation, sort_keys=True).encode())
        key.update(images.numpy().ravel() if isinstance(images, torch.Tensor) else images.fingerprint())
        key.update(labels.numpy().tobytes())
    return key.hexdigest()


def train_once(model, task, seed, path, key, arch, stop, resident):
    """Train the source model, unless it comes with its weights, and put it into the file `path`. Of several processes
    one does so and the others wait. Raises InputError where the device has too little memory."""
    unfinished, own = path.with_suffix(".unfinished"), f"{path.stem}*"
    lock = take_lock(path.with_suffix(".lock"), own)
    if lock is None:
        print(f"another process trains the source model {path}: waiting for it", flush=True)
        lock = take_lock(path.with_suffix(".lock"), own, wait=True)
    try:
        if not path.exists():
            if not arch.startswith("clip:"):
                checkpoint = Checkpoint(unfinished, {"key": key}, stop)
                train_source(model, task, seed, checkpoint, resident, **task.source_recipe)
            write_checkpoint(path, {"model": model.state_dict(), "classes": task.classes, "arch": arch, "key": key})
        unfinished.unlink(missing_ok=True)
    except torch.OutOfMemoryError as error:
        size, device = task.source_recipe.get("batch_size"), model.mean.device
        advice = "lower --source-batch-size, or pass --resident off"
        raise InputError(f"source model, batches of {size} images: {device} is out of memory; {advice}") from error
    finally:
        lock.release()


def renamed(state, model, where):
    """The state dict with torchvision's or timm's names replaced by the Classifier's, with the model's mean and std.
    Any other state dict is returned as is. Raises InputError at two heads, or a head for another number of classes."""
    if isinstance(model.head_name, tuple) and all(f"{name}.weight" in state for name in model.head_name):
        raise InputError(f"{where}: has two heads ({', '.join(model.head_name)}); distilled networks are not offered")
    head = f"{model.head_name}.weight"
    if head not in state or "mean" in state:
        return state
    if len(state[head]) != len(model.head.weight):
        raise InputError(f"{where}: a head for {len(state[head])} classes; there are {len(model.head.weight)}")
    own = {f"backbone.{key}": value for key, value in state.items()} | {"mean": model.mean, "std": model.std}
    own["head.weight"] = own.pop(f"backbone.{head}").flatten(1)  # some are a 1x1 convolution of pooled features
    own["head.bias"] = own.pop(f"backbone.{model.head_name}.bias", torch.zeros(len(state[head])))  # some have none
    return own


def load_source(model, path, key, task):
    """Load a source model's file into `model`: {"model": state dict, "classes": names}, or a bare state dict, which is
    taken to be over the task's classes. Its names are the Classifier's, torchvision's or timm's. key: the source_key of
    a file that train_once wrote, None for the user's file. Raises InputError if the file has another key or other
    classes, or does not fit."""
    flag = "--source-checkpoint" if key is None else "source model"
    saved, where = read_checkpoint(path, flag), f"{flag} {path}"
    saved = saved if isinstance(saved, dict) else {}
    if key is not None and saved.get("key") != key:
        raise InputError(f"{path}: not the source model that was put there; delete it, to train it again")
    if isinstance(saved.get("classes"), list) and saved["classes"] != list(task.classes):
        raise InputError(f"{where}: its classes or their order are not those of {task.dataset}")
    files.load_state(model, renamed(files.bare_state(saved), model, where), where)


def source_model(
    task, arch, device="cpu", amp=None, weights=None, checkpoint=None, seed=0, cache="runs", stop=None, resident="auto"
):
    """The Classifier that knows all of task.classes in the source domain, in eval mode, on the device.

    checkpoint: the user's file, see load_source. Without one the model is read from the folder cache/source_models. If
    it is not there, it is trained on task.source_train (a CLIP is built from its weights) and saved there by its key.
    stop: a files.Stop. resident: as in Batches, for that training; on counts as auto, since source images are many.
    Raises InputError if the file does not fit the task or the architecture.
    """
    classes, shape, clip = task.classes, task.target_train.images.shape[1:], arch.startswith("clip:")
    if task.source_train is None and not clip and checkpoint is None:
        raise InputError(f"--arch {arch}: {task.dataset} has no source images, so it takes a clip:NAME")
    if checkpoint is not None and weights not in (None, "none"):
        raise InputError(f"--weights {weights}: the source model comes trained; leave it out")
    key, path = None, checkpoint
    if checkpoint is None:
        key = source_key(task, arch, weights, seed, torch.device(device), amp)
        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", f"{task.dataset}-{task.source}-{arch}-{key[:16]}")
        path = Path(cache) / "source_models" / f"{name}.pt"
    torch.manual_seed(seed)
    new = key is not None and not path.exists()
    if new and clip:
        model = clip_classifier(arch, len(classes), shape[1:], weights, classes, device)
    else:
        model = build(arch, len(classes), shape, weights if new else "none")
    model = model.to(device, memory_format=torch.channels_last)
    model.amp = amp
    if new or (key is not None and path.with_suffix(".unfinished").exists()):
        train_once(model, task, seed, path, key, arch, stop or Stop(), resident)
    load_source(model, path, key, task)
    return model.eval()
