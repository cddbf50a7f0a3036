import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import replicas
from conftest import ROOT
from tqdm import tqdm

import benchmark
from eval import UNKNOWN, read_run
from files import InputError, take_lock

pytestmark = pytest.mark.usefixtures("quick_start")


def test_interval_against_the_textbook():
    # mean 5, s = 2, n = 4: t(0.975, 3) = 3.182446, half width 3.182446 * 2 / 2
    values = 5 + 2 * np.array([-1, 1, -1, 1]) * np.sqrt(3) / 2
    assert benchmark.interval(values) == (pytest.approx(5), pytest.approx(3.182446, abs=1e-5))
    assert benchmark.interval([7.0]) == (7.0, None) and benchmark.interval([]) == (None, None)


def bare_run(overall, source=50.0):
    """What eval.read_run returns of a run, as far as a report reads it."""
    names = ("seen", "unseen", "unseen_among_unseen", "harmonic_mean", "ausuc")
    final = {**dict.fromkeys(names), "overall": overall}
    return {"final": final, "source": {**final, "overall": source}, **dict.fromkeys(benchmark.CALIBRATED)}


@pytest.mark.parametrize("seed_count", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_count):
    """Splits differ by 3 points and seeds by 1: of intervals over 10 splits 95 % hold the means that made the runs."""
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        methods = {"naive_ft": {}, "other": {}}
        for split in range(10):
            naive, gain = 70 + rng.normal(0, 3), 2 + rng.normal(0, 3)
            for seed in range(seed_count):
                noise = rng.normal(0, 1, 2)
                key = (split, "b", split, 0, seed)
                methods["naive_ft"][key] = bare_run(naive + noise[0])
                methods["other"][key] = bare_run(naive + gain + noise[1])
        row = {row["method"]: row for row in benchmark.rows_of({"t": methods}, "naive_ft")}
        overall, difference = row["naive_ft"], row["other"]
        held.append(
            [
                abs(overall["overall"] - 70) < overall["overall_pm"],
                abs(difference["vs_naive_ft"] - 2) < difference["vs_naive_ft_pm"],
            ]
        )
    coverage = np.mean(held, 0)
    assert (coverage > 0.92).all() and (coverage < 0.98).all(), coverage


def fake_task(**overall):
    """{method: runs} of methods with these overall accuracies on splits 0, 1, ...; the source model's are first."""
    sources = overall.pop("source")
    methods = {}
    for method, column in overall.items():
        pairs = zip(column, sources, strict=False)
        runs = {(k, "b", k, 0, 0): bare_run(value, source) for k, (value, source) in enumerate(pairs)}
        methods[method.replace("_oracle", "-oracle")] = runs
    return methods


def test_closed_by_hand():
    task = fake_task(source=[50, 60, 40], naive_ft=[60, 55, 50], other=[70, 90], naive_ft_oracle=[90, 90, 100])
    task["z-oracle"] = {key: bare_run(100.0) for key in task["naive_ft"]}  # not the first by name
    rows = {row["method"]: row for row in benchmark.rows_of({"t": task}, "naive_ft")}
    assert rows["other"]["closed"] == pytest.approx(100 * (20 + 30) / (40 + 30))
    assert rows["naive_ft"]["closed"] == pytest.approx(100 * (10 - 5 + 10) / (40 + 30 + 60))
    # the jackknife: the share without each split, and the t interval from their spread
    without = np.array([100 * 5 / 90, 100 * 20 / 100, 100 * 5 / 70])
    error = np.sqrt(2 / 3 * np.sum((without - without.mean()) ** 2))
    assert rows["naive_ft"]["closed_pm"] == pytest.approx(4.302653 * error, rel=1e-5)
    assert (rows["source model"]["closed"], rows["naive_ft-oracle"]["closed"]) == (0, pytest.approx(100))
    shown = benchmark.rounded(rows["naive_ft"])
    assert shown["closed"].startswith("11.5 ± ") and shown["U/U"] == "-"
    for nothing in (fake_task(source=[50], naive_ft=[60]), fake_task(source=[50], naive_ft=[60], a_oracle=[50])):
        assert {row["closed"] for row in benchmark.rows_of({"t": nothing}, "naive_ft")} == {None}
    seeds = {key: bare_run(overall, 50) for key, overall in {(0, "b", 0, 0, 1): 80, (0, "b", 0, 0, 2): 60}.items()}
    several = {"naive_ft": seeds, "a-oracle": {(0, "b", 0, 0, 0): bare_run(90, 50)}}  # of an oracle one run is enough
    assert benchmark.rows_of({"t": several}, "naive_ft")[1]["closed"] == pytest.approx(100 * 20 / 40)
    single = benchmark.rows_of({"t": fake_task(source=[50], naive_ft=[60], a_oracle=[90])}, "naive_ft")
    assert [(row["closed"], row["closed_pm"]) for row in single] == [(0, None), (25, None), (100, None)]


