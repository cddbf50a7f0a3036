"""benchmark.py choose: a ranking of methods by pseudo splits."""

import json
import shlex

import numpy as np
import pytest
from conftest import load_task
from test_benchmark import fake_run

import benchmark
from eval import read_run

TASK = {"dataset": "digits", "source": "mnist", "target": "optdigits"}
PAIR = ("--pair", "digits:mnist:optdigits")


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_choose_as_a_user_starts_it(tmp_path, runs_dir, run_method, run_benchmark):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    words = ["choose", *PAIR, "--methods", "naive_ft", "masked_ft --lr 0.01 --name fast", "--pseudo-splits", 2]
    words += ["--runs-dir", tmp_path, "--split-seed", 1, "--jobs", 2]
    words += [f"--flags=--epochs 1 --steps-per-epoch 2 --device cpu --source-checkpoint {source}"]
    code, printed, errors = run_benchmark(*words)
    assert code == 0, errors
    folder = tmp_path / "digits" / "mnist-optdigits"
    runs = {name: [folder / name / f"split1-seed0-pseudo{k}" for k in (0, 1)] for name in ("naive_ft", "fast")}
    folders = [*runs["fast"], *runs["naive_ft"]]
    assert sorted(path.parent for path in tmp_path.rglob("done.json")) == folders
    table = {cells[0]: cells for cells in map(cells_of, printed.splitlines()[5:8])}
    for name, paths in runs.items():
        figures = [read_run(path)["final"] for path in paths]
        for cell, kind in zip(table[name][1:4], ("overall", "seen", "unseen"), strict=True):
            assert cell.startswith(f"{np.mean([final[kind] for final in figures]):.1f} ± ")
    seen = np.flatnonzero(load_task("digits", split_seed=1).seen)
    for path in folders:
        with np.load(path / "logits.npz") as arrays:
            assert set(arrays["test_labels"]) == set(seen), "images of truly unseen classes have no part in it"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    code, again, errors = run_benchmark(*words)
    assert (code, again) == (0, printed) and "4/4" in errors
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, "what is finished is not run again"


def finished_run(runs_dir, method, number, overall, split_seed=0):
    """A fake run that choose takes for one of its own."""
    folder = runs_dir / "digits" / "mnist-optdigits"
    path = fake_run(folder, method, split_seed, overall, pseudo=number, **TASK)
    options = benchmark.Choose("digits:mnist:optdigits", runs_dir=str(runs_dir))
    command = benchmark.cell_command(method, options.pair, split_seed, 0, 0, options)
    done = json.loads((path / "done.json").read_text())
    done["command"] = shlex.join([*command, "--pseudo-split", str(number)])
    (path / "done.json").write_text(json.dumps(done))


def test_the_ranking_by_hand(tmp_path, run_benchmark):
    for method, column in {"bn_adapt": (50, 64, 66), "lolsgd": (60, 70, 80), "l2_sp": (40, 44, 48)}.items():
        for number, overall in enumerate(column):
            finished_run(tmp_path, method, number, overall)
    words = ("choose", *PAIR, "--methods", "bn_adapt", "lolsgd", "l2_sp", "--runs-dir", tmp_path)
    code, printed, errors = run_benchmark(*words)
    assert code == 0, errors
    lines = printed.splitlines()
    assert lines[1] == "**digits:mnist:optdigits, split seed 0, mean over 3 pseudo splits**"
    # t(0.975, 2) = 4.302653. overall: s = 10, 8.717798, 4; differences -10, -6, -14 (s = 4) and -20, -26, -32 (s = 6)
    # of seen classes 60, 72, 80 are right and 52, 64, 68; of unseen ones 60, 68, 80 and 48, 64, 64
    assert [cells_of(line) for line in (lines[3], *lines[5:9])] == [
        ["method", "overall", "pseudo seen", "pseudo unseen", "vs lolsgd"],
        ["lolsgd", "70.0 ± 24.8", "70.7 ± 25.0", "69.3 ± 25.0", "-"],
        ["bn_adapt", "60.0 ± 21.7", "61.3 ± 20.7", "58.7 ± 22.9", "-10.0 ± 9.9"],
        ["source model", "50.0 ± 0.0", "52.0 ± 0.0", "48.0 ± 0.0", "-20.0 ± 24.8"],
        ["l2_sp", "44.0 ± 9.9", "44.0 ± 9.9", "44.0 ± 9.9", "-26.0 ± 14.9"],
    ]
    verdict = lines[-1]
    assert verdict.startswith("No recommendation: ") and verdict.endswith(" see results/choose.md.")
    assert "methods/" not in printed, "no method's command is offered"


def test_of_one_pseudo_split_there_is_no_interval(tmp_path, run_benchmark):
    for method in ("lolsgd", "l2_sp"):
        finished_run(tmp_path, method, 0, 60)
    words = ("choose", *PAIR, "--methods", "lolsgd", "l2_sp", "--pseudo-splits", 1, "--runs-dir", tmp_path)
    rows = [cells_of(line) for line in run_benchmark(*words)[1].splitlines()[5:8]]
    assert [row[0] for row in rows] == ["l2_sp", "lolsgd", "source model"]
    assert rows[1] == ["lolsgd", "60.0", "60.0", "60.0", "+0.0"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--pair", "digits"), "--pair digits: write dataset:source:target"),
        (("--pair", "digits:mnist:usps"), "--pair digits:mnist:usps: --target usps: digits has no such domain"),
        (("--pair", "digits:mnist:all"), "--pair digits:mnist:all: must name a single target"),
        ((*PAIR, "--methods", "nave_ft"), "--methods nave_ft: no such script"),
        ((*PAIR, "--methods", "naive_ft --oracle"), "--methods naive_ft --oracle: an oracle learns from labels of"),
        ((*PAIR, "--methods", "naive_ft", "naive_ft --lr 1"), "--methods naive_ft --lr 1: naive_ft is there already"),
        ((*PAIR, "--pseudo-splits", "0"), "--pseudo-splits 0: must be 1 or more"),
        ((*PAIR, "--jobs", "0"), "--jobs 0: must be 1 or more"),
    ],
)
def test_wrong_input_is_one_line(words, message, tmp_path, run_benchmark):
    code, printed, errors = run_benchmark("choose", *words, "--runs-dir", tmp_path / "runs")
    assert code == 2 and not printed and not (tmp_path / "runs").exists()
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors


def test_a_damaged_pseudo_split_is_one_line(tmp_path, run_benchmark):
    finished_run(tmp_path, "lolsgd", 0, 60)
    damaged = next(tmp_path.rglob("logits.npz"))
    damaged.write_bytes(b"no npz")
    words = ("choose", *PAIR, "--methods", "lolsgd", "--pseudo-splits", 1, "--runs-dir", tmp_path)
    code, printed, errors = run_benchmark(*words)
    assert code == 2 and not printed and errors.splitlines()[-1].startswith(f"error: {damaged}: not the complete")


def test_a_pseudo_split_is_found_by_all_its_seeds(tmp_path):
    folder = tmp_path / "digits" / "mnist-optdigits"
    fake_run(folder, "l2_sp", 2, 60, seed=3, source_seed=4, pseudo=1, **TASK)
    seeds = {"split_seed": 2, "seed": 3, "source_seed": 4, "runs_dir": str(tmp_path)}
    run = benchmark.pseudo_run("l2_sp", 1, benchmark.Choose("digits:mnist:optdigits", **seeds))
    assert run["final"]["overall"] == pytest.approx(60)
