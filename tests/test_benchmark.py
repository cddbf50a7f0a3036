import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import benchmark
from eval import InputError


def test_interval_against_the_textbook():
    # mean 5, s = 2, n = 4: t(0.975, 3) = 3.182446, half width 3.182446 * 2 / 2
    values = 5 + 2 * np.array([-1, 1, -1, 1]) * np.sqrt(3) / 2
    assert benchmark.interval(values) == (pytest.approx(5), pytest.approx(3.182446, abs=1e-5))
    assert benchmark.interval([7.0]) == (7.0, None)


def test_seeds():
    assert benchmark.seeds("0-3,7") == [0, 1, 2, 3, 7] and benchmark.seeds("5") == [5]
    with pytest.raises(InputError, match="'a-b' is not a list of seeds"):
        benchmark.seeds("a-b")


def fake_run(folder, method, split_seed, overall, seed=0, **args):
    args = {"dataset": "d", "source": "a", "target": "b", "seen_classes": "5", "method": method, "lr": 0.1, **args}
    figures = dict.fromkeys(("overall", "seen", "unseen", "harmonic_mean"), overall)
    args |= {"split_seed": split_seed, "seed": seed}
    path = folder / method / f"split{split_seed}-seed{seed}"
    path.mkdir(parents=True)
    source = dict.fromkeys(figures, 50.0)
    (path / "done.json").write_text(json.dumps({"source": source, "final": figures, "args": args}))


def test_report_pairs_by_split(tmp_path, capsys):
    for k, (naive, other) in enumerate([(40, 41), (60, 62), (80, 83)]):
        fake_run(tmp_path, "naive_ft", k, naive)
        fake_run(tmp_path, "other", k, other)
    fake_run(tmp_path, "other", 9, 10)  # without a partner: in the mean, not in the difference
    benchmark.report(benchmark.Report((tmp_path,), format="json"))
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["naive_ft"]["overall"] == pytest.approx(60) and rows["naive_ft"]["vs_naive_ft"] is None
    assert rows["other"]["overall"] == pytest.approx(49) and rows["other"]["runs"] == 4
    assert rows["other"]["vs_naive_ft"] == pytest.approx(2)
    assert rows["other"]["vs_naive_ft_pm"] == pytest.approx(4.302653 * 1 / np.sqrt(3), abs=1e-5)
    assert rows["source model"]["overall"] == 50
    benchmark.report(benchmark.Report((tmp_path,)))
    assert "+2.0 ± 2.5 |" in capsys.readouterr().out


def test_report_does_not_mix_runs(tmp_path):
    fake_run(tmp_path, "naive_ft", 0, 40)
    fake_run(tmp_path, "naive_ft", 1, 40, lr=0.2)
    with pytest.raises(InputError, match="other lr than naive_ft's other runs"):
        benchmark.report(benchmark.Report((tmp_path,)))
    with pytest.raises(InputError, match="no finished run below"):
        benchmark.report(benchmark.Report((tmp_path / "nowhere",)))


def grid(*words):
    command = [sys.executable, str(ROOT / "benchmark.py"), "run", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_print_commands():
    printed = grid("--print-commands", "--methods", "naive_ft", "wise_ft --a 0.3 --name w", "--split-seeds", "2-3")
    lines = printed.stdout.splitlines()
    assert len(lines) == 3 * 2 * 2
    assert "methods/wise_ft.py --dataset glyphs --source sans --target serif" in lines[-1]
    assert lines[-1].endswith("--split-seed 3 --seed 0 --a 0.3 --name w")
    assert grid("--methods", "nave_ft").returncode == 2 and grid("--pairs", "digits").returncode == 2


def test_a_grid_skips_what_is_done_and_names_what_fails(tmp_path, runs_dir, run_method):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    flags = f"--flags=--epochs 1 --steps-per-epoch 2 --device cpu --source-checkpoint {source}"
    words = ("--pairs", "digits:mnist:optdigits", "--split-seeds", "0", "--runs-dir", tmp_path, "--jobs", 2, flags)
    failed = grid("--methods", "naive_ft", "lp_ft --batch-size 5000", *words)
    assert failed.returncode == 2 and "1 of 2 runs failed" in failed.stderr
    assert "methods/lp_ft.py" in failed.stderr and "--batch-size 5000: the training set has" in failed.stderr
    done = tmp_path / "digits" / "mnist-optdigits" / "naive_ft" / "split0-seed0" / "done.json"
    before = done.stat().st_mtime_ns
    again = grid("--methods", "naive_ft", *words)
    assert again.returncode == 0, again.stderr
    assert done.stat().st_mtime_ns == before
