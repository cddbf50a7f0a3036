"""What many runs say: a grid of runs in one command, and tables and figures with 95 % intervals over splits.

    python benchmark.py run --pairs digits:mnist:optdigits --methods naive_ft "naive_ft --oracle" --jobs 2
    python benchmark.py report runs --figures results/digits
    python benchmark.py choose --pair digits:mnist:optdigits --methods ht_distill masked_ft

Every cell of the grid is the plain command of a script (--print-commands shows them), so cells can run anywhere.
"""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np
import tyro
from scipy import stats
from tqdm import tqdm

import data
from eval import CALIBRATED, compared, footnote, read_run, table
from files import InputError, differences, fail, read_json
from runs import BUSY

HERE = Path(__file__).resolve().parent
METHODS = sorted(path.stem for path in (HERE / "methods").glob("*.py"))
SEEDS = ("split_seed", "source_seed", "seed")
SOURCE = "source model"
MARKS = "*: defaults were tuned on this task, on other splits. -: not run, or without an oracle; then there is no mean."
TUNED_ON = ("digits:mnist:optdigits", "digits:optdigits:mnist", "glyphs:sans:serif")  # a grid's usual tasks, too
STUDY = "No recommendation: the first of such a ranking was no better than always ht_distill, see results/choose.md."
SHOWN = ("overall", "seen", "unseen", "unseen_among_unseen", "harmonic_mean", "ausuc")


def seeds(text):
    """The seeds that a text lists: "0-3,7" is [0, 1, 2, 3, 7]."""
    try:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        ranges = []
    if not ranges or any(len(ends) > 2 or ends[0] > ends[-1] for ends in ranges):
        raise InputError(f"{text!r} is not a list of seeds such as 0-9 or 0,3,7")
    return [seed for ends in ranges for seed in range(ends[0], ends[-1] + 1)]


@dataclass
class RunGrid:
    """Run methods x pairs x split seeds x source seeds x seeds. Finished commands are skipped, even if images have
    changed since: only the method's script notices that."""

    methods: tuple[str, ...] = (*METHODS, "naive_ft --oracle")
    """scripts by name, each with flags of its own if quoted: "naive_ft --bn-mode train --name naive_ft_bn_train" """
    pairs: tuple[str, ...] = TUNED_ON
    """dataset:source:target, or dataset:source:all for every target of that source (femnist:train:all)"""
    split_seeds: str = "0-9"
    """which classes are seen, and which images are for training: 0-9, or 0,3,7"""
    seeds: str = "0"
    """training seeds"""
    source_seeds: str = "0"
    """seeds of the source models; split: equal to the split seed, so that intervals cover source models too"""
    pcv: int = 0
    """pseudo splits per run for PCV calibration, each one more run (none for an oracle)"""
    jobs: int = 1
    """runs at a time, each with its share of the CPU's cores, or with $OMP_NUM_THREADS where that is set"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    flags: str = ""
    """flags for every run, with an equals sign: --flags="--epochs 5 --device cuda" """
    print_commands: bool = False
    """print the commands of runs that are not finished, one a line, and run nothing"""


def words_of(text):
    """The words of flags in one text. Raises InputError at a quotation without an end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from error


