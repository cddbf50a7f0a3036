"""Four figures of a task, for benchmark.py report --figures.

rows: of the report, from the best method to the worst; names of figures have _pm for the half width of the interval.
runs: {method: [what eval.read_run returns]}. The source model has a row, but no runs of its own.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from eval import CALIBRATED, REQUIRED, read_arrays, seen_unseen_curve
from files import write_atomic

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")  # Okabe and Ito


def draw(task, rows, runs, folder):
    """Draw the figures as PNG and PDF."""
    path = Path(folder) / "-".join(task.replace(",", "").split())
    styles = styles_of(rows, runs)
    save(dilemma(rows, styles), f"{path}-dilemma", f"{task}: mean and 95 % interval over splits")
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
            look = {"color": COLOURS[coloured % 8], "marker": "osD^v<>Ph"[coloured % 9]}
            styles[method] |= look | {"ls": ("-", "--")[coloured // 8 % 2]}
            coloured += 1
    return styles


def save(figure, path, title):
    """Write a figure as path.png and path.pdf, the same bytes at any time."""
    figure.suptitle(title, fontsize=10)
    for ax in figure.axes:
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
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
    """Figure: accuracies on seen and on unseen classes after each epoch."""
    figure = Figure((8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylabel("accuracy (%)")
    for method in [row["method"] for row in rows if row["method"] in runs]:
        texts = [(Path(run["run"]) / "log.jsonl").read_text() for run in runs[method]]
        logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
        for ax, group in zip(panels, ("seen", "unseen"), strict=True):
            mean = np.mean([[line[group] for line in log] for log in logs], 0)
            ax.plot([line["epoch"] for line in logs[0]], mean, ms=3, lw=1, **styles[method])
            ax.set(xlabel="epoch", title=f"{group} classes")
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
