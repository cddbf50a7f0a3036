"""What a step of every method costs, and how naive_ft stands against plain_loop.py, the loop everybody writes.

    python results/speed/measure.py --rounds 5

All in one run, in turns, as ratios: bare times of a busy machine say little.
"""

import contextlib
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
import data
import models
from benchmark import error_in
from eval import table
from files import InputError, fail, read_json, write_atomic
from limits import device_limits

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "naive_ft")
PLAIN_LOOP = ROOT / "results/speed/plain_loop.py"


@dataclass
class Speed:
    """A step of every method, and naive_ft against the plain loop and against the device's limits."""

    methods: tuple[str, ...] = tuple(METHODS)
    """scripts by name, each with flags of its own if quoted"""
    rounds: int = 5
    """how often everything is measured; the medians count"""
    steps: data.default(int, "60, on a GPU 1000") = None
    """training steps of the small CNN per measurement, after a first epoch of as many that does not count"""
    archs: tuple[str, ...] = ("resnet50",)
    """networks for photographs"""
    photos: int = 160
    """training images of 300x300 pixels, drawn; half as many to test on"""
    photo_steps: data.default(int, "6, on a GPU 100") = None
    """training steps on them per measurement, after a first epoch of as many that does not count"""
    batch_size: int = 32
    """photographs per step"""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """of all measurements"""
    format: Literal["md", "csv", "json"] = "md"
    """of the table"""
    out: Path = Path("results/speed")
    """folder for the table, as <device>.md and <device>.json"""


def row_of(what, ours, plain=None, invert=False):
    """A row of the table from the figures of all rounds: medians, and the spread of their ratios.

    The ratios are of ours to the plain loop's in the same round; with invert, of the plain loop's to ours.
    """
    row = {"what": what, "ours": float(np.median(ours))}
    if plain is None:
        return row | dict.fromkeys(("plain loop", "ratio", "least", "largest"))
    ratios = np.divide(plain, ours) if invert else np.divide(ours, plain)
    row |= {"plain loop": float(np.median(plain)), "ratio": float(np.median(ratios))}
    return row | {"least": float(min(ratios)), "largest": float(max(ratios))}