def flag_values(words):
    """{flag: value} of the words of a command, which may join the two by an equals sign, or write _ for -."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {flag.replace("_", "-"): value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


def expand(pair, flags, flag="--pairs"):
    """[pair], or for dataset:source:all one for every target. Raises InputError, naming the flag, at a name that does
    not exist."""
    if pair.count(":") != 2:
        raise InputError(f"{flag} {pair}: write dataset:source:target, or dataset:source:all")
    dataset, source, target = pair.split(":")
    given = flag_values(words_of(flags))
    root, file = given.get("--data-root"), given.get("--source-checkpoint")
    try:
        names = data.targets(dataset, source, root) if target == "all" else [target]
        for name in names:
            one = data.TaskArgs(dataset, source, name, data_root=root, source_checkpoint=file)
            data.choose_domains(one, data.domain_names(dataset, root))
    except InputError as error:
        raise InputError(f"{flag} {pair}: {error}") from error
    return [f"{dataset}:{source}:{name}" for name in names]


def cell_command(method, pair, split_seed, source_seed, seed, grid):
    """The plain command of one run, as a list of words."""
    script, *own_flags = words_of(method)
    dataset, source, target = pair.split(":")
    where = ["--dataset", dataset, "--source", source, "--target", target, "--runs-dir", grid.runs_dir]
    which = ["--split-seed", str(split_seed), "--seed", str(seed)]
    which += ["--source-seed", str(source_seed)] if source_seed else []
    return ["python", f"methods/{script}.py", *where, *which, *own_flags, *words_of(grid.flags)]


def check_methods(methods):
    """Raises InputError at a method that is no script."""
    for method in methods:
        if not method.split() or method.split()[0] not in METHODS:
            raise InputError(f"--methods {method}: no such script; choose from {', '.join(METHODS)}")


def grid_commands(grid):
    """The commands of all cells, each followed by those of its pseudo splits. Raises InputError on a wrong flag."""
    check_methods(grid.methods)
    data.check_flag("jobs", grid.jobs, 1)
    data.check_flag("pcv", grid.pcv)
    pairs = [single for pair in grid.pairs for single in expand(pair, grid.flags)]
    splits = seeds(grid.split_seeds)
    per_split = [(split_seed, split_seed) for split_seed in splits]
    sources = per_split if grid.source_seeds == "split" else itertools.product(splits, seeds(grid.source_seeds))
    cells = itertools.product(pairs, grid.methods, sources, seeds(grid.seeds))
    commands = []
    for pair, method, (split_seed, source_seed), seed in cells:
        command = cell_command(method, pair, split_seed, source_seed, seed, grid)
        commands.append(command)
        if "--oracle" not in command:
            commands += [[*command, "--pseudo-split", str(fold)] for fold in range(grid.pcv)]
    return commands


def error_in(text):
    """What a program wrote as its error: from the last line that begins so to the end, or else the last line."""
    lines = text.strip().splitlines()
    first = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=-1)
    return "\n".join(lines[first:])


def run_cells(waiting, jobs, bar):
    """Run the commands, `jobs` at a time; returns a text for each that failed. A signal ends them, saved."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    children, stopped, failures = [], Event(), []

    def run(command):
        """The exit code of a run, and its error."""
        words = [sys.executable, str(HERE / command[1]), *command[2:]]
        # In a session of its own: a signal to the whole group would be a second one, which ends a run unsaved.
        child = subprocess.Popen(words, env=environment, start_new_session=True, **output)
        children.append(child)
        if stopped.is_set():  # while it was starting
            child.terminate()
        _, errors = child.communicate()
        return child.returncode, error_in(errors)

    pool = ThreadPoolExecutor(jobs)
    try:
        while waiting:
            futures = {pool.submit(run, command): command for command in waiting}
            waiting = []
            for future in as_completed(futures):
                command = futures[future]
                code, message = future.result()
                if code == BUSY:  # another process has this run: look again when the others are done
                    waiting.append(command)
                    continue
                bar.update()
                if code:
                    failures.append(f"{shlex.join(command)}\n    exit code {code}: {message}")
                    bar.write(failures[-1], sys.stderr)
            if waiting:
                stopped.wait(2)
    finally:  # after a signal: start nothing more, and what runs saves and ends
        stopped.set()
        for child in children:
            child.terminate()
        pool.shutdown(cancel_futures=True)
    return failures


def unfinished(commands, runs_dir):
    """The commands that made no finished run below runs_dir, those with --overwrite, and those that name a file which
    has changed since: the script says whether that matters."""
    done = {read_json(path).get("command"): path.stat().st_mtime for path in Path(runs_dir).rglob("done.json")}
    waiting = []
    for command in commands:
        named = [os.path.getmtime(word) for word in command[2:] if os.path.isfile(word)]
        if "--overwrite" in command or max(named, default=0) > done.get(shlex.join(command), -1):
            waiting.append(command)
    return waiting


def run_commands(commands, grid):
    """Run what is not finished yet. Raises InputError, with a text for each run that failed."""
    waiting = unfinished(commands, grid.runs_dir)
    with tqdm(total=len(commands), initial=len(commands) - len(waiting), unit="run") as bar:
        failures = run_cells(waiting, grid.jobs, bar)
    if failures:
        raise InputError(f"{len(failures)} of {len(commands)} runs failed:\n" + "\n".join(failures))


