"""What a model achieved: accuracies and calibration from its logits, and a table of runs.

    python eval.py RUN... --format md        # every figure anew, from the runs' logits.npz

The functions take numpy arrays or tensors, need numpy alone and raise ValueError. Accuracies are top-1 in % over all C
candidate classes. An unknown figure is None (null in JSON, empty in CSV, - in Markdown), never nan.
"""

import csv
import io
import json
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

# ------------------------------------------------------------------------------------------ accuracies


def to_numpy(x):
    """An array, or a tensor on any device and of any dtype, as a numpy array."""
    if hasattr(x, "detach"):  # torch need not be imported to know a tensor
        x = x.detach().cpu()
        x = x.float() if "bfloat16" in str(x.dtype) else x  # which numpy does not have
    return np.asarray(x)


def check(logits, labels, seen):
    """logits float [N, C], labels int64 [N] and seen bool [C] as numpy arrays; seen may be given as 0 and 1.
    Raises ValueError on shapes that do not fit, a label outside 0..C-1, or a mask without seen or unseen classes."""
    logits, labels, seen = to_numpy(logits), to_numpy(labels), to_numpy(seen)
    if seen.dtype.kind in "iu" and np.isin(seen, (0, 1)).all():
        seen = seen.astype(bool)
    got = f"{logits.shape}, {labels.shape}, {seen.dtype} {seen.shape}"
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or seen.shape != logits.shape[1:] or seen.dtype != bool:
        raise ValueError(f"want logits [N, C], labels [N], seen bool [C]; got {got}")
    logits = logits.astype(np.promote_types(logits.dtype, np.float32), copy=False)
    if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < len(seen)):
        raise ValueError(f"labels must be integers from 0 to {len(seen) - 1}")
    if seen.all() or not seen.any():
        raise ValueError(f"the mask must have seen and unseen classes; {seen.sum()} of {len(seen)} are seen")
    return logits, labels.astype(np.int64), seen


def check_finite(logits):
    """Raises ValueError, naming the row, on a value of logits [N, C] that is not finite."""
    bad = ~np.isfinite(logits).all(1)
    if bad.any():
        raise ValueError(f"row {bad.argmax()} has nan or inf")