def test_the_report_has_what_no_bias_can_change(tmp_path, capsys):
    folders = [fake_run(tmp_path, "naive_ft", k, 40 + 20 * k) for k in (0, 1)]
    benchmark.report(benchmark.Report((tmp_path,), format="json"))
    row = json.loads(capsys.readouterr().out)[-1]
    figures = [read_run(folder)["final"]["unseen_among_unseen"] for folder in folders]
    assert row["method"] == "naive_ft" and row["unseen_among_unseen"] == pytest.approx(np.mean(figures))
    benchmark.report(benchmark.Report((tmp_path,)))
    header = [cell.strip() for cell in capsys.readouterr().out.splitlines()[3].split("|")]
    assert header[3:8] == ["overall", "seen", "unseen", "U/U", "harmonic mean"] and header[-2] == "closed"


@pytest.fixture
def three_tasks(tmp_path):
    """Runs whose source model has 50 and whose oracle 90 or 100, on three tasks, one of them without my_way."""
    tasks = {
        ("digits", "mnist"): {"naive_ft": (60, 70), "my_way": (80, 80), "naive_ft-oracle": (90, 90)},
        ("digits", "usps"): {"naive_ft": (40, 40), "my_way": (75, 75), "half": (75, 75), "naive_ft-oracle": (100, 100)},
        ("d", "a"): {"naive_ft": (70, 70), "my_way": (60, 60), "naive_ft-oracle": (90, 90)},
    }
    for (dataset, source), methods in tasks.items():
        for method, column in methods.items():
            for k, overall in enumerate(column):
                own = {"dataset": dataset, "source": source, "target": "optdigits"}
                fake_run(tmp_path / dataset / source, method, k, overall, **own)
    return tmp_path


def test_over_tasks_by_hand(three_tasks, capsys):
    names = ["d a to optdigits, 2 seen", "digits mnist to optdigits, 2 seen*", "digits usps to optdigits, 2 seen"]

    def shown(style, **options):
        benchmark.report(benchmark.Report((three_tasks,), over_tasks=True, format=style, **options))
        return capsys.readouterr().out

    naive, mine, half = json.loads(shown("json"))
    assert [row["method"] for row in (naive, mine, half)] == ["naive_ft", "my_way", "half"]
    assert [naive[name] for name in names] == pytest.approx([50, 100 * 15 / 40, -20])
    assert [mine[name] for name in names] == pytest.approx([25, 75, 50])
    assert (naive["mean"], naive["worst"]) == (pytest.approx(67.5 / 3), pytest.approx(-20))
    assert (mine["mean"], mine["worst"]) == (pytest.approx(50), pytest.approx(25))
    # jackknife: without either split the share is 25 or 50
    assert naive[f"{names[1]}_pm"] == pytest.approx(12.7062 * np.sqrt(1 / 2 * 2 * 12.5**2), rel=1e-4)
    assert [half[name] for name in (*names, "mean", "worst")] == [None, None, pytest.approx(50), None, None]
    csv = shown("csv").splitlines()
    assert csv[0].startswith('method,pool,"d a to optdigits, 2 seen","d a to optdigits, 2 seen_pm",') and len(csv) == 4
    lines = shown("md").splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["method", *names, "mean", "worst"]
    assert [cell.strip() for cell in lines[6].split("|")[1:-1]] == [
        "my_way", "25.0 ± 0.0", "75.0 ± 0.0", "50.0 ± 0.0", "50.0", "25.0"
    ]  # fmt: skip
    assert lines[-1] == benchmark.MARKS