def run_grid(grid):
    """Run the grid, or print its commands."""
    commands = grid_commands(grid)
    if not grid.print_commands:
        run_commands(commands, grid)
        return
    for command in unfinished(commands, grid.runs_dir):
        print(shlex.join(command))


@dataclass
class Report:
    """Mean and 95 % interval over splits, of runs that differ only in their seeds, and the difference to a reference.
    Runs of one split, with other seeds or source models, are averaged first: only splits are independent."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with finished runs somewhere below them"""
    reference: str = "naive_ft"
    """method that the others are compared with, split by split and seed by seed"""
    over_targets: bool = False
    """one table for all targets of a source, mean and interval over targets"""
    over_tasks: bool = False
    """one table of methods and tasks: the share of the gap from source model to oracle that each closed"""
    format: Literal["md", "latex", "csv", "json"] = "md"
    """of the table; latex: for the package booktabs"""
    figures: Path | None = None
    """folder for four figures of every task, or with --over-tasks for one of all, each as PNG and PDF"""


def interval(values):
    """Mean and half width of the 95 % t interval of independent values; of one the width is None, of none both are."""
    values = np.array(values, np.float64)
    if len(values) < 2:
        return (float(values[0]) if len(values) else None), None
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(width)


def read(folder):
    """As eval.read_run. Raises InputError if the run is damaged."""
    try:
        return read_run(folder)
    except ValueError as error:
        raise InputError(str(error)) from error


def how_many(seen_classes):
    """The value of --seen-classes; for a list of names, their number and four hex digits that identify the list."""
    if not seen_classes.startswith("["):
        return seen_classes
    return f"{len(json.loads(seen_classes))} ({sha256(seen_classes.encode()).hexdigest()[:4]})"


def collect(folders, over_targets=False):
    """{task: {method: {(unit, target, split seed, source seed, seed): run}}} of all finished runs but pseudo splits.

    A run is what eval.read_run returns. over_targets makes one task of all targets of a source. Intervals are over
    units: the targets of such a task, else the splits; several split seeds may give the same split. Raises InputError
    if runs of one method and task differ in more than seeds, or runs of one task in their classes.
    """
    tasks, settings, classes, splits, starts = {}, {}, {}, {}, {}
    not_compared = {*SEEDS, *(["target"] if over_targets else [])}
    for path in sorted(path for folder in folders for path in folder.rglob("done.json")):
        done = read_json(path)
        args = done["args"]
        if args.get("pseudo_split") is not None:
            continue
        method, target = args["method"], "all" if over_targets else args["target"]
        task = f"{args['dataset']} {args['source']} to {target}, {how_many(args['seen_classes'])} seen"
        setting = {name: value for name, value in compared(args).items() if name not in not_compared}
        recipe = {*done.get("from_recipe", ())}
        first, first_recipe = settings.setdefault((task, method), (setting, recipe))
        left_out = dict.fromkeys(recipe & first_recipe)  # these flags follow a split's number of images
        if differ := differences(first | left_out, setting | left_out):
            raise InputError(f"{path.parent}: other {differ} than {method}'s other runs; use --name")
        run = read(path.parent)
        if run["classes"] != classes.setdefault(task, run["classes"]):
            raise InputError(f"{path.parent}: over other classes than the other runs of {task}; report them apart")
        runs = tasks.setdefault(task, {}).setdefault(method, {})
        split = done.get("images", {}).get("test", args["split_seed"])
        unit = args["target"] if over_targets else splits.setdefault((task, split), args["split_seed"])
        key = (unit, args["target"], *(args[name] for name in SEEDS))
        if key in runs:
            raise InputError(f"{path.parent}: the same run as {runs[key]['run']}")
        runs[key] = run | {"pool": done.get("unlabelled_images", 0)}
        if run["source"]["overall"] is not None:
            starts.setdefault(task, {}).setdefault(key, []).append(run["source"]["overall"])
    for task, cells in starts.items():
        # half a point: one source model may predict an image otherwise on another machine
        if any(max(figures) - min(figures) > 0.5 for figures in cells.values()):
            what = "methods started from other source models, or had other test images"
            print(f"warning: {task}: {what}", file=sys.stderr)
    if not tasks:
        raise InputError(f"no finished run below {', '.join(map(str, folders))}")
    return tasks


