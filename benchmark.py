"""What many runs say: a grid of runs in one command, and tables and figures with 95 % intervals over splits.

    python benchmark.py run --pairs digits:mnist:optdigits --methods naive_ft ht_distill "naive_ft --oracle" --jobs 2
    python benchmark.py report runs --figures results/digits

Every cell of the grid is the plain command of a script (--print-commands shows them), so cells can run anywhere.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import models
from eval import (
    BUSY,
    CALIBRATED,
    NOT_COMPARED,
    InputError,
    predict,
    read_json,
    read_run,
    read_test_arrays,
    seen_unseen_curve,
    table,
    write_atomic,
)

HERE = Path(__file__).resolve().parent
SOURCE = "source model"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")  # Okabe and Ito
SEEN_AXIS, UNSEEN_AXIS = "accuracy on seen classes (%)", "accuracy on unseen classes (%)"
METHODS = sorted(path.stem for path in (HERE / "methods").glob("*.py"))


def seeds(text):
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        return [k for part in parts for k in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        raise InputError(f"{text!r} is not a list of seeds such as 0-9 or 0,3,7") from None


# ------------------------------------------------------------------------------------------ run


@dataclass
class RunGrid:
    """Run methods x pairs x split seeds x seeds; what is finished is skipped."""

    methods: tuple[str, ...] = (*METHODS, "naive_ft --oracle")
    """scripts by name, each with flags of its own if quoted: "wise_ft --a 0.3 --name wise_0.3" """
    pairs: tuple[str, ...] = ("digits:mnist:optdigits", "digits:optdigits:mnist", "glyphs:sans:serif")
    """dataset:source:target, or dataset:source:all for every target of that source (femnist:train:all)"""
    split_seeds: str = "0-9"
    """which classes are seen, and which images are for training: 0-9, or 0,3,7"""
    seeds: str = "0"
    """training seeds"""
    source_seeds: str = "0"
    """of the source models; split: each split seed's own number, so that intervals speak of source models too"""
    pcv: int = 0
    """pseudo splits per run for PCV calibration, each one more run (none for an oracle)"""
    jobs: int = 1
    """runs at a time, each with its share of the CPU's cores"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    flags: str = ""
    """flags for every run, with an equals sign: --flags="--epochs 5 --device cuda" """
    print_commands: bool = False
    """print the commands, one a line, and run nothing"""


def expand(pair, flags):
    """[pair], or for dataset:source:all a pair with every target that the source can have."""
    if pair.count(":") != 2:
        raise InputError(f"--pairs {pair}: write dataset:source:target, or dataset:source:all")
    dataset, source, target = pair.split(":")
    words = shlex.split(flags.replace("=", " "))
    data_root = words[words.index("--data-root") + 1] if "--data-root" in words[:-1] else None
    names = data.targets(dataset, source, data_root) if target == "all" else [target]
    return [f"{dataset}:{source}:{name}" for name in names]


def cell_command(method, pair, split_seed, source_seed, seed, grid):
    """The plain command of one run, as a list of words."""
    dataset, source, target = pair.split(":")
    name, *own = shlex.split(method)
    where = ["--dataset", dataset, "--source", source, "--target", target, "--runs-dir", grid.runs_dir]
    which = ["--split-seed", str(split_seed), "--seed", str(seed)]
    which += ["--source-seed", str(source_seed)] if source_seed else []
    return ["python", f"methods/{name}.py", *where, *which, *own, *shlex.split(grid.flags)]


def run_cell(command, threads):
    """Run one cell; returns its exit code and the last line that it wrote as an error."""
    words = [sys.executable, str(HERE / command[1]), *command[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


def finished(runs_dir):
    """The commands of all finished runs below runs_dir, as their done.json has them."""
    return {read_json(path).get("command") for path in Path(runs_dir).rglob("done.json")}


def run_grid(grid):
    for method in grid.methods:
        if not method.split() or method.split()[0] not in METHODS:
            raise InputError(f"--methods {method}: no such script; choose from {', '.join(METHODS)}")
    pairs = [single for pair in grid.pairs for single in expand(pair, grid.flags)]
    for flag, value, least in (("--jobs", grid.jobs, 1), ("--pcv", grid.pcv, 0)):
        if value < least:
            raise InputError(f"{flag} {value}: must be {least} or more")
    splits, per_split = seeds(grid.split_seeds), grid.source_seeds == "split"
    sources = [(k, k) for k in splits] if per_split else itertools.product(splits, seeds(grid.source_seeds))
    commands = []
    for pair, method, (k, source), s in itertools.product(pairs, grid.methods, sources, seeds(grid.seeds)):
        cell = cell_command(method, pair, k, source, s, grid)
        folds = () if "--oracle" in cell else range(grid.pcv)
        commands += [cell, *([*cell, "--pseudo-split", str(fold)] for fold in folds)]
    if grid.print_commands:
        print("\n".join(map(shlex.join, commands)))
        return
    done = finished(grid.runs_dir)
    waiting = [cell for cell in commands if "--overwrite" in cell or shlex.join(cell) not in done]
    threads, failed = max(1, (os.cpu_count() or 1) // grid.jobs), []
    with tqdm(total=len(commands), initial=len(commands) - len(waiting), unit="run") as bar:
        pool = ThreadPoolExecutor(grid.jobs)
        try:
            while waiting:
                futures = {pool.submit(run_cell, cell, threads): cell for cell in waiting}
                waiting = []
                for future in as_completed(futures):
                    code, message = future.result()
                    if code == BUSY:  # another process has this run: look again when the others are done
                        waiting.append(futures[future])
                        continue
                    bar.update()
                    if code:
                        failed.append(f"{shlex.join(futures[future])}\n    exit code {code}: {message}")
                        bar.write(failed[-1], sys.stderr)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, start nothing more
    if failed:
        raise InputError(f"{len(failed)} of {len(commands)} runs failed:\n" + "\n".join(failed))


# ------------------------------------------------------------------------------------------ report


@dataclass
class Report:
    """Mean and 95 % interval over runs that differ only in their seeds, and the difference to a reference by pairs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with finished runs somewhere below them"""
    reference: str = "naive_ft"
    """method that the others are compared with, split by split and seed by seed"""
    over_targets: bool = False
    """one table for all targets of a source, the mean over targets and splits"""
    format: Literal["md", "csv", "json"] = "md"
    """of the table"""
    figures: Path | None = None
    """folder for four figures of every task, each as PNG and PDF"""


def interval(values):
    """(mean, half width of the 95 % t interval over the values); of one value the width is None, of none both are. A
    value that is None is left out: a target may have no test image of an unseen class."""
    values = np.asarray([value for value in values if value is not None], np.float64)
    if len(values) < 2:
        return float(values[0]) if len(values) else None, None
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(width)


def collect(folders, over_targets=False):
    """{task: {method: {(target, split seed, source seed, seed): run}}} of all finished runs but pseudo splits; a run is
    what eval.read_run returns. over_targets makes one task of all targets of a source. Raises InputError if one method
    of a task has runs that differ in more than seeds, and if the runs of a task are over different classes."""
    tasks, settings, classes = {}, {}, {}
    seed_names = "split_seed", "source_seed", "seed"
    for path in sorted(path for folder in folders for path in folder.rglob("done.json")):
        args = read_json(path)["args"]
        if args.get("pseudo_split") is not None:
            continue
        target = "all" if over_targets else args["target"]
        task = f"{args['dataset']} {args['source']} to {target}, {args['seen_classes']} seen"
        other = (*NOT_COMPARED, *seed_names, *["target"] * over_targets)
        same = {k: v for k, v in args.items() if k not in other}
        before = settings.setdefault((task, args["method"]), same)
        if differ := [name for name in same | before if same.get(name) != before.get(name)]:
            raise InputError(f"{path.parent}: other {', '.join(differ)} than {args['method']}'s other runs; use --name")
        run = read_run(path.parent)
        if run["classes"] != classes.setdefault(task, run["classes"]):
            raise InputError(f"{path.parent}: over other classes than the other runs of {task}; report them apart")
        runs = tasks.setdefault(task, {}).setdefault(args["method"], {})
        key = args["target"], *(args[name] for name in seed_names)
        if key in runs:
            raise InputError(f"{path.parent}: the same run as {runs[key]['run']}")
        runs[key] = run
    if not tasks:
        raise InputError(f"no finished run below {', '.join(map(str, folders))}")
    return tasks


def with_source(methods):
    """The methods of a task, and first the source model that they start from."""
    longest = max(methods.values(), key=len)
    blank = dict.fromkeys(CALIBRATED)
    return {SOURCE: {key: {**run, **blank, "final": run["source"]} for key, run in longest.items()}, **methods}


def values(runs, name):
    """A figure of the runs that have it: one of their accuracies, or alg_overall and the like. pcv_overall is [] if one
    run lacks its pseudo splits: a mean over the others would mislead."""
    kind = next((kind for kind in CALIBRATED if name == f"{kind}_overall"), None)
    figures = [run["final"].get(name) if kind is None else (run[kind] or {}).get("overall") for run in runs.values()]
    return [] if kind == "pcv" and None in figures else [figure for figure in figures if figure is not None]


def rows_of(tasks, reference):
    """A row (dict) per task and method, from the worst overall accuracy to the best."""
    rows = []
    for task, methods in tasks.items():
        of_reference = {key: run["final"]["overall"] for key, run in methods.get(reference, {}).items()}
        for method, runs in with_source(methods).items():
            row = {"task": task, "method": method, "runs": len(runs)}
            for name in ("overall", "seen", "unseen", "harmonic_mean", "ausuc", *(f"{c}_overall" for c in CALIBRATED)):
                row[name], row[f"{name}_pm"] = interval(values(runs, name))
            paired = [run["final"]["overall"] - of_reference[key] for key, run in runs.items() if key in of_reference]
            row[f"vs_{reference}"], row[f"vs_{reference}_pm"] = interval([] if method == reference else paired)
            rows.append(row)
    return sorted(rows, key=lambda row: (row["task"], row["overall"]))


def report(options):
    tasks = collect(options.runs, options.over_targets)
    rows = rows_of(tasks, options.reference)
    if options.format != "md":
        print(table(rows, options.format))
    for task in tasks:
        if options.format == "md":
            print(f"\n**{task}**\n\n{table([rounded(row) for row in rows if row['task'] == task])}")
        if options.figures:
            draw(task, with_source(tasks[task]), options.figures)


def rounded(row):
    """Figures with their intervals in one cell, for people."""
    cells = {"method": row["method"], "runs": str(row["runs"])}
    for name in [name for name in row if f"{name}_pm" in row]:
        value, width = row[name], row[f"{name}_pm"]
        digits = "+.1f" if name.startswith("vs_") else ".3f" if name == "ausuc" else ".1f"
        cells[name.removesuffix("_overall")] = (
            "-" if value is None else f"{value:{digits}}" + ("" if width is None else f" ± {width:{digits[-3:]}}")
        )
    return cells


# ------------------------------------------------------------------------------------------ figures


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(task, methods, folder):
    """Four figures of a task, each as PNG and PDF, named after it: dilemma, curves, epochs, calibration."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    both = {m: {k: run for k, run in runs.items() if run["final"]["ausuc"] is not None} for m, runs in methods.items()}
    methods = {method: runs for method, runs in both.items() if runs}  # runs with test images of both groups
    if not methods:
        print(f"{task}: no figures, since no run has test images of seen and of unseen classes")
        return
    methods = dict(sorted(methods.items(), key=lambda item: -np.mean(values(item[1], "overall"))))
    style = {
        method: {"color": COLOURS[i % 8], "marker": "osD^v<>Ph"[i % 9], "label": method, "ls": ("-", "--")[i // 8 % 2]}
        for i, method in enumerate(method for method in methods if method != SOURCE and not method.endswith("-oracle"))
    }
    style[SOURCE] = {"color": "black", "marker": "*", "label": SOURCE, "ls": "-"}
    style |= {m: {"color": "black", "marker": "X", "label": m, "ls": "-"} for m in methods if m.endswith("-oracle")}

    def save(name, title, *axes):
        figure = axes[0].figure
        figure.suptitle(f"{task}: {title}", fontsize=10)
        for ax in axes:
            ax.grid(color="0.9")
            ax.set_axisbelow(True)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        for kind in ("png", "pdf"):
            write_atomic(
                Path(folder) / f"{'-'.join(task.replace(',', '').split())}-{name}.{kind}",
                lambda stream, kind=kind: figure.savefig(
                    stream,
                    format=kind,
                    dpi=150,
                    bbox_inches="tight",
                    metadata={} if kind == "png" else {"CreationDate": None},
                ),
            )
        plt.close(figure)

    _, ax = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    for method, runs in methods.items():
        (x, dx), (y, dy) = interval(values(runs, "seen")), interval(values(runs, "unseen"))
        if x is not None and y is not None:
            ax.errorbar(x, y, yerr=dy, xerr=dx, ms=8, lw=1, capsize=2, **{**style[method], "ls": ""})
    shown = [[np.mean(values(runs, group)) for runs in methods.values()] for group in ("seen", "unseen")]
    limits = [(max(0, min(means) - 8), 101) for means in shown]
    ax.set(xlabel=SEEN_AXIS, ylabel=UNSEEN_AXIS, xlim=limits[0], ylim=limits[1])
    save("dilemma", "mean and 95 % interval over splits", ax)

    _, ax = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    for method, runs in methods.items():
        if method == SOURCE:
            continue
        curves = [seen_unseen_curve(*read_test_arrays(run["run"]), run["run"]) for run in runs.values()]
        gammas = np.unique(np.quantile(np.concatenate([gamma for gamma, _, _ in curves]), np.linspace(0, 1, 400)))
        mean = [np.mean([np.interp(gammas, curve[0], curve[k]) for curve in curves], 0) for k in (1, 2)]
        look = {**style[method], "ls": "", "ms": 7}
        ax.plot(*mean, lw=1.2, color=look["color"], ls=style[method]["ls"])
        ax.plot(np.mean(values(runs, "seen")), np.mean(values(runs, "unseen")), **look)
        if all(run["alg"] for run in runs.values()):
            x, y = (np.mean([run["alg"][group] for run in runs.values()]) for group in ("seen", "unseen"))
            ax.plot(x, y, fillstyle="none", **{**look, "label": None})
    ax.set(xlabel=SEEN_AXIS, ylabel=UNSEEN_AXIS, xlim=limits[0], ylim=limits[1])
    save("curves", "any bias on the unseen logits (filled: none, open: ALG)", ax)

    _, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    for ax, group in zip(axes, ("seen", "unseen"), strict=True):
        for method, runs in methods.items():
            if method != SOURCE:
                logs = [read_lines(Path(run["run"]) / "log.jsonl") for run in runs.values()]
                epochs = [line["epoch"] for line in logs[0]]
                ax.plot(
                    epochs, np.mean([[line[group] for line in log] for log in logs], 0), ms=3, lw=1, **style[method]
                )
        ax.set(xlabel="epoch", title=f"{group} classes", ylabel="accuracy (%)" if group == "seen" else "")
    save("epochs", "mean over splits", *axes)

    _, ax = plt.subplots(figsize=(6.4, 0.5 * len(methods) + 1), layout="constrained")
    names = ["overall", *(f"{kind}_overall" for kind in CALIBRATED)]
    labels = ["no calibration", "ALG", "ALG against the source", "PCV", "best bias by test labels (oracle)"]
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        bars = [(row, *interval(values(runs, name))) for row, runs in enumerate(methods.values()) if values(runs, name)]
        if bars:
            row, mean, width = zip(*bars, strict=True)
            error = [w or 0 for w in width]
            place = np.array(row) + 0.17 * (i - 2)
            ax.barh(place, mean, 0.16, xerr=error, color=COLOURS[i], label=label, error_kw={"lw": 0.8})
    ax.set_ylim(len(methods) - 0.4, -0.6)
    lowest = min(np.mean(values(runs, "overall")) for runs in methods.values())
    ax.set(
        xlabel="overall accuracy (%)", yticks=range(len(methods)), yticklabels=methods, xlim=(max(0, lowest - 15), 100)
    )
    save("calibration", "before and after calibration", ax)


# ------------------------------------------------------------------------------------------ speed


@dataclass
class Speed:
    """What a training step of every method costs, and how methods/naive_ft.py stands against the loop everybody writes
    (results/speed/plain_loop.py) and the device's own limits. All in one run, in turns, as ratios: bare times of a busy
    machine say little."""

    methods: tuple[str, ...] = tuple(method for method in METHODS if method != "naive_ft")
    """scripts by name, each with flags of its own if quoted"""
    rounds: int = 5
    """how often everything is measured; the medians count"""
    steps: int = 60
    """training steps of the small CNN per measurement, after a first epoch of as many that does not count"""
    archs: tuple[str, ...] = ("resnet50",)
    """networks for photographs"""
    photos: int = 160
    """training images of 300x300 pixels, drawn; half as many to test on"""
    photo_steps: int = 6
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
    """A row of the table from the figures of all rounds: medians, and the median, least and largest of the ratios of
    ours to the plain loop's (invert: of the plain loop's to ours)."""
    ratios = None if plain is None else [b / a if invert else a / b for a, b in zip(ours, plain, strict=True)]
    columns = {"ours": (ours, np.median), "plain loop": (plain, np.median)}
    columns |= {"ratio": (ratios, np.median), "least": (ratios, min), "largest": (ratios, max)}
    return {
        "what": what,
        **{name: None if figures is None else float(of(figures)) for name, (figures, of) in columns.items()},
    }


def timed(words, threads):
    """Run a command: (lines of its standard output, seconds, peak memory of its own process in MB, 0 where
    there is no /proc)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *map(str, words)], stdout=output, stderr=errors, env=environment)
        memory = 0.0
        while child.poll() is None:  # its resource usage would say no less than what this process once had
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                memory = max([memory, *(int(kb) * 1.024e-3 for kb in re.findall(r"VmHWM:\s*(\d+)", status))])
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        for stream in (output, errors):
            stream.seek(0)
        if child.returncode:
            raise InputError(f"{shlex.join(map(str, words))}: {errors.read().strip().splitlines()[-1:]}")
        return output.read().splitlines(), seconds, memory


def run_method(method, folder, flags):
    """A plain run of a script in `folder`: (its log, its done.json, seconds, peak memory in MB)."""
    name, *own = shlex.split(method)
    words = [HERE / "methods" / f"{name}.py", "--overwrite", "--no-save-model", "--runs-dir", folder, *own, *flags]
    _, seconds, memory = timed(words, torch.get_num_threads())
    done = max(Path(folder).rglob("done.json"), key=lambda path: path.stat().st_mtime_ns)
    return read_lines(done.with_name("log.jsonl")), read_json(done), seconds, memory


def draw_photos(folder, count, side=300, classes=10):
    """folder/DOMAIN/PART/CLASS/*.jpg for the data set `folder`: two domains of smooth random pictures; of the target,
    `count` images to train on and half as many to test on."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("a/train", 2 * classes), ("a/test", classes), ("b/train", count), ("b/test", count // 2)):
        for i in range(n):
            small = rng.integers(0, 256, (side // 6, side // 6, 3), dtype=np.uint8)
            path = Path(folder, part, f"class{i % classes}", f"{i:05d}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def draw_digits(folder):
    """The default task's images as the plain loop takes them: folder/{train,test}/DIGIT/*.png."""
    from PIL import Image

    task = data.load_task("digits")
    for part, split in (("train", task.target_train), ("test", task.target_test)):
        for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist(), strict=True)):
            path = Path(folder, part, task.classes[label], f"{i:05d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)
    return task


def step_costs(options, folder):
    """Rows: a step of every method as a ratio to naive_ft's, and lp_ft's probe as one to head updates."""
    flags = ["--epochs", "2", "--steps-per-epoch", options.steps, "--device", options.device]

    def seconds_per_step(method):
        log, done, _, _ = run_method(method, folder, flags)
        return done["args"]["batch_size"] / [line["images_per_second"] for line in log if line["images_per_second"]][-1]

    seconds = {method: [] for method in ("naive_ft", *options.methods)}
    for _ in tqdm(range(options.rounds), "steps of all methods", unit="round"):
        for method, measured in seconds.items():
            measured.append(1e3 * seconds_per_step(method))
    rows = [row_of(f"{m}: step, ms; naive_ft's", seconds[m], seconds["naive_ft"]) for m in options.methods]
    probes = zip(*[probe_seconds(300) for _ in range(options.rounds)], strict=True)
    return [*rows, row_of("lp_ft: 300 steps of the probe, s; of the head through the network", *probes, invert=True)]


def probe_seconds(steps, batch_size=64):
    """Seconds of lp_ft's probe on stored features and of the same head updates through the network, of which only the
    head has gradients; on the default task, on a CPU."""
    task = data.load_task("digits")
    fit_head = runpy.run_path(str(HERE / "methods" / "lp_ft.py"))["fit_head"]
    model = models.build("small_cnn", len(task.classes), task.target_train.images.shape[1:])
    model = model.to(memory_format=torch.channels_last)
    _, features = predict(model, task.target_train.images, return_features=True)
    features, labels = torch.from_numpy(features), task.target_train.labels
    batches = task.target_train.batches(batch_size, "cpu", seed=0)
    start = time.perf_counter()
    fit_head(model.head, features, labels, steps, batch_size, 0.005, 5e-4, 0)
    middle = time.perf_counter()
    model.eval().backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.005, 0.9, nesterov=True, weight_decay=5e-4, fused=True)
    for step in range(steps):
        images, of_images = batches(step)
        loss = F.cross_entropy(model(images), of_images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return middle - start, time.perf_counter() - middle


def whole_runs(options, folder):
    """Row: a run of naive_ft on the default task, from the command to its end, and the plain loop's."""
    task = draw_digits(Path(folder) / "digits_as_files")
    recipe = task.recipe
    plain = [HERE / "results/speed/plain_loop.py", *(Path(folder) / "digits_as_files" / p for p in ("train", "test"))]
    plain += ["--arch", recipe["arch"], "--augmentation", "ink", "--image-size", 28, "--bn-mode", "eval"]
    plain += ["--classes", len(task.classes), "--batch-size", recipe["batch_size"], "--device", options.device]
    plain += ["--epochs", recipe["epochs"], "--steps-per-epoch", recipe["steps_per_epoch"], "--lr", recipe["lr"]]
    run_method("naive_ft", folder, ["--device", options.device])  # from here on the source model is in the cache
    ours, theirs = [], []
    for _ in tqdm(range(options.rounds), "whole runs on digits", unit="round"):
        ours.append(run_method("naive_ft", folder, ["--device", options.device])[2])
        theirs.append(timed(plain, torch.get_num_threads())[1])
    return [row_of("digits, small CNN: whole run, s", ours, theirs, invert=True)]


def photographs(arch, options, folder):
    """Rows: training and evaluation on JPEG files by naive_ft and by the plain loop, peak memory, and what of a step is
    data and of the device's limits is reached."""
    root = Path(folder) / "photos"
    if not root.exists():
        draw_photos(root, options.photos)
        draw_photos(Path(folder) / "more_photos", 10 * options.photos)
    source = Path(folder) / f"{arch}.pt"
    torch.save(models.build(arch, 10, (3, 224, 224), "none").state_dict(), source)
    common = ["--arch", arch, "--batch-size", options.batch_size, "--device", options.device, "--bn-mode", "train"]
    length = ["--epochs", 2, "--steps-per-epoch", options.photo_steps]
    flags = ["--dataset", "folder", "--seen-classes", 5, "--oracle", "--source-checkpoint", source, *common]
    plain = [HERE / "results/speed/plain_loop.py", root / "b/train", root / "b/test", *common, *length]
    run_method("naive_ft", folder, ["--data-root", root, *flags, "--epochs", 1, "--steps-per-epoch", 1])  # the cache
    autocast = models.device_and_amp(options.device, "auto", arch)[1]
    dtypes = {"auto": autocast, "off": torch.float32} if autocast else {"off": torch.float32}
    what, figures = f"{arch}, {options.batch_size} JPEGs of 300 px", {}
    for _ in tqdm(range(options.rounds), f"{arch} on photographs", unit="round"):
        theirs, _, their_memory = timed(plain, torch.get_num_threads())
        last = json.loads(theirs[-1])
        train, test = (last[f"{part}_images"] / last[f"{part}_seconds"] for part in ("train", "test"))
        for amp, dtype in dtypes.items():
            log, _, _, memory = run_method("naive_ft", folder, ["--data-root", root, *flags, *length, "--amp", amp])
            for name, ours_now, theirs_now in (
                ("training, images/s, data included", log[-1]["images_per_second"], train),
                ("evaluation, images/s", log[-1]["test_images_per_second"], test),
                ("peak memory of the process, MB (without workers)", memory, their_memory),
            ):
                both = figures.setdefault(f"{what}, {str(dtype).removeprefix('torch.')}: {name}", ([], []))
                both[0].append(ours_now)
                both[1].append(theirs_now)
    short = [*flags, "--epochs", 1, "--steps-per-epoch", 2]
    roots = [Path(folder) / where for where in ("photos", "more_photos")] * options.rounds
    memory = [run_method("naive_ft", folder, ["--data-root", where, *short])[3] for where in roots]
    more = f"{10 * options.photos} images, MB; with {options.photos}"
    return [
        *(row_of(name, *both) for name, both in figures.items()),
        row_of(f"{what}: peak memory with {more}", memory[1::2], memory[::2]),
        *limits(arch, root, options),
    ]


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and give: what would cross the memory bus without caches."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        return result


def limits(arch, root, options):
    """Rows: data's share of a step, and the shares of the device's matrix throughput and memory bandwidth that a step
    reaches, both measured here: the throughput by one large product, the bandwidth by one large copy."""
    device, amp = models.device_and_amp(options.device, "auto", arch)
    task = data.load_task("folder", seen_classes="5", oracle=True, data_root=str(root))
    batches = task.target_train.batches(options.batch_size, device, 0)
    model = models.build(arch, 10, (3, 224, 224), "none").to(device, memory_format=torch.channels_last).train()
    model.amp = amp
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def seconds(do, *args):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = do(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def update(images, labels):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        update(*batches(0))
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.rand(2, side, side, device=device, dtype=amp or torch.float32)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    throughput = 2 * side**3 / min(seconds(torch.mm, a, b)[0] for _ in range(5))
    bandwidth = 2 * size / min(seconds(block.clone)[0] for _ in range(5))
    shares = []
    for step in range(1, options.rounds + 1):
        reading, batch = seconds(batches, step)
        whole = reading + seconds(update, *batch)[0]
        shares.append(
            (reading / whole, flops.get_total_flops() / whole / throughput, traffic.bytes / whole / bandwidth)
        )
    data_share, of_throughput, of_bandwidth = (100 * np.array(column) for column in zip(*shares, strict=True))
    rows = [
        row_of(f"{arch}: data (reading, augmentation), % of a step", data_share),
        row_of(f"{arch}: of {throughput / 1e12:.3g} TFLOP/s in a matrix product, %", of_throughput),
        row_of(
            f"{arch}: of {bandwidth / 1e9:.3g} GB/s in a copy, % (all tensors in and out; caches help)", of_bandwidth
        ),
    ]
    if device.type == "cuda":
        rows.append(row_of(f"{arch}: peak device memory, MB", [torch.cuda.max_memory_allocated() / 1e6]))
    return rows


def measure_speed(options):
    """Prints the table and writes it to options.out."""
    with TemporaryDirectory() as folder:
        rows = step_costs(options, folder) + whole_runs(options, folder)
        for arch in options.archs:
            rows += photographs(arch, options, folder)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    about = f"{options.rounds} rounds in turns on {options.device} ({where}), {torch.get_num_threads()} threads, torch "
    about += f"{torch.__version__}; medians; least and largest are of the ratio over the rounds.\n"
    if not torch.cuda.is_available():
        about += "No GPU was found here: no figures of a GPU's memory or of its limits.\n"
    command = shlex.join(["python", "benchmark.py", *sys.argv[1:]])
    text = f"# Speed\n\n```bash\n{command}\n```\n\n{about}\n{table(rows)}\n"
    write_atomic(options.out / f"{options.device}.md", lambda stream: stream.write(text.encode()))
    write_atomic(options.out / f"{options.device}.json", lambda stream: stream.write(table(rows, "json").encode()))
    print(table(rows, options.format))
    print(about, file=sys.stderr)


if __name__ == "__main__":
    do = {RunGrid: run_grid, Report: report, Speed: measure_speed}
    options = tyro.extras.subcommand_cli_from_dict({"run": RunGrid, "report": Report, "speed": Speed})
    try:
        do[type(options)](options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