def timed(words):
    """Run Python with these words: (lines of its output, seconds, peak memory of its own process in MB).

    The memory is 0 where there is no /proc. Raises InputError, with the program's error.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        start, memory = time.perf_counter(), 0.0
        child = subprocess.Popen([sys.executable, *map(str, words)], stdout=output, stderr=errors, env=environment)
        while child.poll() is None:  # its resource usage would say no less than what this process once had
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                for peak in re.findall(r"VmHWM:\s*(\d+) kB", status):
                    memory = max(memory, int(peak) * 1.024e-3)
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise InputError(f"{shlex.join(map(str, words))}: {error_in(errors.read())}")
        return output.read().splitlines(), seconds, memory


def run_method(method, folder, flags):
    """Run a script in `folder`: (lines of its log, its done.json, seconds, peak memory in MB)."""
    script, *own_flags = shlex.split(method)
    words = [ROOT / "methods" / f"{script}.py", "--overwrite", "--no-save-model", "--runs-dir", folder]
    _, seconds, memory = timed([*words, *own_flags, *flags])
    done = max(Path(folder).rglob("done.json"), key=lambda path: path.stat().st_mtime_ns)
    log = [json.loads(line) for line in done.with_name("log.jsonl").read_text().splitlines()]
    return log, read_json(done), seconds, memory


def draw_photos(folder, count, side=300, classes=10):
    """Fill folder/DOMAIN/PART/CLASS/*.jpg, for the data set `folder`, with smooth random pictures.

    There are two domains; of the target there are `count` images to train on and half as many to test on.
    """
    rng = np.random.default_rng(0)
    for part, n in (("a/train", 2 * classes), ("a/test", classes), ("b/train", count), ("b/test", count // 2)):
        for i in range(n):
            small = rng.integers(0, 256, (side // 6, side // 6, 3), dtype=np.uint8)
            path = Path(folder, part, f"class{i % classes}", f"{i:05d}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def draw_digits(task, folder):
    """Write the target's images as the plain loop takes them: folder/{train,test}/DIGIT/*.png."""
    for part, split in (("train", task.target_train), ("test", task.target_test)):
        for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist(), strict=True)):
            path = Path(folder, part, task.classes[label], f"{i:05d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)


def step_costs(options, folder):
    """Rows: a step of every method as a ratio to naive_ft's, and lp_ft's probe as one to head updates."""
    flags = ["--epochs", 2, "--steps-per-epoch", options.steps, "--device", options.device]
    times = {method: [] for method in ("naive_ft", *options.methods)}
    for _ in tqdm(range(options.rounds), "steps of all methods", unit="round"):
        for method in times:
            log, done, _, _ = run_method(method, folder, flags)
            speeds = [line["images_per_second"] for line in log if line["images_per_second"]]
            times[method].append(1e3 * done["args"]["batch_size"] / speeds[-1])
    rows = [row_of(f"{method}: step, ms; naive_ft's", times[method], times["naive_ft"]) for method in options.methods]
    probes, updates = zip(*[probe_seconds(300) for _ in range(options.rounds)], strict=True)
    what = "lp_ft: 300 steps of the probe, s; of the head through the network"
    return [*rows, row_of(what, probes, updates, invert=True)]


def probe_seconds(steps):
    """Seconds of lp_ft's probe on stored features, and of the same head updates through the network.

    Of the network only the head has gradients. On the default task, on a CPU.
    """
    task = data.load_task(data.TaskArgs("digits"))
    fit_head = runpy.run_path(str(ROOT / "methods" / "lp_ft.py"))["fit_head"]
    model = models.build("small_cnn", len(task.classes), task.target_train.images.shape[1:])
    model = model.to(memory_format=torch.channels_last)
    _, features = models.predict(model, task.target_train.images, return_features=True)
    batches, rng = task.target_train.batches(64, "cpu", seed=0), torch.Generator().manual_seed(0)
    start = time.perf_counter()
    fit_head(model.head, torch.from_numpy(features), task.target_train.labels, steps, 64, 0.005, 5e-4, rng)
    middle = time.perf_counter()
    model.eval().backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.005, 0.9, nesterov=True, weight_decay=5e-4, fused=True)
    for step in range(steps):
        images, labels = batches(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return middle - start, time.perf_counter() - middle


def whole_runs(options, folder):
    """Row: a run of naive_ft on the default task, from the command to its end, and the plain loop's."""
    task, images = data.load_task(data.TaskArgs("digits")), Path(folder) / "digits_as_files"
    draw_digits(task, images)
    plain = [PLAIN_LOOP, images / "train", images / "test", "--device", options.device, "--classes", len(task.classes)]
    plain += ["--augmentation", "ink", "--image-size", 28, "--bn-mode", "eval"]
    for name in ("arch", "batch_size", "epochs", "steps_per_epoch", "lr"):
        plain += [f"--{name.replace('_', '-')}", task.recipe[name]]
    run_method("naive_ft", folder, ["--device", options.device])  # from here on the source model is in the cache
    ours, theirs = [], []
    for _ in tqdm(range(options.rounds), "whole runs on digits", unit="round"):
        ours.append(run_method("naive_ft", folder, ["--device", options.device])[2])
        theirs.append(timed(plain)[1])
    return [row_of("digits, small CNN: whole run, s", ours, theirs, invert=True)]


def photographs(arch, options, folder):
    """Rows: naive_ft against the plain loop on JPEG files, peak memory with more of them, and the device's limits."""
    few, many = Path(folder) / "photos", Path(folder) / "more_photos"
    if not few.exists():
        draw_photos(few, options.photos)
        draw_photos(many, 10 * options.photos)
    source = Path(folder) / f"{arch}.pt"
    state = models.build(arch, 10, (3, 224, 224), "none").state_dict()
    torch.save({"model": state, "classes": [f"class{i}" for i in range(10)]}, source)
    common = ["--arch", arch, "--batch-size", options.batch_size, "--device", options.device, "--bn-mode", "train"]
    flags = ["--dataset", "folder", "--source", "a", "--target", "b", "--seen-classes", 5, "--oracle"]
    flags += ["--source-checkpoint", source, *common]
    run_method("naive_ft", folder, ["--data-root", few, *flags, "--epochs", 1, "--steps-per-epoch", 1])  # the cache
    what = f"{arch}, {options.batch_size} JPEGs of 300 px"
    rows = against_plain_loop(what, arch, few, common, flags, options, folder)
    memory = {few: [], many: []}
    for _ in range(options.rounds):
        for root in (few, many):
            run = run_method("naive_ft", folder, ["--data-root", root, *flags, "--epochs", 1, "--steps-per-epoch", 2])
            memory[root].append(run[3])
    more = f"{what}: peak memory with {10 * options.photos} images, MB; with {options.photos}"
    rows.append(row_of(more, memory[many], memory[few]))
    shares = device_limits(arch, few, options.device, options.batch_size, options.rounds)
    return rows + [row_of(name, figures) for name, figures in shares.items()]


def against_plain_loop(what, arch, root, common, flags, options, folder):
    """Rows: training and evaluation on photographs in each precision, and peak memory."""
    length = ["--epochs", 2, "--steps-per-epoch", options.photo_steps]
    _, autocast = models.choose_device(options.device, "auto", arch)
    dtypes = {"auto": autocast, "off": torch.float32} if autocast else {"off": torch.float32}
    names = ("training, images/s, data included", "evaluation, images/s")
    names += ("peak memory of the process, MB (without workers)",)
    ours, plain = {amp: [] for amp in dtypes}, []
    for _ in tqdm(range(options.rounds), f"{arch} on photographs", unit="round"):
        output, _, memory = timed([PLAIN_LOOP, root / "b/train", root / "b/test", *common, *length])
        last = json.loads(output[-1])
        speeds = [last[f"{part}_images"] / last[f"{part}_seconds"] for part in ("train", "test")]
        plain.append([*speeds, memory])
        for amp in dtypes:
            log, _, _, memory = run_method("naive_ft", folder, ["--data-root", root, *flags, *length, "--amp", amp])
            ours[amp].append([log[-1]["images_per_second"], log[-1]["test_images_per_second"], memory])
    rows = []
    for amp, dtype in dtypes.items():
        columns = zip(names, np.transpose(ours[amp]), np.transpose(plain), strict=True)
        case = f"{what}, {str(dtype).removeprefix('torch.')}"
        rows += [row_of(f"{case}: {name}", measured, by_plain) for name, measured, by_plain in columns]
    return rows


def with_steps(options):
    """The options with numbers of steps, where none are given, that take the device some seconds."""
    steps, photo_steps = (1000, 100) if options.device == "cuda" else (60, 6)
    return replace(options, steps=options.steps or steps, photo_steps=options.photo_steps or photo_steps)


def measure_speed(options):
    """Print the table, and write it to options.out after each of its parts."""
    options, rows = with_steps(options), []
    with TemporaryDirectory() as folder:
        for part in (step_costs, whole_runs, *(partial(photographs, arch) for arch in options.archs)):
            rows += part(options, folder)
            about = write_rows(rows, options)
    print(table(rows, options.format))
    print(about, file=sys.stderr)


def write_rows(rows, options):
    """Write the table to options.out; returns what was measured where."""
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    about = f"{options.rounds} rounds in turns on {options.device} ({where}), {torch.get_num_threads()} threads, torch "
    about += f"{torch.__version__}; medians; least and largest are of the ratio over the rounds.\n"
    about += "The ratio is ours to the other; in rows in seconds, the other to ours.\n"
    if not torch.cuda.is_available():
        about += "No GPU was found here: no figures of a GPU's memory or of its limits.\n"
    command = shlex.join(["python", "results/speed/measure.py", *sys.argv[1:]])
    text = f"# Speed\n\n```bash\n{command}\n```\n\n{about}\n{table(rows)}\n"
    write_atomic(options.out / f"{options.device}.md", lambda stream: stream.write(text.encode()))
    write_atomic(options.out / f"{options.device}.json", lambda stream: stream.write(table(rows, "json").encode()))
    return about


if __name__ == "__main__":
    options = tyro.cli(Speed)
    try:
        measure_speed(options)
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