def with_source(methods):
    """The methods of a task, and first the source model that they start from."""
    longest = max(methods.values(), key=len)
    own = {**dict.fromkeys(CALIBRATED), "pool": 0}
    source = {key: {**run, **own, "final": run["source"]} for key, run in longest.items()}
    return {SOURCE: source, **methods}


def values(runs, name):
    """{key: accuracy} of the runs that have it; for alg, pcv, ... the overall accuracy after that calibration. Of pcv
    all or none: a mean over some of the runs would mislead."""
    if name in CALIBRATED:
        column = {key: run[name] and run[name]["overall"] for key, run in runs.items()}
    else:
        column = {key: run["final"][name] for key, run in runs.items()}
    known = {key: figure for key, figure in column.items() if figure is not None}
    return {} if name == "pcv" and len(known) < len(values(runs, "overall")) else known


def unit_means(column):
    """{unit: mean} of a column {key: figure}: runs of one split are not independent."""
    units = {}
    for (unit, *_), figure in column.items():
        units.setdefault(unit, []).append(figure)
    return {unit: float(np.mean(figures)) for unit, figures in units.items()}


def pool_of(runs):
    """unlabelled, if the runs were given unlabelled target images: another setting. Else -."""
    return "unlabelled" if any(run.get("pool") for run in runs.values()) else "-"


def gains(runs):
    """{unit: mean of overall accuracy less the source model's}."""
    overall = values(runs, "overall")
    return unit_means({key: overall[key] - runs[key]["source"]["overall"] for key in overall})


def closed(runs, oracle):
    """(Per cent of the gap from the source model to the oracle that adaptation closed, half width of its interval).

    100 * mean(overall - source) / mean(oracle - source), over the splits that have all three; a jackknife over splits
    gives the interval. None without an oracle, or where it is not above the source model.
    """
    gained, gap = gains(runs), gains(oracle)
    shared = [unit for unit in gained if unit in gap]
    gained = np.array([gained[unit] for unit in shared])
    gap = np.array([gap[unit] for unit in shared])
    rest = gap.sum() - gap  # without one of the splits each
    if not gap.sum() > 0:
        return None, None
    share = 100 * gained.sum() / gap.sum()
    if len(gap) < 2 or not (rest > 0).all():
        return float(share), None
    pseudo_values = len(gap) * share - (len(gap) - 1) * 100 * (gained.sum() - gained) / rest
    return float(share), interval(pseudo_values)[1]


def rows_of(tasks, reference):
    """A row (dict) per task and method, from the worst overall accuracy to the best; last, those that have none."""
    rows = []
    for task, methods in tasks.items():
        baseline = values(methods.get(reference, {}), "overall")
        others = (methods[method] for method in sorted(methods) if method.endswith("-oracle"))
        oracle = methods.get("naive_ft-oracle") or next(others, {})
        for method, runs in with_source(methods).items():
            columns = {name: values(runs, name) for name in SHOWN}
            columns |= {f"{kind}_overall": values(runs, kind) for kind in CALIBRATED}
            overall = columns["overall"] if method != reference else {}
            columns[f"vs_{reference}"] = {key: overall[key] - baseline[key] for key in overall if key in baseline}
            row = {"task": task, "method": method, "pool": pool_of(runs), "runs": len(runs)}
            for name, column in columns.items():
                row[name], row[f"{name}_pm"] = interval([*unit_means(column).values()])
            row["closed"], row["closed_pm"] = closed(runs, oracle)
            rows.append(row)
    ranked = sorted([row for row in rows if row["overall"] is not None], key=lambda row: row["overall"])
    unknown = sorted([row for row in rows if row["overall"] is None], key=lambda row: row["method"])
    return sorted(ranked + unknown, key=lambda row: row["task"])


