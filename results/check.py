"""Are the printed figures those of the runs?

    python results/check.py runs seen pools            # compares; exit code 1 where something differs
    python results/check.py runs seen pools --write    # puts the runs' tables in place of the printed ones

Compared are, in README.md and results/README.md, each table with a row per method, by `benchmark.py report`'s own rows;
what the first command prints; and each figure with a decimal in the text of the parts about such tables. So are
table.csv and the result that a script's header names. A table of tasks or methods that the runs do not have is named.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmark
from eval import read_run, table
from files import InputError, fail, write_text
from runs import result_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "results/README.md")
PARTS = ("# Holistic transfer", "## Over tasks", "## By task", "## Which method")  # whose text is about the tables
REFERENCES = ("naive_ft", "masked_ft", "ht_distill", "infomax")  # of the differences that the pages name
FIRST = "digits/mnist-optdigits/ht_distill/split0-seed0"  # the run that README's first command makes
FIGURE = re.compile(r"-?\d+\.\d( ± \d+\.\d)?(?![\d.])")


@dataclass
class Check:
    """Compare the printed figures with those of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with finished runs: the grid's, then those of other tasks, or of other methods on the grid's tasks; the
    titles of these methods' tables end in the folder's name"""
    write: bool = False
    """put the runs' tables in place of the printed ones; text stays as it is, and is compared"""


def measure(tasks, name=""):
    """{(title, reference): rows as benchmark.py report prints them}. A title is a task, or "over tasks" for what was
    closed; it ends in name."""
    tables = {}
    for reference in REFERENCES:
        rows = benchmark.rows_of(tasks, reference)
        tables["over tasks" + name, reference] = texts(benchmark.over_tasks(rows))
        for task in tasks:
            tables[task + name, reference] = texts([row for row in rows if row["task"] == task])
    return tables


def overall(tasks, grid):
    """A row per method: its accuracy on each task, and on the grid's, were 10 or 90 % of the images of seen classes."""
    lines = {}
    for row in benchmark.rows_of(tasks, REFERENCES[0]):
        line = lines.setdefault(row["method"], {"method": row["method"]})
        line[row["task"].partition(" ")[2]] = benchmark.rounded(row)["overall"]
        for percent in (10, 90):
            if row["task"] in grid and None not in (row["seen"], row["unseen"]):
                mean = (percent * row["seen"] + (100 - percent) * row["unseen"]) / 100
                line[f"{short(row['task'])}, {percent} %"] = f"{mean:.1f}"
    return [*lines.values()]


def texts(rows):
    """Rows with what a table prints."""
    return [{short(column): cell for column, cell in benchmark.rounded(row).items()} for row in rows]


def short(column):
    """A task's name without its data set and its number of seen classes; any other column's as a table has it."""
    return re.sub(r"^\w+ (.* to .*), \d+ seen\b", r"\1", column).replace("_", " ")


def printed_tables(text):
    """(title, text, columns, methods) of every table of methods, and of what a run prints. The title is a line in bold
    above it; without one it is "over tasks"."""
    for match in re.finditer(r"(?:\*\*([^\n]+?)\*?\*\*\n\n)?((?:^\|[^\n]*\|\n)+)", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in match[2].splitlines()]
        if header[0] in ("method", "model"):
            yield match[1] or "over tasks", match[2], header, [row[0] for row in rows]


def expected(tables, title, columns, methods):
    """The table of these columns and methods as the runs give it, or None where they have not all of them."""
    if columns[0] == "model":
        return tables.get("first")
    reference = next((name[3:].replace(" ", "_") for name in columns if name.startswith("vs ")), REFERENCES[0])
    own = [row for row in tables.get((title, reference), ()) if row["method"] in methods]
    if len(own) < len(methods) or not all(name in row for row in own for name in columns):
        return None
    return table([{name: row[name] for name in columns} for row in own]) + "\n"


def prose(text):
    """The lines outside of tables and code in the parts about tables, with their numbers."""
    part, code = "", False
    for number, line in enumerate(text.splitlines(), 1):
        code ^= line.startswith("```")
        part = line if line.startswith("#") and not code else part
        if part in PARTS and not code and not line.startswith("|"):
            yield number, line


def compare_page(page, tables, figures, write):
    """Texts for what differs on a page; with write, its tables are put right first. Prints what was not compared."""
    path, differ = ROOT / page, []
    text = path.read_text("utf-8")
    for title, printed, columns, methods in list(printed_tables(text)):
        want = expected(tables, title, columns, methods)
        if want is None:
            print(f"{page}: not compared: {title}: {', '.join(columns[1:3])}, ...")
        elif want != printed and write:
            text = text.replace(printed, want)
        elif want != printed:
            pairs = zip(printed.splitlines(), want.splitlines(), strict=True)
            differ += [f"{page}: {old}\n    the runs: {new}" for old, new in pairs if old != new]
    if write:
        write_text(path, text)
    for number, line in prose(text):
        wrong = [match[0] for match in FIGURE.finditer(line) if match[0] not in figures]
        differ += [f"{page}:{number}: {figure} is in no table of the runs" for figure in wrong]
    return differ


def compare_headers(tables):
    """Texts for the results in the headers of scripts that the runs do not give."""
    rows = tables.get(("digits mnist to optdigits, 5 seen", REFERENCES[0]), ())
    results, differ = {row["method"]: (row["overall"], row["unseen"].partition(" ")[0]) for row in rows}, []
    for path in sorted((ROOT / "methods").glob("*.py")):
        said = re.search(r"# overall (\S+ ± \S+), unseen (\S+) on mnist to optdigits", path.read_text("utf-8"))
        if path.stem in results and (not said or said.groups() != results[path.stem]):
            differ.append(f"methods/{path.name}: {said and said[0]}\n    the runs: {results[path.stem]}")
    return differ


if __name__ == "__main__":
    options = tyro.cli(Check, description=__doc__)
    try:
        folders = [benchmark.collect([folder]) for folder in options.runs]
    except InputError as error:
        fail(error)
    grid, *rest = folders
    tables, all_tasks = measure(grid), dict(grid)
    for folder, tasks in zip(options.runs[1:], rest, strict=True):
        shared = any(task in grid for task in tasks)
        tasks = {task: all_tasks.get(task, {}) | methods for task, methods in tasks.items()}
        tables = measure(tasks, f", {folder.name}" if shared else "") | tables
        all_tasks |= tasks
    tables["overall", REFERENCES[0]] = overall(all_tasks, grid)
    figures = {cell.lstrip("+") for rows in tables.values() for row in rows for cell in row.values()}
    figures |= {figure.partition(" ± ")[0] for figure in figures}
    if (options.runs[0] / FIRST).exists():
        tables["first"] = result_table(read_run(options.runs[0] / FIRST)) + "\n"
    whole, path = table(benchmark.rows_of(grid, REFERENCES[0]), "csv") + "\n", ROOT / "results" / "table.csv"
    if options.write:
        write_text(path, whole)
    differ = [] if path.read_text("utf-8") == whole else ["results/table.csv: other figures"]
    for page in PAGES:
        differ += compare_page(page, tables, figures, options.write)
    differ += compare_headers(tables)
    print(*differ, f"{len(differ)} differences", sep="\n")
    raise SystemExit(bool(differ))
