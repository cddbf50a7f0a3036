"""Four figures of a task, and one of all tasks, for benchmark.py report --figures.

rows: of the report, from the best method to the worst; names of figures have _pm for the half width of the interval.
runs: {method: [what eval.read_run returns]}. The source model has a row, but no runs of its own.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from eval import CALIBRATED, REQUIRED, read_arrays, seen_unseen_curve
from files import InputError, write_atomic

COLOURS = (*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2])  # 20: none is given twice


def draw(task, rows, runs, folder):
    """Draw the figures as PNG and PDF."""
    path = Path(folder) / "-".join(task.replace(",", "").replace("/", "_").split())
    styles = styles_of(rows, runs)
    save(dilemma(rows, styles), f"{path}-dilemma", f"{task}: mean and 95 % interval over splits", legend=False)
    title = f"{task}: any bias on the unseen logits (filled: none, open: ALG)"
    save(curves(rows, runs, styles), f"{path}-curves", title)
    save(epochs(rows, runs, styles), f"{path}-epochs", f"{task}: mean over splits")
    save(calibration(rows), f"{path}-calibration", f"{task}: before and after calibration")


def styles_of(rows, runs):
    """{method: how its lines and markers look}; black for the source model and for oracles."""
    styles, coloured = {}, 0
    for method in [row["method"] for row in rows]:
        styles[method] = {"color": "black", "marker": "X", "ls": "-", "label": method}
        if method not in runs:
            styles[method]["marker"] = "*"
        elif not method.endswith("-oracle"):
            look = {"color": COLOURS[coloured % 20], "marker": "osD^v<>Ph"[coloured % 9]}
            styles[method] |= look | {"ls": ("-", "--")[coloured // 10 % 2]}
            coloured += 1
    return styles


def save(figure, path, title, legend=True):
    """Write a figure as path.png and path.pdf, the same bytes at any time."""
    figure.suptitle(title, fontsize=10)
    for ax in figure.axes:
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
    if legend:
        figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    look = {"dpi": 150, "bbox_inches": "tight"}
    write_atomic(f"{path}.png", partial(figure.savefig, format="png", **look))
    write_atomic(f"{path}.pdf", partial(figure.savefig, format="pdf", metadata={"CreationDate": None}, **look))


def seen_unseen_axes(rows):
    """Axes of unseen against seen accuracy that hold the means of all methods."""
    ax = Figure((5.2, 4.2), layout="constrained").subplots()
    lowest = {group: min(row[group] for row in rows) for group in ("seen", "unseen")}
    ax.set(xlabel="accuracy on seen classes (%)", xlim=(max(0, lowest["seen"] - 8), 101))
    ax.set(ylabel="accuracy on unseen classes (%)", ylim=(max(0, lowest["unseen"] - 8), 101))
    return ax


def dilemma(rows, styles):
    """Figure: what each method has on seen and on unseen classes, with intervals."""
    ax = seen_unseen_axes(rows)
    for row in rows:
        marker = {**styles[row["method"]], "ls": "", "ms": 8, "lw": 1, "capsize": 2}
        ax.errorbar(row["seen"], row["unseen"], yerr=row["unseen_pm"], xerr=row["seen_pm"], **marker)
    low, high = ax.get_ylim()
    height = low
    for row in sorted(rows, key=lambda row: row["unseen"]):  # names in the margin, a line from each to its point
        height = max(height + (high - low) / 24, row["unseen"])
        line = {"arrowstyle": "-", "color": styles[row["method"]]["color"], "lw": 0.6}
        place = {"xytext": (1.04, height), "textcoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        ax.annotate(row["method"], (row["seen"], row["unseen"]), arrowprops=line, annotation_clip=False, **place)
    return ax.figure


def mean_curve(runs):
    """Seen and unseen accuracy in %, each [K], as means over the runs at the same K biases."""
    files = [Path(run["run"]) / "logits.npz" for run in runs]
    curves = [seen_unseen_curve(*read_arrays(file, REQUIRED)) for file in files]
    flips = np.concatenate([gamma for gamma, _, _ in curves])
    biases = np.unique(np.quantile(flips, np.linspace(0, 1, 400)))
    seen = np.mean([np.interp(biases, gamma, seen) for gamma, seen, _ in curves], 0)
    unseen = np.mean([np.interp(biases, gamma, unseen) for gamma, _, unseen in curves], 0)
    return seen, unseen


def curves(rows, runs, styles):
    """Figure: what any bias on the logits of the unseen classes trades."""
    ax = seen_unseen_axes(rows)
    for row in rows:
        own = runs.get(row["method"])
        if own is None:
            continue
        style = styles[row["method"]]
        marker = {**style, "ls": "", "ms": 7}
        ax.plot(*mean_curve(own), lw=1.2, color=style["color"], ls=style["ls"])
        ax.plot(row["seen"], row["unseen"], **marker)
        calibrated = [run["alg"] for run in own]
        if all(calibrated):
            seen, unseen = (np.mean([figures[group] for figures in calibrated]) for group in ("seen", "unseen"))
            ax.plot(seen, unseen, fillstyle="none", **{**marker, "label": None})
    return ax.figure


def epochs(rows, runs, styles):
    """Figure: accuracies on all and on unseen classes after each epoch."""
    figure = Figure((8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylabel("accuracy (%)")
    for method in [row["method"] for row in rows if row["method"] in runs]:
        texts = [(Path(run["run"]) / "log.jsonl").read_text() for run in runs[method]]
        logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
        for ax, group in zip(panels, ("overall", "unseen"), strict=True):
            mean = np.mean([[line[group] for line in log] for log in logs], 0)
            ax.plot([line["epoch"] for line in logs[0]], mean, ms=3, lw=1, **styles[method])
            ax.set(xlabel="epoch", title="all classes" if group == "overall" else "unseen classes")
    return figure


def calibration(rows):
    """Figure: overall accuracies before and after each calibration."""
    ax = Figure((6.4, 0.5 * len(rows) + 1), layout="constrained").subplots()
    labels = ["no calibration", "ALG", "ALG against the source", "PCV", "best bias by test labels (oracle)"]
    columns = ["overall", *(f"{kind}_overall" for kind in CALIBRATED)]
    for i, (column, label) in enumerate(zip(columns, labels, strict=True)):
        bars = [(place, row[column], row[f"{column}_pm"] or 0) for place, row in enumerate(rows)]
        bars = [(place + 0.17 * (i - 2), mean, width) for place, mean, width in bars if mean is not None]
        if bars:
            place, mean, width = zip(*bars, strict=True)
            ax.barh(place, mean, 0.16, xerr=width, color=COLOURS[i], label=label, error_kw={"lw": 0.8})
    lowest = min(row["overall"] for row in rows)
    ax.set(xlabel="overall accuracy (%)", xlim=(max(0, lowest - 15), 100))
    ax.set(yticks=range(len(rows)), yticklabels=[row["method"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    return ax.figure


def draw_over_tasks(lines, folder):
    """Draw what each method closed on each task, a point per task; filled where defaults were tuned on it (*).

    lines: of benchmark.over_tasks, from the worst mean to the best; of them, methods that were run on every task.
    Raises InputError if there is none.
    """
    lines = [line for line in lines if line["mean"] is not None]
    if not lines:
        raise InputError("--figures: no method was run on every task, with an oracle")
    tasks = [name for name in lines[0] if f"{name}_pm" in lines[0]]
    ax = Figure((6.4, 0.34 * len(lines) + 1), layout="constrained").subplots()
    for i, task in enumerate(tasks):
        look = {"color": COLOURS[i % 20], "marker": "osD^v<>Ph"[i % 9], "ls": "", "ms": 6}
        look["fillstyle"] = "full" if task.endswith("*") else "none"
        ax.plot([line[task] for line in lines], range(len(lines)), label=task, **look)
    ax.plot([line["mean"] for line in lines], range(len(lines)), "k|", ms=14, label="mean")
    ax.axvline(0, color="black", lw=0.8)
    ax.set(xlabel="gap from the source model (0) to the oracle (100) closed, %")
    ax.set(yticks=range(len(lines)), yticklabels=[line["method"] for line in lines])
    save(ax.figure, Path(folder) / "over-tasks", "means over splits; filled: defaults were tuned on this task")