def over_tasks(rows):
    """A row per method, without oracles: what it closed on every task, and the mean and worst of these. Sorted from the
    worst mean to the best, None last; then those with unlabelled images. A * marks the tasks of TUNED_ON."""
    tuned = tuple("{} {} to {}, ".format(*pair.split(":")) for pair in TUNED_ON)
    tasks = sorted({row["task"] for row in rows})
    lines = {row["method"]: {"method": row["method"], "pool": row["pool"]} for row in rows if row["method"] != SOURCE}
    for method, line in lines.items():
        own = {row["task"]: row for row in rows if row["method"] == method}
        for task in tasks:
            name = task + "*" * task.startswith(tuned)
            row = own.get(task, {})
            line[name] = row.get("closed")
            line[f"{name}_pm"] = row.get("closed_pm")
        shares = [own[task]["closed"] for task in tasks if task in own]
        whole = len(shares) == len(tasks) and None not in shares
        line["mean"] = float(np.mean(shares)) if whole else None
        line["worst"] = min(shares) if whole else None
    ranked = [line for name, line in sorted(lines.items()) if not name.endswith("-oracle")]
    return sorted(ranked, key=lambda line: (line["pool"] != "-", np.inf if line["mean"] is None else line["mean"]))


def rounded(row):
    """Figures with their intervals in one cell, for people."""
    cells = {}
    for name, value in row.items():
        if isinstance(value, (str, int)):
            cells[name] = str(value)
        elif not name.endswith("_pm"):
            width = row.get(f"{name}_pm")
            sign, digits = "+" * name.startswith("vs_"), ".3f" if name == "ausuc" else ".1f"
            cell = "-" if value is None else format(value, sign + digits)
            cell += "" if width is None else f" ± {width:{digits}}"
            cells["U/U" if name == "unseen_among_unseen" else name.removesuffix("_overall")] = cell
    cells.pop("task", None)
    return cells


