"""An adapted model on new images, and its export.

    python predict.py RUN photos/ more.jpg list.txt --out predictions.csv
    python predict.py RUN --export onnx
    model = predict.load(RUN)           # in a program of your own: model(images), model.classes, model.seen

RUN is a run's folder or its model.pt. predictions.csv has a line per image: file, class, probability, group (whether
the class was seen in training), runner_up. A start that was stopped goes on with the same command.
"""

import copy
import csv
import hashlib
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn
from tqdm import tqdm

import models
from data.decode import read_image
from data.folder import EXTENSIONS, entries
from files import InputError, fail, first_line, load_state, make_folder, read_checkpoint, write_atomic

COLUMNS = ("file", "class", "probability", "group", "runner_up")


@dataclass
class PredictArgs:
    run: tyro.conf.Positional[Path]  # a run's folder, or its model.pt
    images: tyro.conf.Positional[
        tuple[Path, ...]
    ] = ()  # images, folders of them at any depth, .txt files with a path per line
    out: Path = Path("predictions.csv")  # the predictions
    export: Literal["none", "onnx", "pt2", "state-dict"] = "none"  # write the model itself, beside its model.pt
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    amp: Literal["auto", "bfloat16", "float16", "off"] = "auto"  # autocast; the run's own is not kept
    batch_size: int = 64  # images at a time
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False  # write anew what is there


def load(run, device="cpu", amp="off"):
    """The Classifier that a run saved, in eval mode, with its classes, seen (bool [C]), arch, image_size and channels.

    run: its folder or its model.pt. Raises InputError if that is not the model of a run.
    """
    path = Path(run) / "model.pt" if Path(run).is_dir() else Path(run)
    saved = read_checkpoint(path, "model")
    try:
        classes, arch = saved["classes"], saved["arch"]
        side, channels = saved["image_size"], saved["channels"]
        model = models.build(arch, len(classes), (channels, side, side), "none")
        load_state(model, saved["model"], f"model {path}")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the model of a run ({error!r} is missing); run it again with this version"
        ) from error
    device, model.amp = models.choose_device(device, amp, arch)
    model.classes, model.seen, model.arch = classes, torch.tensor(saved["seen"]), arch
    model.image_size, model.channels = side, channels
    return model.to(device, memory_format=torch.channels_last).eval()


# ------------------------------------------------------------------------------------------ predictions


def images_below(folder, above=()):
    """The image files at any depth in a folder, sorted. Follows links; leaves out what is hidden."""
    above, found = (*above, folder.resolve()), []
    for path in (folder / name for name in entries(folder)):
        if path.is_dir() and path.resolve() not in above:  # a link may lead back
            found += images_below(path, above)
        elif path.suffix.lower() in EXTENSIONS:
            found.append(path)
    return found


def find_images(paths):
    """The image files that `paths` name: images, folders, and .txt files with a path per line; each once, in order.

    Raises InputError if one of `paths` does not exist. Paths in a .txt file are not checked here.
    """
    found = []
    for path in paths:
        if path.is_dir():
            found += images_below(path)
        elif path.suffix == ".txt" and path.is_file():
            lines = path.read_text("utf-8-sig", errors="surrogateescape").splitlines()
            found += [Path(line.strip()) for line in lines if line.strip()]
        elif path.exists():
            found.append(path)
        else:
            raise InputError(f"{path}: no such image, folder or list")
    return list(dict.fromkeys(map(str, found)))


def decode(file, model):
    """(file, uint8 [channels, side, side], as the run's images were decoded), or (file, why it cannot be read)."""
    try:
        pixels = read_image(file, model.image_size, "crop" if model.arch.startswith("clip:") else "squash")
    except ValueError as error:
        return file, str(error)
    if model.channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return file, torch.from_numpy(pixels.copy()).movedim(2, 0)


def predict_rows(model, files, images):
    """A row of COLUMNS for each of the images, uint8 [N, channels, side, side]."""
    logits = models.predict(model, images)
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    order = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    rows = []
    for file, p, (best, second) in zip(files, probabilities, order, strict=True):
        group = "seen" if model.seen[best] else "unseen"
        rows.append((file, model.classes[best], f"{p[best]:.6f}", group, model.classes[second]))
    return rows


def predict(model, files, part, batch_size):
    """Append rows to the CSV file `part` for those of the files that it lacks; returns {file: why} of unreadable ones.

    Rows are written a whole batch at a time, so a process that is killed leaves at most its last line cut.
    """
    done = whole_rows(part)
    waiting = [file for file in files if file not in done]
    bad = {}
    with open(part, "ab") as stream, ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(waiting), batch_size), "predicting", unit="batch"):
            decoded = list(pool.map(lambda file: decode(file, model), waiting[start : start + batch_size]))
            bad |= {file: why for file, why in decoded if isinstance(why, str)}
            good = [(file, pixels) for file, pixels in decoded if not isinstance(pixels, str)]
            if good:
                rows = predict_rows(model, [file for file, _ in good], torch.stack([pixels for _, pixels in good]))
                stream.write(csv_bytes(rows))
                stream.flush()
    return bad


