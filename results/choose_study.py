"""# Does the ranking by pseudo splits find the best method?

What `python benchmark.py choose` goes by, here two pseudo splits (by default three), against the truth that its
user does not have: accuracy on the test images.

```bash
python benchmark.py run --jobs 2 --pcv 2 --source-seeds split --methods ht_distill masked_ft naive_ft lolsgd
python results/choose_study.py runs --always ht_distill > results/choose.md
```

- overall: the true accuracy of the method that is taken, mean over splits.
- regret: how many points more the truly best method of the split has.
- best: on how many per cent of the splits the truly best method is taken.
- Spearman: rank correlation of the methods' mean accuracies on a split's pseudo splits with their true ones.

Intervals are 95 % t intervals over split seeds; over all, the tasks of a split seed are averaged first. The ranking
beats always taking one method if the whole interval of the difference in accuracy is above 0.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import collect, interval, read, show, unit_means
from eval import table
from files import InputError, fail

RANKING = "the first of the ranking"


def measured(folders):
    """{(split seed, task, ...): {method: (its accuracies on pseudo splits, its true accuracy)}}, without the methods
    that have no pseudo split."""
    splits = {}
    for task, methods in collect(folders).items():
        for method, runs in methods.items():
            for (split_seed, *key), run in runs.items():
                folder = Path(run["run"])
                done = sorted(folder.parent.glob(f"{folder.name}-pseudo*/done.json"))
                pseudo = [read(path.parent)["final"]["overall"] for path in done]
                if pseudo:
                    figures = (pseudo, run["final"]["overall"])
                    splits.setdefault((split_seed, task, *key), {})[method] = figures
    return splits


def complete(splits):
    """The splits where all methods of their task have all its pseudo splits; of these the mean. Raises InputError if
    there is none."""
    methods, counts = {}, {}
    for (_, task, *_), split in splits.items():
        methods.setdefault(task, set()).update(split)
        counts.setdefault(task, set()).update(len(pseudo) for pseudo, _ in split.values())
    whole = {}
    for key, split in splits.items():
        task = key[1]
        fewest = min(len(pseudo) for pseudo, _ in split.values())
        known = all(None not in pseudo for pseudo, _ in split.values())
        if known and split.keys() == methods[task] and fewest == max(counts[task]):
            whole[key] = {method: (float(np.mean(pseudo)), true) for method, (pseudo, true) in split.items()}
    if not whole:
        raise InputError("no split has pseudo splits of every method, each beside its whole run")
    return whole


def spearman(split):
    """Rank correlation of the two accuracies over the methods of a split; 0 where either tells none apart."""
    pseudo, true = zip(*split.values(), strict=True)
    if len({*pseudo}) == 1 or len({*true}) == 1:
        return 0.0
    return float(stats.spearmanr(pseudo, true).statistic)


def best(split, column):
    """The method with the best accuracy: on pseudo splits (column 0), or truly (1)."""
    return max(split, key=lambda method: split[method][column])


def taken(split):
    """{way to take a method: its true accuracy}: the best on pseudo splits, and always the same."""
    always = {f"always {method}": true for method, (_, true) in split.items()}
    return {RANKING: split[best(split, 0)][1], **always}


def rows_of(splits, always):
    """A row (dict) for each way to take a method that all splits know, the smallest regret first."""
    ways = {key: taken(split) for key, split in splits.items()}
    known = set.intersection(*(set(way) for way in ways.values()))
    if f"always {always}" not in known:
        raise InputError(f"--always {always}: not every task has pseudo splits of it, each beside its whole run")
    rows = []
    for name in known:
        overall = {key: way[name] for key, way in ways.items()}
        regret = {key: max(way.values()) - way[name] for key, way in ways.items()}
        difference = {key: way[name] - way[f"always {always}"] for key, way in ways.items()}
        row = {"taken": name}
        for column, figures in (("overall", overall), ("regret", regret), (f"vs_{always}", difference)):
            row[column], row[f"{column}_pm"] = interval([*unit_means(figures).values()])
        row["best, %"] = 100 * float(np.mean([points == 0 for points in regret.values()]))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["regret"], row["taken"]))


def title(name, splits):
    """What a table is of, with the mean Spearman correlation."""
    mean, width = interval([*unit_means({key: spearman(split) for key, split in splits.items()}).values()])
    return f"{name}, {len(splits)} splits: Spearman {mean:.2f}" + ("" if width is None else f" ± {width:.2f}")


def verdict(rows, always):
    """A sentence on the ranking against always taking one method."""
    row = {row["taken"]: row for row in rows}
    mine, other = row[RANKING], row[f"always {always}"]
    width = mine[f"vs_{always}_pm"]
    beats = "beats" if width is not None and mine[f"vs_{always}"] > width else "does not beat"
    regrets = f"its regret is {mine['regret']:.2f} points against {other['regret']:.2f}"
    return f"**The ranking {beats} always taking {always}:** {regrets}."


def each_split(splits, always):
    """A line (dict of texts) per split, by task and seed."""
    lines = []
    for key in sorted(splits, key=lambda key: (key[1], key[0])):
        split = splits[key]
        first, top = best(split, 0), best(split, 1)
        line = {"task, split seed": f"{key[1]}, {key[0]}", "Spearman": f"{spearman(split):.2f}"}
        line |= {"first of the ranking": first, "truly best": top}
        line["regret"] = f"{split[top][1] - split[first][1]:.1f}"
        line[f"regret of {always}"] = f"{split[top][1] - split[always][1]:.1f}"
        lines.append(line)
    return lines


def main(runs: tuple[Path, ...], /, always: str):
    """Print the study as Markdown.

    Args:
        runs: folders with finished runs somewhere below them, and pseudo splits beside these
        always: the method that one would take without a ranking
    """
    try:
        splits = complete(measured(runs))
        rows = rows_of(splits, always)
    except InputError as error:
        fail(error)
    print(f"{__doc__}\n{verdict(rows, always)}")
    show(title("over all", splits), rows, "", "md")
    for task in sorted({task for _, task, *_ in splits}):
        own = {key: split for key, split in splits.items() if key[1] == task}
        show(title(task, own), rows_of(own, always), "", "md")
    print(f"\n**each split**\n\n{table(each_split(splits, always))}")


if __name__ == "__main__":
    tyro.cli(main)
