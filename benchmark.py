"""What many runs say: a grid of runs in one command, and tables with 95 % intervals over splits.

    python benchmark.py run --pairs digits:mnist:optdigits --methods naive_ft ht_distill "naive_ft --oracle" --jobs 2
    python benchmark.py report runs

Every cell of the grid is the plain command of a script (--print-commands shows them), so cells can run anywhere.
"""

import itertools
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import stats
from tqdm import tqdm

from eval import InputError, read_json, table

HERE = Path(__file__).resolve().parent
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
    """dataset:source:target"""
    split_seeds: str = "0-9"
    """which classes are seen, and which images are for training: 0-9, or 0,3,7"""
    seeds: str = "0"
    """training seeds"""
    jobs: int = 1
    """runs at a time, each with its share of the CPU's cores"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    flags: str = ""
    """flags for every run, with an equals sign: --flags="--epochs 5 --device cuda" """
    print_commands: bool = False
    """print the commands, one a line, and run nothing"""


def cell_command(method, pair, split_seed, seed, grid):
    """The plain command of one run, as a list of words."""
    dataset, source, target = pair.split(":")
    name, *own = shlex.split(method)
    where = ["--dataset", dataset, "--source", source, "--target", target, "--runs-dir", grid.runs_dir]
    which = ["--split-seed", str(split_seed), "--seed", str(seed)]
    return ["python", f"methods/{name}.py", *where, *which, *own, *shlex.split(grid.flags)]


def run_cell(command, threads):
    """Run one cell; returns None, or what it said last where it failed. A finished run exits at once by itself."""
    words = [sys.executable, str(HERE / command[1]), *command[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    return None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"


def run_grid(grid):
    for method in grid.methods:
        if shlex.split(method)[0] not in METHODS:
            raise InputError(f"--methods {method}: no such script; choose from {', '.join(METHODS)}")
    for pair in grid.pairs:
        if pair.count(":") != 2:
            raise InputError(f"--pairs {pair}: write dataset:source:target")
    axes = grid.pairs, grid.methods, seeds(grid.split_seeds), seeds(grid.seeds)
    commands = [cell_command(method, pair, k, s, grid) for pair, method, k, s in itertools.product(*axes)]
    if grid.print_commands:
        print("\n".join(map(shlex.join, commands)))
        return
    # One run per source model first: those that follow find it in the cache instead of training it side by side.
    first = {pair.rsplit(":", 1)[0]: i for i, pair in reversed(list(enumerate(grid.pairs)))}
    per_pair = len(commands) // len(grid.pairs)
    heads = [commands[i * per_pair] for i in first.values()]
    threads, failed = max(1, (os.cpu_count() or 1) // grid.jobs), []
    with tqdm(total=len(commands), unit="run") as bar, ThreadPoolExecutor(grid.jobs) as pool:
        for wave in (heads, [command for command in commands if command not in heads]):
            futures = {pool.submit(run_cell, command, threads): command for command in wave}
            for future in as_completed(futures):
                bar.update()
                if future.result():
                    failed.append(f"{shlex.join(futures[future])}\n    {future.result()}")
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
    format: Literal["md", "csv", "json"] = "md"
    """of the table"""


def interval(values):
    """(mean, half width of the 95 % t interval over the values); the width of a single value is None."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(width)


def collect(folders):
    """{(task, method): {(split seed, seed): done}} of all finished runs. Raises InputError if one method of a task has
    runs that differ in more than seeds."""
    groups, settings = {}, {}
    for path in sorted(path for folder in folders for path in folder.rglob("done.json")):
        done = read_json(path)
        args = done["args"]
        key = f"{args['dataset']} {args['source']} to {args['target']}, {args['seen_classes']} seen", args["method"]
        same = {k: v for k, v in args.items() if k not in ("seed", "split_seed", "runs_dir", "overwrite", "device")}
        before = settings.setdefault(key, same)
        if differ := [name for name in same | before if same.get(name) != before.get(name)]:
            raise InputError(f"{path.parent}: other {', '.join(differ)} than {args['method']}'s other runs; use --name")
        groups.setdefault(key, {})[args["split_seed"], args["seed"]] = done
    if not groups:
        raise InputError(f"no finished run below {', '.join(map(str, folders))}")
    return groups


def report(options):
    groups, rows = collect(options.runs), []
    for task in dict.fromkeys(task for task, _ in groups):
        methods = {method: runs for (t, method), runs in groups.items() if t == task}
        reference = {key: run["final"]["overall"] for key, run in methods.get(options.reference, {}).items()}
        longest = max(methods.values(), key=len)
        methods = {"source model": {key: {"final": run["source"]} for key, run in longest.items()}, **methods}
        for method, runs in methods.items():
            row = {"task": task, "method": method, "runs": len(runs)}
            for name in ("overall", "seen", "unseen", "harmonic_mean"):
                row[name], row[f"{name}_pm"] = interval([run["final"][name] for run in runs.values()])
            paired = [run["final"]["overall"] - reference[key] for key, run in runs.items() if key in reference]
            difference = interval(paired) if paired and method != options.reference else (None, None)
            row[f"vs_{options.reference}"], row[f"vs_{options.reference}_pm"] = difference
            rows.append(row)
    rows.sort(key=lambda row: (row["task"], row["overall"]))
    if options.format != "md":
        print(table(rows, options.format))
        return
    for task in dict.fromkeys(row["task"] for row in rows):
        print(f"\n**{task}**\n\n{table([rounded(row) for row in rows if row['task'] == task])}")


def rounded(row):
    """Figures with their intervals in one cell, for people."""
    cells = {"method": row["method"], "runs": str(row["runs"])}
    for name in [name for name in row if f"{name}_pm" in row]:
        value, width = row[name], row[f"{name}_pm"]
        sign = "+" if name.startswith("vs_") else ""
        cells[name] = "-" if value is None else f"{value:{sign}.1f}" + ("" if width is None else f" ± {width:.1f}")
    return cells


if __name__ == "__main__":
    options = tyro.extras.subcommand_cli_from_dict({"run": RunGrid, "report": Report})
    try:
        run_grid(options) if isinstance(options, RunGrid) else report(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