def csv_bytes(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def whole_rows(part):
    """The files of the rows in `part`, from which a row that is cut is taken away."""
    if not part.exists():
        return set()
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    while whole.count(b'"') % 2:  # cut within a file's name that has a line break
        whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
    if len(whole) < len(content):
        write_atomic(part, lambda stream: stream.write(whole))
    return {row[0] for row in csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape"), newline=""))}


def write_predictions(args, model):
    """Predict args.images into args.out, which gets its name when it is complete. Raises InputError if it is there."""
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out}: exists already; pass --overwrite or another --out")
    files = find_images(args.images)
    if not files:
        raise InputError(f"{', '.join(map(str, args.images))}: no image in it")
    digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values()))
    part = args.out.with_name(f".{args.out.name}.{digest.hexdigest()[:12]}.part")  # another model's is another file
    make_folder(args.out.parent)
    try:
        bad = predict(model, files, part, args.batch_size)
    except OSError as error:
        raise InputError(f"{part}: cannot be written ({error.strerror}); the same command goes on") from error
    for file, why in bad.items():
        print(f"skipped {file}: {why}", file=sys.stderr)
    wanted, rows = set(files), csv.reader(io.StringIO(part.read_bytes().decode("utf-8", "surrogateescape"), newline=""))
    kept = [row for row in rows if row[0] in wanted]
    write_atomic(args.out, lambda stream: stream.write(csv_bytes([COLUMNS, *kept])))
    part.unlink()
    unseen = sum(row[3] == "unseen" for row in kept)
    print(f"{args.out}: {len(kept)} images, {unseen} of them of classes unseen in training; {len(bad)} skipped")


# ------------------------------------------------------------------------------------------ export


def original(model):
    """(network, state dict) as torchvision or timm name it, the model's head in its place."""
    if not isinstance(model.head_name, str):  # of some distilled ones timm has two
        raise InputError(f"--export state-dict: {model.arch} has no naming of its own; model.pt has its state dict")
    network, name = models.original(model.arch)
    head = network.get_submodule(name)
    head.weight = nn.Parameter(model.head.weight.reshape(-1, *head.weight.shape[1:]))  # a 1x1 convolution, perhaps
    head.bias = nn.Parameter(model.head.bias.clone())
    own = {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] == name}
    state = {**model.backbone.state_dict(), **own}
    load_state(network, state, f"--export state-dict: {model.arch}")
    return network.eval(), state


def export(model, kind, path):
    """Write the model to `path`, after comparing the export with it on a random batch. Raises InputError if the logits
    differ by more than 1e-4 * max(1, largest absolute logit).

    onnx and pt2 take float images [N, channels, side, side] in [0, 1] and give logits [N, C], for any N.
    """
    model = copy.deepcopy(model).float().cpu()  # predictions may follow, on another device
    model.amp, images = None, torch.rand(3, model.channels, model.image_size, model.image_size)
    new = path.with_name(f".new.{path.name}")
    about = {"classes": model.classes, "seen": model.seen.tolist(), "image_size": model.image_size}
    about["preprocessing"] = "RGB or gray, resized to the square, values from 0 to 1; mean and std are in the model"
    with torch.no_grad():
        want = model(images)
        if kind == "onnx":
            got = export_onnx(model, images, new, about)
        elif kind == "pt2":
            batch = torch.export.Dim("batch")
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
            extra = {"about.json": json.dumps(about)}
            write_atomic(new, lambda stream: torch.export.save(program, stream, extra_files=extra))
            got = torch.export.load(new).module()(images)
        else:
            network, state = original(model)
            write_atomic(new, lambda stream: torch.save(state, stream))
            got = network((images.expand(-1, model.mean.shape[1], -1, -1) - model.mean) / model.std)
    gap = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    if gap > 1e-4:
        new.unlink()
        raise InputError(f"--export {kind}: what was written differs from the model by {gap:.2g}; it was deleted")
    os.replace(new, path)
    print(f"{path}: written, and equal to the model up to {gap:.1g}")


def export_onnx(model, images, path, about):
    """Write the ONNX file; returns the logits that onnxruntime gives."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError("--export onnx: needs packages that are optional: pip install onnx onnxruntime") from error
    stream = io.BytesIO()
    names = {"input_names": ["images"], "output_names": ["logits"]}
    dynamic = {"images": {0: "batch"}, "logits": {0: "batch"}}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # ONNX knows no name for an attention in one piece
    try:
        torch.onnx.export(model, (images,), stream, dynamic_axes=dynamic, dynamo=False, **names)
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise InputError(f"--export onnx: {first_line(error)}; try --export pt2") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    content = onnx.load_from_string(stream.getvalue())
    for key, value in about.items():
        content.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    write_atomic(path, lambda stream: stream.write(content.SerializeToString()))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "state-dict": ".state_dict.pt"}

if __name__ == "__main__":
    args = tyro.cli(PredictArgs, description=__doc__)
    try:
        if args.batch_size < 1:
            raise InputError(f"--batch-size {args.batch_size}: must be at least 1")
        model = load(args.run, args.device, args.amp)
        if args.export != "none":
            path = (args.run if args.run.is_dir() else args.run.parent) / f"model{SUFFIX[args.export]}"
            if path.exists() and not args.overwrite:
                raise InputError(f"{path}: exists already; pass --overwrite")
            export(model, args.export, path)
        if args.images:
            write_predictions(args, model)
        elif args.export == "none":
            raise InputError("name images to predict, or pass --export")
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