def best_in(classes, logits):
    """The class, int64 [N], of the highest logit among these classes; of equal ones the lower index counts."""
    parts = np.array_split(logits, len(logits) // 256 + 1)  # what fits a processor's cache is many times as fast
    return np.concatenate([classes[np.take(part, classes, 1).argmax(1)] for part in parts])


def mean_percent(right):
    return 100 * float(np.mean(right)) if len(right) else None


def accuracies(logits, labels, seen, gamma=0.0):
    """All accuracies of logits [N, C] for labels [N] and the mask seen [C], in % or None.

    gamma is added to the logits of the unseen classes before anything is compared.
    overall, seen, unseen: images of all / seen / unseen classes, over all C candidates (a tie goes to the lower index).
    seen_among_seen, unseen_among_unseen: the same images, with the candidates of their own group only.
    harmonic_mean: of seen and unseen. class_mean: mean accuracy over the classes that have images.
    ausuc: area under the seen-unseen curve (Chao et al. 2016, arXiv 1605.04253), from 0 to 1; no bias can change it.
    If seen or unseen classes have no images, overall, harmonic_mean, class_mean and ausuc are not known: None.
    Raises ValueError as check does, and at nan or inf.
    """
    logits, labels, seen = check(logits, labels, seen)
    flips, is_seen, right = flip_points(logits, labels, seen)
    both = is_seen.any() and not is_seen.all()
    correct = (logits + gamma * ~seen if gamma else logits).argmax(1) == labels
    images = np.bincount(labels, minlength=len(seen))
    share = np.bincount(labels[correct], minlength=len(seen)) / images.clip(1)
    a, b = mean_percent(correct[is_seen]), mean_percent(correct[~is_seen])
    if both:
        _, kept, found = curve(flips, is_seen, right)
        area = abs(float(np.trapezoid(found, kept)))  # exact: between its points the curve is straight
    return {
        "overall": mean_percent(correct) if both else None,
        "seen": a,
        "unseen": b,
        "seen_among_seen": mean_percent(right[is_seen]),
        "unseen_among_unseen": mean_percent(right[~is_seen]),
        "harmonic_mean": 2 * a * b / max(a + b, 1e-9) if both else None,
        "class_mean": mean_percent(share[images > 0]) if both else None,
        "ausuc": area / 1e4 if both else None,
    }


def flip_points(logits, labels, seen):
    """(bias, is_seen, right) of every image, each [N].

    bias: the gamma above which the image is taken for an unseen class. is_seen: whether its class is seen.
    right: whether it is classified correctly where it is taken for a class of its own group."""
    logits, labels, seen = check(logits, labels, seen)
    check_finite(logits)
    is_seen = seen[labels]
    seen_class, unseen_class = (best_in(np.flatnonzero(group), logits) for group in (seen, ~seen))
    right = np.where(is_seen, seen_class, unseen_class) == labels
    image = np.arange(len(logits))
    return logits[image, seen_class].astype(np.float64) - logits[image, unseen_class], is_seen, right


def curve(flips, is_seen, right):
    """See seen_unseen_curve; from what flip_points returns."""
    if is_seen.all() or not is_seen.any():
        raise ValueError(f"{is_seen.sum()} of {len(flips)} images are of seen classes: there is no curve")
    flips, step = np.unique(flips, return_inverse=True)
    lost = np.bincount(step[is_seen & right], minlength=len(flips))
    won = np.bincount(step[~is_seen & right], minlength=len(flips))
    below, beyond = flips[[0, -1]] + (-1, 1) * np.maximum(1, np.abs(flips[[0, -1]]))
    gamma = np.concatenate([[below], flips[:-1] + np.diff(flips) / 2, [beyond]])
    if 0 not in flips:
        gamma[np.searchsorted(flips, 0)] = 0
    kept = np.concatenate([[lost.sum()], lost.sum() - lost.cumsum()])
    found = np.concatenate([[0], won.cumsum()])
    return gamma, 100 * kept / is_seen.sum(), 100 * found / (~is_seen).sum()


def seen_unseen_curve(logits, labels, seen):
    """What a bias gamma on the unseen classes' logits trades: (gamma, seen accuracy, unseen accuracy), each [K + 1].

    The K values at which a prediction flips from a seen to an unseen class are found by sorting, O(N C + N log N).
    There is one point midway between each two of them and one beyond either end; where such a range has 0, it is at 0.
    Accuracies: %, over all C candidates. Raises ValueError as check does, at nan or inf, or if a group has no image."""
    return curve(*flip_points(logits, labels, seen))


def effective_rank(features):
    """exp of the entropy of the centred features' [N, D] singular values (Roy and Vetterli, 2007): from 1 to D, small
    where features have become alike. None where they are not finite, or all the same."""
    z = to_numpy(features).astype(np.float64)
    if not np.isfinite(z).all():
        return None
    z = z - z.mean(0)
    if not z.any():
        return None
    values = np.sqrt(np.linalg.eigvalsh(z.T @ z).clip(0))
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


# ------------------------------------------------------------------------------------------ calibration


def logit_gap(logits, labels, seen, of_group):
    """Mean over images of of_group(logits of the seen classes but the label's) - of_group(logits of the unseen ones).

    of_group: np.mean or np.max, over the classes. None without images, or with a single seen class.
    Raises ValueError as check does, at nan or inf, and at a label of an unseen class."""
    logits, labels, seen = check(logits, labels, seen)
    check_finite(logits)
    if not seen[labels].all():
        raise ValueError(f"row {int((~seen[labels]).argmax())} is of an unseen class; ALG takes seen ones only")
    if not len(labels) or seen.sum() < 2:
        return None
    logits = logits.astype(np.float64)
    others = logits[seen & (np.arange(len(seen)) != labels[:, None])].reshape(len(labels), -1)
    return float((of_group(others, 1) - of_group(logits[:, ~seen], 1)).mean())


def alg_gamma(train_logits, train_labels, seen):
    """ALG, average logit gap (arXiv 2409.16223): the bias that closes the gap of the mean logits of target TRAINING
    images (the published code takes the images that it scores). None and errors as in logit_gap."""
    return logit_gap(train_logits, train_labels, seen, np.mean)


def alg_source_gamma(train_logits, source_logits, train_labels, seen):
    """ALG against the source model, ours: the bias that brings the gap back to the source model's.

    source_logits [N, C]: the source model's for the same images. The gap is between the highest logits, which a
    prediction compares. The source model's own is no bias: it says which classes look alike. None, errors: logit_gap.
    """
    if np.shape(train_logits) != np.shape(source_logits):
        raise ValueError(f"train_logits: {np.shape(train_logits)}, and the source model's {np.shape(source_logits)}")
    gap = logit_gap(train_logits, train_labels, seen, np.max)
    source_gap = named("source_train_logits", logit_gap, source_logits, train_labels, seen, np.max)
    return None if gap is None else gap - source_gap


def best_bias(flips, is_seen, right):
    """See best_gamma; from what flip_points returns."""
    gamma, seen_accuracy, unseen_accuracy = curve(flips, is_seen, right)
    overall = seen_accuracy * is_seen.sum() + unseen_accuracy * (~is_seen).sum()
    best = gamma[overall >= overall.max() - 1e-6]
    return float(best[np.abs(best).argmin()])


def best_gamma(logits, labels, seen):
    """The bias with the best overall accuracy, of equally good ones the nearest to 0: on test images an oracle."""
    return best_bias(*flip_points(logits, labels, seen))


def pcv_gamma(splits):
    """PCV, pseudo cross-validation (arXiv 2409.16223): (gamma, spread), or (None, None) if no split has both groups.
    splits: (logits, labels, seen) of held-out training images, one for each run in which some seen classes play unseen.
    gamma is the best bias for the images of all splits together; spread is max - min of the splits' own best biases.
    The paper takes the mean of those biases, where pseudo-unseen accuracy is not below the source model's."""
    points = [named(f"pseudo split {i}", flip_points, *split) for i, split in enumerate(splits)]
    own = [best_bias(*point) for point in points if 0 < point[1].sum() < len(point[1])]
    if not own:
        return None, None
    flips, is_seen, right = (np.concatenate(arrays) for arrays in zip(*points, strict=True))
    return best_bias(flips, is_seen, right), max(own) - min(own)


# ------------------------------------------------------------------------------------------ a table of runs

REQUIRED = ("test_logits", "test_labels", "seen")
OPTIONAL = ("source_test_logits", "train_logits", "train_labels", "source_train_logits", "classes")
NOT_COMPARED = ("device", "resident", "overwrite", "save_model", "checkpoint_every")  # flags that change no figure
NOT_COMPARED += ("runs_dir", "data_root", "download", "cache_dir", "track")
CALIBRATED = ("alg", "alg_source", "pcv", "oracle_gamma")  # biases on the unseen classes' logits
UNKNOWN = "Without test images of both seen and unseen classes, overall is not known (-) and a row is not ranked."
SHOWN = ("run", "source_overall", "overall", "seen", "unseen", "unseen_among_unseen", "ausuc", "alg_overall")


def named(name, function, *arguments):
    """function(*arguments), with the name of what it was given before a ValueError's message."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_arrays(path, names, optional=()):
    """The arrays of these names of an npz file, in their order, then the optional ones, None where they are not there.
    Raises ValueError, naming the file, if it is damaged or lacks one of the names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names] + [file.get(name) for name in optional]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not the complete logits.npz of a run ({type(error).__name__}: {error})") from error