def test_methods_with_unlabelled_images_stand_apart(three_tasks, capsys):
    """Below the others, whatever they reach, with a column that says so; without such a method there is no column."""

    def cells(**options):
        benchmark.report(benchmark.Report((three_tasks,), **options))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]

    assert cells()[0] == ["method", "runs"]
    for path in three_tasks.rglob("my_way/*/done.json"):
        done = json.loads(path.read_text())
        path.write_text(json.dumps(done | {"unlabelled_images": 9}))
    shown = cells(over_tasks=True)
    assert [shown[0], *shown[2:]] == [["method", "pool"], ["naive_ft", "-"], ["half", "-"], ["my_way", "unlabelled"]]
    assert {tuple(row) for row in cells() if row[0] in ("my_way", "naive_ft", "source model")} == {
        ("my_way", "unlabelled"),
        ("naive_ft", "-"),
        ("source model", "-"),
    }


def test_a_figure_of_all_tasks(three_tasks, tmp_path, capsys):
    benchmark.report(benchmark.Report((three_tasks,), over_tasks=True, figures=tmp_path / "figures"))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"over-tasks.png", "over-tasks.pdf"}
    fake_run(tmp_path / "alone", "naive_ft", 0, 70.0)
    with pytest.raises(InputError, match="no method was run on every task"):
        benchmark.report(benchmark.Report((tmp_path / "alone",), over_tasks=True, figures=tmp_path / "figures"))