def latex(rows):
    """Rows of texts as a LaTeX table, for the package booktabs."""
    names = [name.replace("_", " ") for name in rows[0]]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule", " & ".join(names) + r" \\", r"\midrule"]
    for method, *cells in [row.values() for row in rows]:
        figures = ["--" if cell == "-" else f"${cell}$".replace("±", r"\pm") for cell in cells]
        lines.append(" & ".join([method.replace("_", r"\_"), *figures]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def show(title, rows, note, style):
    """Print a table for people, with its title and a note, if any."""
    rows = [rounded(row) for row in rows]
    if all(row.get("pool", "-") == "-" for row in rows):  # no other setting than the usual one
        rows = [{name: cell for name, cell in row.items() if name != "pool"} for row in rows]
    if style == "latex":
        print(f"\n% {title}\n" + (f"% {note}\n" if note else "") + latex(rows))
    else:
        print(f"\n**{title}**\n\n{table(rows)}" + (f"\n\n{note}" if note else ""))


def report(options):
    """Print a table per task, or in CSV and JSON one of all tasks; draw figures where they are wanted."""
    tasks = collect(options.runs, options.over_targets)
    if options.reference != Report.reference and not any(options.reference in methods for methods in tasks.values()):
        raise InputError(f"--reference {options.reference}: no such method was run")
    rows = rows_of(tasks, options.reference)
    if options.over_tasks:
        report_over_tasks(over_tasks(rows), options)
        return
    if options.format in ("csv", "json"):
        print(table(rows, options.format))
    for task, methods in tasks.items():
        if options.format in ("md", "latex"):
            note = footnote(run["final"] for runs in methods.values() for run in runs.values()).strip()
            show(task, [row for row in rows if row["task"] == task], note, options.format)
        if options.figures:
            draw_figures(task, methods, options)


def report_over_tasks(lines, options):
    """Print what each method closed on each task; draw it where that is wanted."""
    if not lines:
        raise InputError("--over-tasks: oracles only; run a method besides")
    if options.format in ("csv", "json"):
        print(table(lines, options.format))
    else:
        show("closed, % of the gap from the source model to the oracle", lines, MARKS, options.format)
    if options.figures:
        from results.figures import draw_over_tasks  # with matplotlib, which a table does without

        draw_over_tasks(lines, options.figures)


def draw_figures(task, methods, options):
    """Draw the figures of a task, of the runs with test images of seen and of unseen classes."""
    from results.figures import draw  # with matplotlib, which a table does without

    drawn = {method: {key: runs[key] for key in values(runs, "overall")} for method, runs in methods.items()}
    drawn = {method: runs for method, runs in drawn.items() if runs}
    if not drawn:
        print(f"{task}: no figures, since no run has test images of seen and of unseen classes", file=sys.stderr)
        return
    rows = rows_of({task: drawn}, options.reference)
    draw(task, rows[::-1], {method: list(runs.values()) for method, runs in drawn.items()}, options.figures)


@dataclass
class Choose:
    """Rank methods by pseudo splits of the labelled images, in which some of the seen classes play the unseen ones. No
    label of a truly unseen class has a part in it; what is finished is skipped."""

    pair: str
    """dataset:source:target"""
    methods: tuple[str, ...] = tuple(METHODS)
    """scripts by name, each with flags of its own if quoted: "masked_ft --lr 0.01 --name masked_ft_fast" """
    pseudo_splits: int = 3
    """of the labelled images; each is one run per method"""
    split_seed: int = 0
    """which classes are seen, and which images are for training"""
    seed: int = 0
    """training seed"""
    source_seed: int = 0
    """of the source model"""
    jobs: int = 1
    """runs at a time, as in run"""
    runs_dir: str = "runs"
    """where run folders and source models are kept"""
    flags: str = ""
    """flags for every run, with an equals sign: --flags="--data-root ROOT --source-checkpoint hers.pt" """


def plain_commands(options):
    """{name: command} of every method, without a pseudo split. Raises InputError on a wrong flag."""
    check_methods(options.methods)
    data.check_flag("jobs", options.jobs, 1)
    data.check_flag("pseudo_splits", options.pseudo_splits, 1)
    if options.pair.endswith(":all"):
        raise InputError(f"--pair {options.pair}: must name a single target")
    expand(options.pair, options.flags, "--pair")
    seeds = (options.split_seed, options.source_seed, options.seed)
    commands = {}
    for method in options.methods:
        command = cell_command(method, options.pair, *seeds, options)
        if "--oracle" in command:
            raise InputError(f"--methods {method}: an oracle learns from labels of unseen classes; leave it out")
        script, *flags = words_of(f"{method} {options.flags}")
        name = flag_values(flags).get("--name", script)
        if name in commands:
            raise InputError(f"--methods {method}: {name} is there already; give this one another --name")
        commands[name] = command
    return commands


def pseudo_run(name, number, options):
    """The run of a pseudo split, from the folder that runs.Run gives it. Raises InputError if it is not there."""
    dataset, source, target = options.pair.split(":")
    folder = f"split{options.split_seed}-seed{options.seed}"
    folder += f"-source{options.source_seed}" if options.source_seed else ""
    path = Path(options.runs_dir, dataset, f"{source}-{target}", name, f"{folder}-pseudo{number}")
    return read(path) | {"pool": read_json(path / "done.json").get("unlabelled_images", 0)}


def ranking(methods):
    """Rows (dicts), the best mean overall accuracy first, of {method: {(pseudo split,): run}}. Differences are to the
    first. Raises InputError where the overall accuracy is not known."""
    overall = {method: interval([*values(runs, "overall").values()])[0] for method, runs in methods.items()}
    if None in overall.values():
        raise InputError("no pseudo split has test images of both seen and unseen classes; take another --split-seed")
    worst_to_best = {method: methods[method] for method in sorted(overall, key=overall.get)}
    first = list(worst_to_best)[-1]
    names = {"overall": "overall", "seen": "pseudo_seen", "unseen": "pseudo_unseen", f"vs_{first}": f"vs_{first}"}
    names |= {f"{name}_pm": f"{shown}_pm" for name, shown in names.items()}
    rows = rows_of({"pseudo splits": worst_to_best}, first)[::-1]
    names = {"method": "method", "pool": "pool", **names}
    return [{shown: row[name] for name, shown in names.items()} for row in rows]


def choose(options):
    """Run what is not finished yet, and print the ranking."""
    commands, numbers = plain_commands(options), range(options.pseudo_splits)
    run_commands([[*command, "--pseudo-split", str(k)] for command in commands.values() for k in numbers], options)
    rows = ranking({name: {(k,): pseudo_run(name, k, options) for k in numbers} for name in commands})
    show(f"{options.pair}, split seed {options.split_seed}, mean over {len(numbers)} pseudo splits", rows, STUDY, "md")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    options = tyro.extras.subcommand_cli_from_dict({"run": RunGrid, "report": Report, "choose": Choose})
    try:
        {RunGrid: run_grid, Report: report, Choose: choose}[type(options)](options)
        sys.stdout.flush()
    except InputError as error:
        fail(error)
    except BrokenPipeError:  # the reader, head for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