def compared(flags):
    """The flags of a run that determine its figures. For --dataset folder data_root is one: it says which images."""
    kept = ("data_root",) if flags.get("dataset") == "folder" else ()
    return {name: value for name, value in flags.items() if name in kept or name not in NOT_COMPARED}


def read_flags(folder):
    """The flags in a run's args.json that determine its figures; {} without the file."""
    path = folder / "args.json"
    return compared(named(path, json.loads, path.read_bytes())) if path.exists() else {}


def pseudo_splits(folder):
    """For pcv_gamma: every finished pseudo split of the run in `folder`, made by the run's own command and
    --pseudo-split k. No label of a truly unseen class has a part in it. Raises ValueError if other flags made it."""
    splits, flags = [], read_flags(folder)
    for path in sorted(folder.parent.glob(f"{folder.name}-pseudo*/done.json")):
        own = read_flags(path.parent)
        both = own.keys() & flags.keys() - {"pseudo_split", "batch_size"}  # of few images a batch is smaller
        if other := [f"{name} {own[name]} (there {flags[name]})" for name in sorted(both) if own[name] != flags[name]]:
            raise ValueError(f"{path.parent}: other {', '.join(other)} than {folder}; run it again with --overwrite")
        splits.append(read_arrays(path.with_name("logits.npz"), REQUIRED))
    return splits