def test_latex(three_tasks, capsys):
    benchmark.report(benchmark.Report((three_tasks / "d",), format="latex"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "% d a to optdigits, 2 seen"
    assert lines[2] == r"\begin{tabular}{l" + "r" * 13 + "}" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [line.removesuffix(r" \\").split(" & ") for line in lines[6:-2]]
    assert [row[0] for row in rows] == ["source model", r"my\_way", r"naive\_ft", r"naive\_ft-oracle"]
    assert rows[1][1:3] == ["$2$", r"$60.0 \pm 0.0$"] and rows[2][-2:] == ["--", r"$50.0 \pm 0.0$"]
    assert "_" not in "".join(lines).replace(r"\_", "") and {len(row) for row in rows} == {14}
    benchmark.report(benchmark.Report((three_tasks,), format="latex", over_tasks=True))
    shown = capsys.readouterr().out.splitlines()
    assert shown[5].endswith(r"2 seen & mean & worst \\") and shown[2] == f"% {benchmark.MARKS}"


def test_pcv_is_a_mean_over_all_runs_or_none():
    runs = {(k, "b", k, 0, 0): bare_run(overall) | {"pcv": {"overall": overall}} for k, overall in enumerate([60, 70])}
    runs[2, "b", 2, 0, 0] = bare_run(None) | {"pcv": {"overall": None}}  # without test images of unseen classes
    assert list(benchmark.values(runs, "pcv").values()) == [60, 70]
    runs[3, "b", 3, 0, 0] = bare_run(80)
    assert benchmark.values(runs, "pcv") == {} and list(benchmark.values(runs, "overall").values()) == [60, 70, 80]


def test_runs_of_one_unit_are_averaged_first(tmp_path, capsys):
    for target, split, overall in (("w1", 0, 40), ("w1", 1, 44), ("w2", 0, 60), ("w2", 1, 64), ("w2", 2, 68)):
        fake_run(tmp_path / target, "naive_ft", split, overall, target=target)
    tasks = benchmark.collect([tmp_path], over_targets=True)
    row = benchmark.rows_of(tasks, "naive_ft")[-1]
    assert row["method"] == "naive_ft" and row["runs"] == 5
    assert row["overall"] == pytest.approx(53)  # of 42 and 64
    assert row["overall_pm"] == pytest.approx(12.7062 * 11, rel=1e-4)  # t(0.975, 1) * 22 / sqrt(2) / sqrt(2)
    for seed, overall in enumerate((10, 20, 60)):
        fake_run(tmp_path / "seeds", "naive_ft", 0, overall, seed=seed)
    fake_run(tmp_path / "seeds", "naive_ft", 1, 50, seed=0)
    row = benchmark.rows_of(benchmark.collect([tmp_path / "seeds"]), "naive_ft")[0]
    assert (row["method"], row["runs"], row["overall"]) == ("naive_ft", 4, pytest.approx(40))


def test_seeds():
    assert benchmark.seeds("0-3,7") == [0, 1, 2, 3, 7] and benchmark.seeds("5") == [5]
    for wrong in ("a-b", "5-3", "0-2-4", ""):
        with pytest.raises(InputError, match=f"'{wrong}' is not a list of seeds"):
            benchmark.seeds(wrong)


def test_flags_may_have_equals_signs_and_values_too():
    words = ["--data_root=x=y", "--lr", "0.1", "--no-flip", "--arch", "resnet18"]
    values = benchmark.flag_values(words)
    assert values["--data-root"] == "x=y" and values["--lr"] == "0.1" and values["--arch"] == "resnet18"


def test_a_command_is_run_again_where_a_file_that_it_names_has_changed(tmp_path):
    names, done = tmp_path / "names.txt", tmp_path / "runs" / "a" / "done.json"
    names.write_text("ant")
    done.parent.mkdir(parents=True)
    command = ["python", "methods/x.py", "--seen-classes", str(names)]
    assert benchmark.unfinished([command], tmp_path) == [command]
    done.write_text(json.dumps({"command": shlex.join(command)}))
    os.utime(names, (1, 1))
    assert benchmark.unfinished([command], tmp_path) == []
    os.utime(names, (2e9, 2e9))
    assert benchmark.unfinished([command], tmp_path) == [command]


def test_a_reference_that_was_not_run_is_named(tmp_path):
    fake_run(tmp_path, "masked_ft", 0, 60)
    benchmark.report(benchmark.Report((tmp_path,)))  # the default need not be there
    with pytest.raises(InputError, match="--reference nave_ft: no such method was run"):
        benchmark.report(benchmark.Report((tmp_path,), reference="nave_ft"))


def test_two_folders_of_images_are_not_one_data_set(tmp_path):
    for k, root in enumerate(("photos", "others")):
        fake_run(tmp_path, "naive_ft", k, 60, dataset="folder", data_root=root)
    with pytest.raises(InputError, match="other data_root"):
        benchmark.collect([tmp_path])


def fake_run(folder, method, split_seed, overall, seed=0, pseudo=None, classes="abcd", kinds=4, source_seed=0, **args):
    """A finished run with real files: 100 images of the first `kinds` of four classes, of which two are seen, `overall`
    % right."""
    args = {"dataset": "d", "source": "a", "target": "b", "seen_classes": "2", "method": method, "lr": 0.1, **args}
    args |= {"split_seed": split_seed, "seed": seed, "source_seed": source_seed, "pseudo_split": pseudo}
    path = f"split{split_seed}-seed{seed}" + (f"-source{source_seed}" if source_seed else "")
    path = folder / method / (path + ("" if pseudo is None else f"-pseudo{pseudo}"))
    path.mkdir(parents=True)
    labels = np.arange(100) % kinds
    right, half = np.arange(100) < overall, np.arange(100) < 50
    logits = [np.eye(4, dtype=np.float32)[np.where(hit, labels, (labels + 1) % 4)] for hit in (right, half)]
    logits[0] += np.random.default_rng(split_seed).random((100, 4), np.float32) / 100
    arrays = {"test_logits": logits[0], "source_test_logits": logits[1], "test_labels": labels}
    arrays |= {"train_logits": logits[0][::4], "source_train_logits": logits[1][::4], "train_labels": labels[::4]}
    arrays |= {"classes": np.array(list(classes))}
    np.savez(path / "logits.npz", seen=np.array([True, True, False, False]), **arrays)
    (path / "log.jsonl").write_text(
        "".join(json.dumps({"epoch": e, "overall": 1.0, "unseen": 2.0}) + "\n" for e in (0, 1))
    )
    (path / "done.json").write_text(json.dumps({"args": args}))
    return path


def test_what_a_recipe_made_of_the_number_of_images_is_no_other_setting(tmp_path, capsys):
    """Splits may have 150 and 160 images, and so other steps; a flag that was given must be the same in all runs."""
    for k, steps in enumerate((18, 20)):
        path = fake_run(tmp_path, "naive_ft", k, 60, steps_per_epoch=steps) / "done.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"from_recipe": ["steps_per_epoch"]}))
    benchmark.report(benchmark.Report((tmp_path,), format="json"))
    assert json.loads(capsys.readouterr().out)[-1]["runs"] == 2
    fake_run(tmp_path, "naive_ft", 2, 60, steps_per_epoch=30)
    with pytest.raises(InputError, match="other steps_per_epoch"):
        benchmark.report(benchmark.Report((tmp_path,)))


def test_a_list_of_seen_classes_is_told_by_its_number(tmp_path):
    for other in "bc":
        fake_run(tmp_path / other, "naive_ft", 0, 60, seen_classes=json.dumps(["a, the first", other]))
    titles = [*benchmark.collect([tmp_path])]
    assert len(titles) == 2 and all(re.fullmatch(r"d a to b, 2 \([0-9a-f]{4}\) seen", title) for title in titles)


def test_the_oracle_of_closed_is_naive_ft(tmp_path):
    task = fake_task(source=[50], naive_ft=[60], naive_ft_oracle=[90])
    task["a-oracle"] = {(0, "b", 0, 0, 0): bare_run(100, 50)}
    closed = {row["method"]: row["closed"] for row in benchmark.rows_of({"t": task}, "naive_ft")}
    assert closed["naive_ft"] == 25 and closed["a-oracle"] == 125


def test_oracles_alone_are_no_table_over_tasks(tmp_path):
    fake_run(tmp_path, "naive_ft-oracle", 0, 60)
    with pytest.raises(InputError, match="oracles only"):
        benchmark.report(benchmark.Report((tmp_path,), over_tasks=True))


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


def test_report_takes_runs_that_differ_in_their_source_models(tmp_path):
    for source_seed, (naive, other) in enumerate([(40, 43), (60, 61)]):
        fake_run(tmp_path, "naive_ft", 0, naive, source_seed=source_seed)
        fake_run(tmp_path, "other", 0, other, source_seed=source_seed)
    fake_run(tmp_path, "other", 0, 80, source_seed=1, pseudo=0)
    tasks = benchmark.collect([tmp_path])
    rows = {row["method"]: row for row in benchmark.rows_of(tasks, "naive_ft")}
    assert rows["other"]["runs"] == 2 and rows["other"]["overall"] == pytest.approx(52)
    assert rows["other"]["vs_naive_ft"] == pytest.approx(2), "paired by the source model too"
    pcv = [run["pcv"] is not None for run in tasks["d a to b, 2 seen"]["other"].values()]
    assert pcv == [False, True], "a pseudo split belongs to the run with its source model"


def test_report_calibrates_every_run_by_itself(tmp_path, capsys):
    folders = [fake_run(tmp_path, "naive_ft", k, 40 + 20 * k) for k in (0, 1)]
    for k in (0, 1):
        fake_run(tmp_path, "naive_ft", 0, 50, pseudo=k)
    benchmark.report(benchmark.Report((tmp_path,), format="json"))
    row = json.loads(capsys.readouterr().out)[-1]
    runs = [read_run(folder) for folder in folders]
    assert (
        row["method"] == "naive_ft"
        and row["runs"] == 2
        and row["ausuc"] == np.mean([r["final"]["ausuc"] for r in runs])
    )
    for kind in ("alg", "alg_source", "oracle_gamma"):
        assert row[f"{kind}_overall"] == pytest.approx(np.mean([run[kind]["overall"] for run in runs]))
    assert row["pcv_overall"] is None, "one of the two runs has no pseudo split: a mean over the other would mislead"
    for k in (0, 1):
        fake_run(tmp_path, "naive_ft", 1, 50, pseudo=k)
    benchmark.report(benchmark.Report((tmp_path,), format="json"))
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["pcv_overall"] == pytest.approx(np.mean([read_run(folder)["pcv"]["overall"] for folder in folders]))


def test_four_figures_of_any_subset(tmp_path, capsys):
    for method in ("naive_ft", "naive_ft-oracle", "mine"):
        fake_run(tmp_path / "runs", method, 0, 70)
    benchmark.report(benchmark.Report((tmp_path / "runs",), figures=tmp_path / "figures"))
    fake_run(tmp_path / "one", "mine", 0, 70, pseudo=0)
    fake_run(tmp_path / "one", "mine", 0, 60)
    benchmark.report(benchmark.Report((tmp_path / "one",), figures=tmp_path / "more"))
    for folder in ("figures", "more"):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        kinds = ("calibration", "curves", "dilemma", "epochs")
        assert names == [f"d-a-to-b-2-seen-{kind}.{end}" for kind in kinds for end in ("pdf", "png")]
        for name in names:
            content = (tmp_path / folder / name).read_bytes()
            assert content.startswith(b"%PDF" if name.endswith("pdf") else b"\x89PNG") and len(content) > 5000


def test_what_is_not_known_is_not_ranked(tmp_path, capsys):
    fake_run(tmp_path, "naive_ft", 0, 100, kinds=2)
    fake_run(tmp_path, "b", 0, 90, kinds=2)
    fake_run(tmp_path, "a", 0, 95, kinds=2)
    fake_run(tmp_path, "other", 1, 30)
    benchmark.report(benchmark.Report((tmp_path,)))
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in shown.splitlines()[5:-2]]
    assert cells == [["other", "1", "30.0"], ["a", "1", "-"], ["b", "1", "-"], ["naive_ft", "1", "-"],
                     ["source model", "1", "-"]]  # fmt: skip
    assert shown.endswith(f"\n\n{UNKNOWN}\n")
    fake_run(tmp_path / "whole", "naive_ft", 0, 100)
    benchmark.report(benchmark.Report((tmp_path / "whole",)))
    assert UNKNOWN not in capsys.readouterr().out


def test_report_over_targets(tmp_path, capsys):
    for target, value in (("w1", 40), ("w2", 60), ("w3", 80)):  # w1 has no unseen class in its test part
        fake_run(tmp_path / target, "naive_ft", 0, value, kinds=2 if target == "w1" else 4, target=target)
    options = benchmark.Report((tmp_path,), over_targets=True, format="json", figures=tmp_path / "figures")
    benchmark.report(options)
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["naive_ft"]["task"] == "d a to all, 2 seen" and rows["naive_ft"]["runs"] == 3
    assert rows["naive_ft"]["overall"] == pytest.approx(70) and rows["naive_ft"]["unseen"] == pytest.approx(70)
    assert rows["naive_ft"]["seen"] == pytest.approx(60)  # which is known of w1 too
    assert len(list((tmp_path / "figures").iterdir())) == 8
    benchmark.report(benchmark.Report((tmp_path / "w1",), figures=tmp_path / "none"))
    shown = capsys.readouterr()  # - for what there is not
    assert "d a to w1, 2 seen: no figures, since no run has" in shown.err and "|      - |" in shown.out


def test_report_does_not_mix_runs(tmp_path):
    fake_run(tmp_path, "naive_ft", 0, 40)
    fake_run(tmp_path, "naive_ft", 1, 40, lr=0.2)
    with pytest.raises(InputError, match=r"other lr 0.1 \(now 0.2\) than naive_ft's other runs"):
        benchmark.report(benchmark.Report((tmp_path,)))
    fake_run(tmp_path / "x", "mine", 0, 40)
    fake_run(tmp_path / "x", "other", 0, 40, classes="wxyz")
    with pytest.raises(InputError, match="over other classes than the other runs of d a to b, 2 seen"):
        benchmark.report(benchmark.Report((tmp_path / "x",)))
    fake_run(tmp_path / "y", "mine", 0, 40)
    fake_run(tmp_path / "z", "mine", 0, 40)
    with pytest.raises(InputError, match="the same run as"):
        benchmark.report(benchmark.Report((tmp_path / "y", tmp_path / "z")))
    fake_run(tmp_path / "w", "mine", 0, 40, save_model=True)
    fake_run(tmp_path / "w", "mine", 1, 40, save_model=False)  # makes no other figures
    assert len(benchmark.collect([tmp_path / "w"])["d a to b, 2 seen"]["mine"]) == 2
    with pytest.raises(InputError, match="no finished run below"):
        benchmark.report(benchmark.Report((tmp_path / "nowhere",)))


def test_a_damaged_run_is_named_in_one_line(tmp_path):
    folder = fake_run(tmp_path, "naive_ft", 0, 40)
    (folder / "logits.npz").write_bytes(b"no npz")
    with pytest.raises(InputError, match=r"split0-seed0.logits\.npz"):
        benchmark.collect([tmp_path])


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    fake_run(tmp_path, "naive_ft", 0, 40)
    command = [sys.executable, str(ROOT / "benchmark.py"), "report", str(tmp_path)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()  # long before the program prints
    assert program.stderr.read() == "" and program.wait() == 1


@pytest.fixture
def grid(run_benchmark):
    """benchmark.py run ..."""
    return lambda *words: run_benchmark("run", *words)


def test_print_commands(grid):
    lines = grid("--print-commands", "--methods", "naive_ft", "wise_ft --a 0.3 --name w", "--split-seeds", "2-3")[1]
    lines = lines.splitlines()
    assert len(lines) == 3 * 2 * 2
    assert "methods/wise_ft.py --dataset glyphs --source sans --target serif" in lines[-1]
    assert lines[-1].endswith("--split-seed 3 --seed 0 --a 0.3 --name w")
    lines = grid("--print-commands", "--methods", "naive_ft", "naive_ft --oracle", "--split-seeds", "0", "--pcv", "2")[
        1
    ]
    assert [line.partition(" --seed 0")[2] for line in lines.splitlines()] == 3 * [
        "", " --pseudo-split 0", " --pseudo-split 1", " --oracle"
    ]  # fmt: skip
    words = "--print-commands", "--pairs", "digits:mnist:optdigits", "--methods", "naive_ft", "--split-seeds", "0-1"
    for source_seeds, each in (("split", ["", " --source-seed 1"]), ("0,2", ["", " --source-seed 2"] * 2)):
        lines = grid(*words, "--source-seeds", source_seeds)[1].splitlines()
        assert [line.partition(" --seed 0")[2] for line in lines] == each
    for words in (("--jobs", "0"), ("--pcv", "-1"), ("--methods", "nave_ft"), ("--methods", ""), ("--pairs", "digits")):
        code, printed, error = grid(*words)
        assert (
            code == 2 and not printed and error.startswith(f"error: {words[0]} {words[1]}") and error.count("\n") == 1
        )


def test_names_are_checked_before_anything_runs_or_prints(grid, tmp_path):
    words = ("--split-seeds", "0", "--runs-dir", tmp_path / "runs", "--pairs", "digits:mnist:optdigits")
    for pair, message in (
        ("digit:mnist:optdigits", "--dataset digit: unknown; choose from digits, glyphs"),
        ("digits:mnist:usps", "--target usps: digits has no such domain; choose from mnist, optdigits"),
        ("glyphs:helvetica:sans", "--source helvetica: glyphs has no such domain"),
        ("glyphs:helvetica:all", "--source helvetica: glyphs has no such domain"),
        ("glyphs:sans:sans", "--target sans: is the source too"),
    ):
        for how in ((), ("--print-commands",)):
            code, printed, error = grid(*how, *words, pair)
            assert code == 2 and not printed and error.startswith(f"error: --pairs {pair}: {message}"), error
    assert not (tmp_path / "runs").exists()
    replicas.tree(tmp_path / "new", ["x", "z"], 3)
    flags = f"--flags=--data-root {tmp_path} --source-checkpoint=somewhere/hers.pt"
    code, printed, _ = grid("--print-commands", flags, "--methods", "wise_ft", *words, "folder:hers:new")
    assert code == 0 and "--dataset folder --source hers --target new" in printed.splitlines()[1]


def test_a_grid_skips_what_is_done_and_names_what_fails(tmp_path, runs_dir, run_method, grid):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    flags = f"--flags=--epochs 1 --steps-per-epoch 2 --device cpu --source-checkpoint {source}"
    words = ("--pairs", "digits:mnist:optdigits", "--split-seeds", "0", "--runs-dir", tmp_path, "--jobs", 2, flags)
    code, _, error = grid("--methods", "naive_ft", "lp_ft --batch-size 5000", *words)
    assert code == 2 and "1 of 2 runs failed" in error
    assert "methods/lp_ft.py" in error and "--batch-size 5000: the training set has" in error
    done = tmp_path / "digits" / "mnist-optdigits" / "naive_ft" / "split0-seed0" / "done.json"
    before = done.stat().st_mtime_ns
    printed = grid("--print-commands", "--methods", "naive_ft", "lp_ft", *words)[1].splitlines()
    assert len(printed) == 1 and "methods/lp_ft.py" in printed[0]
    assert grid("--print-commands", "--methods", "naive_ft", *words)[:2] == (0, "")
    assert grid("--methods", "naive_ft", *words)[0] == 0
    assert done.stat().st_mtime_ns == before


@pytest.mark.parametrize("exported, threads", [(None, 4), ("3", 3)])
def test_threads_are_a_share_of_the_cores_or_what_the_user_says(exported, threads, tmp_path, monkeypatch):
    (tmp_path / "cell.py").write_text("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr(benchmark, "HERE", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if exported:
        monkeypatch.setenv("OMP_NUM_THREADS", exported)
    failures = benchmark.run_cells([["python", "cell.py"]], 2, tqdm(disable=True))
    assert failures == [f"python cell.py\n    exit code 1: {threads}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_grid_and_its_runs_saved(number, tmp_path, runs_dir, run_method):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    words = ["run", "--methods", "naive_ft", "--pairs", "digits:mnist:optdigits", "--split-seeds", "0-1"]
    words += ["--runs-dir", str(tmp_path)]
    words += [f"--flags=--epochs 1 --steps-per-epoch 1000000 --checkpoint-every 0.0001 --source-checkpoint {source}"]
    command = [sys.executable, str(ROOT / "benchmark.py"), *words]
    before = signal.signal(number, signal.default_int_handler)  # a program inherits what its parent ignores
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(number, before)
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    logs = list(tmp_path.rglob("log.jsonl"))
    os.killpg(program.pid, number)  # to its whole group, as a terminal and timeout do
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 130 and "stopped; the same command goes on where it was" in errors
    assert [log.parent.name for log in logs] == ["split0-seed0"]
    assert (logs[0].parent / "checkpoint.pt").exists(), "the run saved what it had"
    assert take_lock(logs[0].parent / ".lock", owned="*") is not None, "the run has ended"
    assert len(list(tmp_path.rglob("log.jsonl"))) == 1, "the next one has not begun"


def test_a_killed_grid_goes_on_and_two_copies_share_the_work(tmp_path, runs_dir, run_method, grid):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    words = ["run", "--pairs", "digits:mnist:optdigits", "--split-seeds", "0", "--runs-dir", str(tmp_path)]
    words += ["--methods", "naive_ft", "bn_adapt", "masked_ft"]
    words += [f"--flags=--epochs 1 --steps-per-epoch 2 --device cpu --source-checkpoint {source}"]

    def start():
        command = [sys.executable, str(ROOT / "benchmark.py"), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed, deadline = start(), time.monotonic() + 100
    while not (first := list(tmp_path.rglob("done.json"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    before = {path: path.stat().st_mtime_ns for path in first}
    copies = [start(), start()]
    ends = [(copy.communicate()[1], copy.returncode) for copy in copies]
    assert [code for _, code in ends] == [0, 0], ends
    runs = sorted(path.parent for path in tmp_path.rglob("done.json"))
    assert [run.parent.name for run in runs] == ["bn_adapt", "masked_ft", "naive_ft"]
    assert before and before == {path: path.stat().st_mtime_ns for path in before}, "finished runs are not redone"
    for run in runs:
        lines = (run / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1] and read_run(run)["final"]["overall"] > 0
        assert not list(run.glob(".*.tmp")) and not (run / "checkpoint.pt").exists()


def test_a_mean_curve_ends_where_the_runs_do(tmp_path):
    from results import figures

    runs = [read_run(fake_run(tmp_path, "mine", k, 60 + 20 * k)) for k in (0, 1)]
    seen, unseen = figures.mean_curve(runs)
    ends = [np.mean([run["final"][name] for run in runs]) for name in ("seen_among_seen", "unseen_among_unseen")]
    assert (seen[0], unseen[-1]) == pytest.approx(tuple(ends)) and unseen[0] == seen[-1] == 0


def test_seeds_that_give_the_same_split_count_once(tmp_path, capsys):
    """As with a published split and published seen classes: ten equal runs are no ten splits."""
    for k, split in enumerate(("x", "x", "y")):
        path = fake_run(tmp_path, "mine", k, 60 + 6 * k) / "done.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"images": {"test": split}}))
    (row,) = [row for row in benchmark.rows_of(benchmark.collect([tmp_path]), "mine") if row["method"] == "mine"]
    assert row["runs"] == 3 and row["overall"] == pytest.approx((63 + 72) / 2)
    assert row["overall_pm"] == pytest.approx(12.706205 * 9 / 2, rel=1e-4)  # t(0.975, 1), s / sqrt 2 = 9 / 2
    assert "warning" not in capsys.readouterr().err


def test_methods_with_other_source_models_are_named(tmp_path, capsys):
    fake_run(tmp_path, "mine", 0, 60)
    path = fake_run(tmp_path, "other", 0, 60) / "logits.npz"
    benchmark.collect([tmp_path])
    assert capsys.readouterr().err == ""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"source_test_logits": arrays["test_logits"]})
    benchmark.collect([tmp_path])
    assert "warning: d a to b, 2 seen: methods started from other source models" in capsys.readouterr().err


def test_a_quotation_without_an_end(run_benchmark):
    code, _, errors = run_benchmark("run", "--print-commands", "--flags=--data-root /home/o'brien")
    assert code == 2 and errors == "error: --data-root /home/o'brien: No closing quotation\n"
