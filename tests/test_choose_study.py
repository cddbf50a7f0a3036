"""results/choose_study.py: what a ranking by pseudo splits is worth, on runs whose accuracies are known."""

import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_benchmark import fake_run
from test_choose import TASK, cells_of

from results import choose_study

TRUE = {"a": (60, 80, 70), "b": (70, 76, 75), "c": (50, 70, 60), "d": (40, 60, 65)}
PSEUDO = {"a": (64, 80, 60), "b": (60, 70, 66), "c": (50, 76, 50), "d": (40, 60, 55)}
UPSIDE_DOWN = {"a": (41, 41, 41), "b": (42, 42, 42), "c": (43, 43, 43), "d": (44, 44, 44)}
FIRST = "digits mnist to optdigits, 2 seen"


def write_task(folder, source, pseudo):
    """Whole runs of three splits with the accuracies TRUE, and two pseudo splits, 2 below and 2 above `pseudo`."""
    task = {**TASK, "source": source}
    for method, column in TRUE.items():
        for split_seed, overall in enumerate(column):
            fake_run(folder / source, method, split_seed, overall, **task)
            for number, step in enumerate((-2, 2)):
                own = pseudo[method][split_seed] + step
                fake_run(folder / source, method, split_seed, own, pseudo=number, **task)


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """results/choose_study.py as a program, in this process; its exit code, what it printed, and its errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "results" / "choose_study.py"), str(tmp_path), *words])
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_rank_correlation_by_hand():
    def correlation(pseudo, true):
        return choose_study.spearman({k: figures for k, figures in enumerate(zip(pseudo, true, strict=True))})

    assert correlation([64, 60, 50, 40], [60, 70, 50, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(np.sqrt(3) / 2)  # ranks 1.5, 1.5, 3
    assert correlation([1, 1, 1], [1, 2, 3]) == 0 and correlation([1], [1]) == 0


def test_the_study_by_hand(tmp_path, study):
    write_task(tmp_path, "mnist", PSEUDO)
    fake_run(tmp_path / "mnist", "without pseudo splits", 0, 99, **TASK)
    code, printed, errors = study("--always", "a")
    assert code == 0, errors
    lines = printed.splitlines()
    titles = [line for line in lines if line.startswith("**")]
    # correlations 0.8, 0.8 and 1; t(0.975, 2) = 4.302653
    assert titles == [
        "**The ranking does not beat always taking a:** its regret is 3.33 points against 5.00.",
        "**over all, 3 splits: Spearman 0.87 ± 0.29**",
        f"**{FIRST}, 3 splits: Spearman 0.87 ± 0.29**",
        "**each split**",
    ]
    over_all = lines.index(titles[1])
    assert [cells_of(line) for line in (lines[over_all + 2], *lines[over_all + 4 : over_all + 9])] == [
        ["taken", "overall", "regret", "vs a", "best, %"],
        ["always b", "73.7 ± 8.0", "1.3 ± 5.7", "+3.7 ± 17.6", "66.7"],
        ["the first of the ranking", "71.7 ± 25.9", "3.3 ± 14.3", "+1.7 ± 7.2", "66.7"],
        ["always a", "70.0 ± 24.8", "5.0 ± 12.4", "+0.0 ± 0.0", "33.3"],
        ["always c", "60.0 ± 24.8", "15.0 ± 12.4", "-10.0 ± 0.0", "0.0"],
        ["always d", "55.0 ± 32.9", "20.0 ± 24.8", "-15.0 ± 21.5", "0.0"],
    ]
    assert [cells_of(line) for line in lines[-3:]] == [
        [f"{FIRST}, 0", "0.80", "a", "b", "10.0", "10.0"],
        [f"{FIRST}, 1", "0.80", "a", "a", "0.0", "0.0"],
        [f"{FIRST}, 2", "1.00", "b", "b", "0.0", "5.0"],
    ]
    better = "**The ranking beats always taking c:** its regret is 3.33 points against 15.00."
    assert better in study("--always", "c")[1].splitlines()


def test_only_whole_splits_count_and_those_of_one_seed_as_one(tmp_path, study):
    write_task(tmp_path, "mnist", PSEUDO)
    write_task(tmp_path, "usps", UPSIDE_DOWN)
    (tmp_path / "usps" / "d" / "split2-seed0-pseudo1" / "done.json").unlink()
    code, printed, errors = study("--always", "a")
    assert code == 0, errors
    lines = printed.splitlines()
    # by seed: regrets 10 and 30, 0 and 20, 0; correlations 0.8 and -0.8, 0.8 and -1, 1
    over_all = next(k for k, line in enumerate(lines) if line.startswith("**over all"))
    assert lines[over_all].startswith("**over all, 5 splits: Spearman 0.30 ± ")
    row = next(line for line in lines[over_all:] if line.startswith(f"| {choose_study.RANKING}"))
    assert cells_of(row)[2] == "10.0 ± 24.8"
    assert "**digits usps to optdigits, 2 seen, 2 splits: Spearman -0.90 ± 1.27**" in lines
    assert len([line for line in lines if line.startswith("| digits ")]) == 5


def test_what_the_study_cannot_say_is_one_line(tmp_path, study):
    fake_run(tmp_path / "mnist", "a", 0, 60, **TASK)
    code, printed, errors = study("--always", "a")
    assert (code, printed) == (2, "") and errors.startswith("error: no split has pseudo splits of every method")
    fake_run(tmp_path / "mnist", "a", 0, 60, pseudo=0, **TASK)
    code, printed, errors = study("--always", "b")
    assert (code, printed) == (2, "") and errors.startswith("error: --always b: not every task has pseudo splits of it")
    assert study("--always", "a")[0] == 0