def read_run(path):
    """{"run", "classes", "source", "final", *CALIBRATED} of a run's folder, or of an npz file with REQUIRED in it.

    source and final are accuracies. Each of CALIBRATED is the accuracies with the bias of that name, and "gamma"; pcv
    also has "gamma_spread". What cannot be computed is None. Raises ValueError, naming the file and the array."""
    path = Path(path) / "logits.npz" if Path(path).is_dir() else Path(path)
    logits, labels, seen, source, *train, classes = read_arrays(path, REQUIRED, OPTIONAL)
    run = {"run": str(path.parent if path.name == "logits.npz" else path)}
    run["classes"] = [] if classes is None else classes.tolist()
    for name, array, z in (("source", "source_test_logits", source), ("final", "test_logits", logits)):
        run[name] = None if z is None else named(f"{path}, {array}", accuracies, z, labels, seen)
    gammas = dict.fromkeys(CALIBRATED) | named(f"{path}, train_logits", alg_gammas, *train, seen)
    splits = pseudo_splits(path.parent)
    if splits:
        gammas["pcv"], spread = pcv_gamma(splits)
    if run["final"]["ausuc"] is not None:
        gammas["oracle_gamma"] = best_gamma(logits, labels, seen)
    for name, gamma in gammas.items():
        run[name] = None if gamma is None else {"gamma": gamma, **accuracies(logits, labels, seen, gamma)}
    if run["pcv"]:
        run["pcv"]["gamma_spread"] = spread
    return run


def alg_gammas(train_logits, train_labels, source_train_logits, seen):
    """{name: bias} of ALG and, with the source model's logits, of ALG against the source, from arrays or None."""
    if train_logits is None or train_labels is None:
        return {}
    train_logits, train_labels, seen = check(train_logits, train_labels, seen)
    own = seen[train_labels]  # an oracle trains on others besides
    gammas = {"alg": alg_gamma(train_logits[own], train_labels[own], seen)}
    if source_train_logits is not None:
        gammas["alg_source"] = alg_source_gamma(train_logits[own], source_train_logits[own], train_labels[own], seen)
    return gammas


def row_of(run):
    """A line of the table for what read_run returns."""
    cells = {"run": run["run"], "source_overall": (run["source"] or {}).get("overall"), **run["final"]}
    for name in CALIBRATED:
        figures = run[name] or {}
        cells |= {f"{name}_overall": figures.get("overall"), f"{name}_bias": figures.get("gamma")}
    return cells | {"pcv_bias_spread": (run["pcv"] or {}).get("gamma_spread")}


def number(value, width=0, digits=2):
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def table(rows, style="md"):
    """Rows (dicts with the same keys) as a Markdown table with two decimals, or as CSV or JSON in full precision."""
    if style == "json":
        return json.dumps(rows, indent=2)
    if style == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([rows[0].keys(), *(row.values() for row in rows)])
        return stream.getvalue().rstrip()
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [[v if isinstance(v, str) else number(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def footnote(figures):
    """UNKNOWN, for under a table, if one of these accuracies lacks the overall one; else nothing."""
    return f"\n\n{UNKNOWN}" if any(own["overall"] is None for own in figures) else ""


def main(runs: tuple[Path, ...], /, format: Literal["md", "csv", "json"] = "md", all: bool = False):
    """Print a table with a row for every run, recomputed from its logits.npz.

    Args:
        runs: run folders, or folders with runs somewhere below them, or npz files
        format: md rounds to two decimals and shows eight columns; csv and json give all in full precision
        all: show all columns in md too
    """
    try:
        results = [read_run(path) for run in runs for path in sorted(run.rglob("logits.npz")) or [run]]
        if not results:
            raise ValueError("name the folder of a run")
        for run in results[1:]:
            a, b = run["classes"], results[0]["classes"]
            if a != b:
                raise ValueError(f"{run['run']} and the others are over different classes ({len(a)} and {len(b)})")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rows = results if format == "json" else [row_of(result) for result in results]
    if format == "md" and not all:
        rows = [{name: row[name] for name in SHOWN} for row in rows]
    note = footnote(result["final"] for result in results) if format == "md" else ""
    print(table(rows, format) + note)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
