import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import eval as evaluation
import runs


def loop_accuracies(logits, labels, seen):
    """An independent, slow reading of the definitions, one image at a time."""
    n, c = logits.shape
    right = {"overall": [], "seen": [], "unseen": [], "seen_among_seen": [], "unseen_among_unseen": []}
    per_class = {}
    for i in range(n):
        best, best_in_group, label = None, None, int(labels[i])
        for k in range(c):
            if best is None or logits[i, k] > logits[i, best]:
                best = k
            if seen[k] == seen[label] and (best_in_group is None or logits[i, k] > logits[i, best_in_group]):
                best_in_group = k
        group = "seen" if seen[label] else "unseen"
        right["overall"].append(best == label)
        right[group].append(best == label)
        right[f"{group}_among_{group}"].append(best_in_group == label)
        per_class.setdefault(label, []).append(best == label)
    result = {k: 100 * math.fsum(v) / len(v) if v else None for k, v in right.items()}
    a, b = result["seen"], result["unseen"]
    result["harmonic_mean"] = (
        None if a is None or b is None else 0.0 if a + b == 0 else 2 / (1 / a + 1 / b) if a * b else 0.0
    )
    means = [math.fsum(v) / len(v) for v in per_class.values()]
    result["class_mean"] = 100 * math.fsum(means) / len(means) if means else None
    groups = {bool(seen[label]) for label in per_class}
    if groups != {True, False}:  # how good the model is over all classes is not known
        result |= dict.fromkeys(("overall", "harmonic_mean", "class_mean", "ausuc"))
    points = loop_curve(logits, labels, seen)
    area = [(a0 - a1) * (b0 + b1) / 2 for (_, a0, b0), (_, a1, b1) in itertools.pairwise(points)]
    result["ausuc"] = math.fsum(area) / 1e4 if points else None
    return result


def loop_curve(logits, labels, seen):
    """(gamma, seen accuracy, unseen accuracy) at a gamma below, between and above all values that flip a prediction,
    by predicting every image anew at each of them; [] where a group has no image."""
    images = {g: [i for i, label in enumerate(labels) if seen[label] == g] for g in (True, False)}
    if not images[True] or not images[False]:
        return []
    best = {g: [max(z[k] for k in range(len(z)) if seen[k] == g) for z in logits] for g in (True, False)}
    flips = sorted({s - u for s, u in zip(best[True], best[False], strict=True)})
    points = []
    for gamma in [flips[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(flips)), flips[-1] + 1]:
        accuracy = {}
        for group, members in images.items():
            right = 0
            for i in members:
                biased = [value + (0 if seen[k] else gamma) for k, value in enumerate(logits[i])]
                right += biased.index(max(biased)) == labels[i]
            accuracy[group] = 100 * right / len(members)
        points.append((gamma, accuracy[True], accuracy[False]))
    return points


def cases():
    rng = np.random.default_rng(0)
    seen = np.array([True, False, True, False, False])
    random, labels = rng.normal(size=(200, 5)), rng.integers(0, 5, 200)
    yield "random", random, labels, seen
    yield "biased", random + 3.0 * seen, labels, seen
    yield "tied", rng.integers(0, 2, (200, 5)).astype(float), labels, seen
    yield "constant", np.zeros((200, 5)), labels, seen
    yield "all wrong", -10.0 * np.eye(5)[labels], labels, seen
    yield "only seen images", random[seen[labels]], labels[seen[labels]], seen
    yield "only unseen images", random[~seen[labels]], labels[~seen[labels]], seen
    yield "no image", random[:0], labels[:0], seen


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_accuracies_against_a_loop(case, kind):
    _, logits, labels, seen = case
    want = loop_accuracies(logits, labels, seen)
    given = (logits, labels, seen) if kind == "numpy" else tuple(map(torch.from_numpy, (logits, labels, seen)))
    got = evaluation.accuracies(*given)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key] is None) == (value is None) and (value is None or abs(got[key] - value) < 1e-9), key


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_curve_and_best_gamma_against_a_loop(case):
    _, logits, labels, seen = case
    want = loop_curve(logits, labels, seen)
    if not want:
        with pytest.raises(ValueError, match="there is no curve"):
            evaluation.seen_unseen_curve(logits, labels, seen)
        assert evaluation.accuracies(logits, labels, seen)["ausuc"] is None
        return
    gamma, seen_accuracy, unseen_accuracy = evaluation.seen_unseen_curve(logits, labels, seen)
    np.testing.assert_allclose(np.stack([seen_accuracy, unseen_accuracy], 1), [p[1:] for p in want], atol=1e-9)
    for g, a, b in zip(gamma, seen_accuracy, unseen_accuracy, strict=True):
        figures = evaluation.accuracies(logits, labels, seen, gamma=g)
        assert (figures["seen"], figures["unseen"]) == (pytest.approx(a, abs=1e-9), pytest.approx(b, abs=1e-9))
    assert (np.diff(gamma) > 0).all()
    now = evaluation.accuracies(logits, labels, seen)
    if 0 in gamma:
        at_0 = list(gamma).index(0)
        assert now["seen"] == pytest.approx(seen_accuracy[at_0]) and now["unseen"] == pytest.approx(
            unseen_accuracy[at_0]
        )
    else:
        assert any(s.max() == u.max() for s, u in zip(logits[:, seen], logits[:, ~seen], strict=True))  # 0 is a flip
    is_seen = seen[labels]
    overall = [(p[1] * is_seen.sum() + p[2] * (~is_seen).sum()) / len(labels) for p in want]
    best = evaluation.accuracies(logits, labels, seen, gamma=evaluation.best_gamma(logits, labels, seen))
    assert best["overall"] == pytest.approx(max(overall), abs=1e-9)


def test_the_curve_by_hand():
    # classes 0, 1 seen, 2 unseen; flips at 1 (a seen image), 2 (an unseen one), 3 (both kinds at once), 5 (wrong both)
    seen = np.array([True, True, False])
    logits = np.array([[1, 0, 0], [0, 2, 0], [3, 0, 0], [0, 3, 0], [0, 5, 0.0]])
    labels = np.array([0, 2, 2, 1, 0])
    gamma, a, b = evaluation.seen_unseen_curve(logits, labels, seen)
    assert gamma.tolist() == [0, 1.5, 2.5, 4, 10]
    np.testing.assert_allclose(a, [200 / 3, 100 / 3, 100 / 3, 0, 0])
    np.testing.assert_allclose(b, [0, 0, 50, 100, 100])
    assert evaluation.accuracies(logits, labels, seen)["ausuc"] == pytest.approx(
        (1 / 3) * (0.5 + 1) / 2
    )  # a tie is a straight line
    assert evaluation.best_gamma(logits, labels, seen) == 0  # of three equally good ones the nearest to 0


def test_what_a_bias_cannot_change():
    rng = np.random.default_rng(3)
    seen = rng.random(12) < 0.5
    logits, labels = rng.integers(-8, 8, (300, 12)) / 4 + 0.0, rng.integers(0, 12, 300)
    figures = evaluation.accuracies(logits, labels, seen)
    for gamma in (-2.5, 0.25, 64.0):
        moved = evaluation.accuracies(logits + gamma * ~seen, labels, seen)
        assert moved == evaluation.accuracies(logits, labels, seen, gamma=gamma)
        for name in ("ausuc", "seen_among_seen", "unseen_among_unseen"):
            assert moved[name] == pytest.approx(figures[name], abs=1e-12)
        best, before = (
            evaluation.best_gamma(logits + gamma * ~seen, labels, seen),
            evaluation.best_gamma(logits, labels, seen),
        )
        overall = evaluation.accuracies(logits, labels, seen, gamma=before)["overall"]
        assert evaluation.accuracies(logits, labels, seen, gamma=gamma + best)["overall"] == overall
        train = labels[seen[labels]]
        shift = evaluation.alg_gamma(logits[seen[labels]] + gamma * ~seen, train, seen)
        assert shift == pytest.approx(evaluation.alg_gamma(logits[seen[labels]], train, seen) - gamma)
    order = rng.permutation(300)
    assert evaluation.accuracies(logits[order], labels[order], seen)["ausuc"] == pytest.approx(
        figures["ausuc"], abs=1e-12
    )
    logits, classes = rng.normal(size=(300, 12)), rng.permutation(12)
    figures = evaluation.accuracies(logits, labels, seen)
    renamed = np.argsort(classes)[labels]
    assert evaluation.accuracies(logits[:, classes], renamed, seen[classes])["ausuc"] == pytest.approx(
        figures["ausuc"], abs=1e-12
    )
    perfect = np.where(seen == seen[labels][:, None], 0.0, -5.0) + np.eye(12)[labels]
    assert evaluation.accuracies(perfect, labels, seen)["ausuc"] == 1


def test_alg_against_a_loop():
    rng = np.random.default_rng(4)
    seen = np.array([True, False, True, True, False])
    logits, labels = rng.normal(size=(50, 5)), rng.choice([0, 2, 3], 50)
    gaps = []
    for z, y in zip(logits, labels, strict=True):
        others = [z[k] for k in range(5) if seen[k] and k != y]
        unseen = [z[k] for k in range(5) if not seen[k]]
        gaps.append(math.fsum(others) / len(others) - math.fsum(unseen) / len(unseen))
    assert evaluation.alg_gamma(logits, labels, seen) == pytest.approx(math.fsum(gaps) / 50, abs=1e-12)
    assert evaluation.alg_gamma(logits[:0], labels[:0], seen) is None
    assert evaluation.alg_gamma(logits[:, :2], np.zeros(50, int), seen[:2]) is None  # one seen class has no others
    with pytest.raises(ValueError, match="row 1 is of an unseen class"):
        evaluation.alg_gamma(logits[:2], np.array([0, 1]), seen)


def test_alg_against_the_source_by_a_loop():
    rng = np.random.default_rng(5)
    seen = np.array([True, False, True, True, False])
    logits, source = rng.normal(size=(2, 50, 5))
    labels = rng.choice([0, 2, 3], 50)
    gaps = []
    for i, y in enumerate(labels):
        gap = [
            max(z[i][k] for k in range(5) if seen[k] and k != y) - max(z[i][k] for k in range(5) if not seen[k])
            for z in (logits, source)
        ]
        gaps.append(gap[0] - gap[1])
    gamma = evaluation.alg_source_gamma(logits, source, labels, seen)
    assert gamma == pytest.approx(math.fsum(gaps) / 50, abs=1e-12)
    assert evaluation.alg_source_gamma(*map(torch.from_numpy, (logits, source, labels, seen))) == gamma
    # what pushes all unseen classes down together is mended to the last bit of it, whatever the source model has
    assert evaluation.alg_source_gamma(source - 3 * ~seen, source, labels, seen) == pytest.approx(3, abs=1e-12)
    assert evaluation.alg_source_gamma(source + rng.normal(size=(50, 1)), source, labels, seen) == pytest.approx(0)
    assert evaluation.alg_source_gamma(logits[:0], source[:0], labels[:0], seen) is None
    zeros = np.zeros(50, int)
    assert evaluation.alg_source_gamma(logits[:, :2], source[:, :2], zeros, seen[:2]) is None
    with pytest.raises(ValueError, match="row 1 is of an unseen class"):
        evaluation.alg_source_gamma(logits[:2], source[:2], np.array([0, 1]), seen)
    with pytest.raises(ValueError, match=r"train_logits: \(50, 5\), and the source model's \(49, 5\)"):
        evaluation.alg_source_gamma(logits, source[1:], labels, seen)
    source[7, 2] = np.nan
    with pytest.raises(ValueError, match="source_train_logits: row 7 has nan"):
        evaluation.alg_source_gamma(logits, source, labels, seen)


@pytest.mark.parametrize("group", ["seen", "unseen"])
def test_over_all_classes_nothing_is_known_from_one_group(group, npz, tmp_path):
    arrays = dict(npz[1])
    own = arrays["seen"][arrays["test_labels"]] == (group == "seen")
    for name in ("test_logits", "source_test_logits", "test_labels"):
        arrays[name] = arrays[name][own]
    np.savez(tmp_path / "logits.npz", **arrays)
    run = evaluation.read_run(tmp_path)
    assert {run[part]["overall"] for part in ("source", "final", "alg", "alg_source")} == {None}
    assert run["final"][group] is not None and run["oracle_gamma"] is None
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path), "--format"]
    shown = {}
    for style in ("md", "csv", "json"):
        shown[style] = subprocess.run([*command, style], check=True, capture_output=True, text=True).stdout
    lines = shown["md"].splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[2:4]]
    assert cells == ["-", "-"] and lines[3:] == ["", evaluation.UNKNOWN]
    assert json.loads(shown["json"])[0]["final"]["overall"] is None
    assert evaluation.UNKNOWN not in shown["csv"] + shown["json"]
    assert runs.result_table(run).endswith(f"\n\n{evaluation.UNKNOWN}")
    whole = evaluation.read_run(npz[0])
    assert evaluation.UNKNOWN not in runs.result_table(whole)


def test_half_precision_tensors():
    logits = torch.randn(20, 4, requires_grad=True)
    labels, seen = torch.arange(20) % 4, torch.tensor([True, False, True, False])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits.detach().to(dtype).double()
        assert evaluation.accuracies(logits.to(dtype), labels, seen) == evaluation.accuracies(rounded, labels, seen)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory from /proc")
def test_a_large_curve_is_quick_and_small():
    """50,000 images of 1,000 classes within 2 s and 1.5 GB on one core; time grows like N log N."""
    program = (
        "import time, numpy as np, eval as e\n"
        "rng, cases = np.random.default_rng(0), []\n"
        "for n, c in ((20_000, 200), (200_000, 200), (50_000, 1000)):\n"
        "    z, y = rng.standard_normal((n, c), dtype=np.float32), rng.integers(0, c, n)\n"
        "    cases.append((z, y, np.arange(c) % 2 == 0, []))\n"
        "for _ in range(3):\n"  # in turns: a machine that is slow for a moment is so for all three
        "    for z, y, seen, times in cases:\n"
        "        start = time.process_time(); e.accuracies(z, y, seen); e.seen_unseen_curve(z, y, seen)\n"
        "        times.append(time.process_time() - start)\n"
        "seconds = [min(times) for *_, times in cases]\n"
        # not getrusage: its peak is at least that of the process which started this one
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(*seconds, int(peak.split()[1]) / 2**20)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    small, large, wide, gigabytes = map(float, done.stdout.split())
    # N log N is a ratio of 12.3, N squared one of 100; the smaller case also fits more of a processor's cache
    assert wide < 2 and gigabytes < 1.5 and large / small < 20, (small, large, wide, gigabytes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": np.full((3, 4), np.nan)}, "row 0 has nan or inf"),
        ({"logits": np.array([[0, 1, 2, 3], [0, 1, np.inf, 3], [0, 1, 2, 3.0]])}, "row 1 has nan or inf"),
        ({"logits": np.zeros(4)}, r"want logits \[N, C\]"),
        ({"labels": np.array([0, 1, 4])}, "labels must be integers from 0 to 3"),
        ({"labels": np.array([0, 1, -1])}, "labels must be integers from 0 to 3"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "labels must be integers"),
        ({"labels": np.array([0, 1])}, "want logits"),
        ({"seen": np.array([True, False, True])}, "want logits"),
        ({"seen": np.array([1, 0, 2, 0])}, "want logits"),
        ({"seen": np.array([1.0, 0.0, 1.0, 0.0])}, "want logits"),
        ({"seen": np.array([True] * 4)}, "4 of 4 are seen"),
        ({"seen": np.array([False] * 4)}, "0 of 4 are seen"),
    ],
)
def test_bad_arrays_are_named(change, message):
    arrays = {"logits": np.zeros((3, 4)), "labels": np.array([0, 1, 2]), "seen": np.array([True, False, True, False])}
    with pytest.raises(ValueError, match=message):
        evaluation.accuracies(**{**arrays, **change})


def test_tables():
    rows = [{"run": "a", "overall": 12.346, "unseen": None}, {"run": "long name", "overall": 100.0, "unseen": 7.0}]
    assert evaluation.table(rows).splitlines() == [
        "| run       | overall | unseen |",
        "| --------- | ------: | -----: |",
        "| a         |   12.35 |      - |",
        "| long name |  100.00 |   7.00 |",
    ]
    assert evaluation.table(rows, "csv").splitlines() == ["run,overall,unseen", "a,12.346,", "long name,100.0,7.0"]
    assert json.loads(evaluation.table(rows, "json")) == rows


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    rng = np.random.default_rng(1)
    arrays = {
        "test_logits": rng.normal(size=(40, 4)).astype(np.float32),
        "source_test_logits": rng.normal(size=(40, 4)).astype(np.float32),
        "test_labels": rng.integers(0, 4, 40),
        "train_logits": rng.normal(size=(30, 4)).astype(np.float32),
        "source_train_logits": rng.normal(size=(30, 4)).astype(np.float32),
        "train_labels": rng.integers(0, 2, 30),
        "seen": np.array([True, True, False, False]),
        "classes": np.array(list("abcd")),
    }
    path = tmp_path_factory.mktemp("run") / "logits.npz"
    np.savez(path, **arrays)
    return path, arrays


def test_read_run_recomputes(npz, tmp_path):
    path, arrays = npz
    test = arrays["test_logits"], arrays["test_labels"], arrays["seen"]
    run = evaluation.read_run(path.parent)
    assert run["final"] == evaluation.accuracies(*test) and run["classes"] == list("abcd") and run["pcv"] is None
    assert run["source"] == evaluation.accuracies(arrays["source_test_logits"], arrays["test_labels"], arrays["seen"])
    gamma = evaluation.alg_gamma(arrays["train_logits"], arrays["train_labels"], arrays["seen"])
    assert run["alg"] == {"gamma": gamma, **evaluation.accuracies(*test, gamma=gamma)}
    train = arrays["train_logits"], arrays["source_train_logits"], arrays["train_labels"], arrays["seen"]
    gamma = evaluation.alg_source_gamma(*train)
    assert run["alg_source"] == {"gamma": gamma, **evaluation.accuracies(*test, gamma=gamma)}
    assert run["oracle_gamma"]["overall"] >= max(run[kind]["overall"] for kind in ("final", "alg", "alg_source"))
    # the oracle's training images of unseen classes have no part in ALG
    more = {"train_logits": np.ones((1, 4)), "source_train_logits": np.eye(4)[:1], "train_labels": np.array([3])}
    more = {k: np.concatenate([arrays[k], v]).astype(arrays[k].dtype) for k, v in more.items()}
    np.savez(tmp_path / "logits.npz", **{**arrays, **more})
    again = evaluation.read_run(tmp_path)
    assert (again["alg"], again["alg_source"]) == (run["alg"], run["alg_source"])


def test_pcv_takes_one_bias_for_all_pseudo_splits(npz, tmp_path):
    _, arrays = npz
    seen, rng = arrays["seen"], np.random.default_rng(2)
    splits = []
    for folder in ["split0-seed0", "split0-seed0-pseudo0", "split0-seed0-pseudo1", "split0-seed1-pseudo0"]:
        run = {**arrays, "test_logits": rng.normal(size=(40, 4)).astype(np.float32), "test_labels": np.arange(40) % 3}
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "logits.npz", **run)
        (tmp_path / folder / "done.json").write_text("{}")
        splits.append((run["test_logits"].astype(float), run["test_labels"], seen))
    splits = splits[1:3]
    run = evaluation.read_run(tmp_path / "split0-seed0")
    assert (run["pcv"]["gamma"], run["pcv"]["gamma_spread"]) == evaluation.pcv_gamma(splits)
    # by hand: every bias between two flips of any image, the images of both splits counted together
    images = [(z, y) for logits, labels, _ in splits for z, y in zip(logits, labels, strict=True)]
    flips = sorted({z[seen].max() - z[~seen].max() for z, _ in images})
    right = []
    for gamma in [flips[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(flips)), flips[-1] + 1]:
        right.append(sum((z + gamma * ~seen).argmax() == y for z, y in images))
    reached = sum((z + run["pcv"]["gamma"] * ~seen).argmax() == y for z, y in images)
    assert reached == max(right) > min(right)
    own = [evaluation.best_gamma(*split) for split in splits]
    assert run["pcv"]["gamma_spread"] == max(own) - min(own) > 0


def test_pcv_passes_over_a_split_without_images_of_both_groups():
    rng, seen = np.random.default_rng(0), np.array([True, True, False, False])
    whole, one_sided = ((rng.normal(size=(40, 4)), np.arange(40) % kinds, seen) for kinds in (4, 2))
    gamma, spread = evaluation.pcv_gamma([whole, one_sided])
    assert spread == 0 and np.isfinite(gamma), "the images of both count together, the spread is of the first alone"
    assert evaluation.pcv_gamma([one_sided]) == (None, None)


def test_pcv_refuses_pseudo_splits_of_other_flags(npz, tmp_path):
    flags = {"lr": 0.1, "dataset": "d", "data_root": "here", "device": "cpu", "pseudo_split": None}
    folders = [tmp_path / name for name in ("split0-seed0", "split0-seed0-pseudo0")]

    def write(folder, **changed):
        folder.mkdir(exist_ok=True)
        np.savez(folder / "logits.npz", **npz[1])
        (folder / "args.json").write_text(json.dumps({**flags, **changed}))
        (folder / "done.json").write_text("{}")

    write(folders[0])
    write(folders[1], pseudo_split=0, data_root="elsewhere", device="cuda", new=1)  # change no figure
    assert evaluation.read_run(folders[0])["pcv"] is not None
    write(folders[1], pseudo_split=0, lr=0.2)
    with pytest.raises(ValueError, match=r"pseudo0: other lr 0.2 \(there 0.1\) than .*split0-seed0;"):
        evaluation.read_run(folders[0])
    command = [sys.executable, str(ROOT / "eval.py"), str(folders[0])]
    shown = subprocess.run(command, check=False, capture_output=True, text=True)
    assert shown.returncode == 2 and "other lr 0.2" in shown.stderr and shown.stderr.count("\n") == 1
    write(folders[0], dataset="folder")
    write(folders[1], dataset="folder", pseudo_split=0, data_root="elsewhere")  # these are other images
    with pytest.raises(ValueError, match=r"other data_root elsewhere \(there here\) than"):
        evaluation.read_run(folders[0])
    (folders[1] / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"pseudo0.args.json: "):
        evaluation.read_run(folders[0])


def test_a_list_of_seen_classes_is_the_same_flag_for_a_pseudo_split(run_method, tmp_path):
    (tmp_path / "seen.txt").write_text("0\n7\n3\n4\n")
    flags = ("--seen-classes", str(tmp_path / "seen.txt"))
    folder = run_method("naive_ft", *flags, runs=tmp_path)[1]
    run_method("naive_ft", *flags, "--pseudo-split", "0", runs=tmp_path)
    assert json.loads((folder / "args.json").read_text())["seen_classes"] == '["0", "3", "4", "7"]'
    assert evaluation.read_run(folder)["pcv"] is not None


def test_logits_made_elsewhere_are_enough(npz, tmp_path):
    """An npz of anyone's with three arrays, the mask as 0 and 1: what cannot be computed is None."""
    arrays = {name: npz[1][name] for name in ("test_logits", "test_labels", "seen")}
    np.savez(tmp_path / "mine.npz", **{**arrays, "seen": arrays["seen"].astype(int)})
    run, whole = evaluation.read_run(tmp_path / "mine.npz"), evaluation.read_run(npz[0])
    assert run["run"] == str(tmp_path / "mine.npz")
    assert (run["final"], run["oracle_gamma"]) == (whole["final"], whole["oracle_gamma"])
    assert all(run[name] is None for name in ("source", "alg", "alg_source", "pcv")) and run["classes"] == []
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path / "mine.npz")]
    row = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert ["-" in cell for cell in row.split("|")[2:-1]] == [True] + [False] * 5 + [True]


def test_it_needs_numpy_alone():
    program = (
        "import sys, eval, numpy\n"
        "z, y, seen = numpy.eye(4), numpy.arange(4), numpy.array([True, True, False, False])\n"
        "assert eval.accuracies(z, y, seen)['overall'] == 100 and len(eval.seen_unseen_curve(z, y, seen)) == 3\n"
        "assert abs(eval.alg_gamma(z[:2], y[:2], seen)) < 1\n"
        "packages = {name.split('.')[0] for name, module in sys.modules.items() if getattr(module, '__file__', None)}\n"
        "print(*packages - set(sys.stdlib_module_names) - {'numpy', 'eval'})\n"
    )
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "tyro", "scipy", "files", "runs"} & set(imported), imported


def damaged(path, arrays):
    whole = path.read_bytes()
    yield "truncated", whole[: len(whole) // 2]
    yield "empty", b""
    yield "text", b"hello"
    yield (
        "array",
        b"\x93NUMPY\x01\x00" + b"v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }".ljust(120) + bytes(8),
    )


def test_damaged_npz_is_named(npz, tmp_path):
    for name, content in damaged(*npz):
        bad = tmp_path / f"{name}.npz"
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.npz: not the complete logits.npz"):
            evaluation.read_run(bad)
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"foreign.npz: not the complete logits.npz of a run"):
        evaluation.read_run(tmp_path / "foreign.npz")
    np.savez(tmp_path / "pickled.npz", **{**npz[1], "seen": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=r"pickled.npz: not the complete"):
        evaluation.read_run(tmp_path / "pickled.npz")
    np.savez(tmp_path / "nan.npz", **{**npz[1], "test_logits": npz[1]["test_logits"] * np.nan})
    with pytest.raises(ValueError, match=r"nan.npz, test_logits: row 0 has nan"):
        evaluation.read_run(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="nowhere"):
        evaluation.read_run(tmp_path / "nowhere")


def test_command_line(npz, tmp_path):
    def call(*arguments):
        command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)

    good = call(npz[0].parent, "--format", "json")
    assert json.loads(good.stdout) == [evaluation.read_run(npz[0])], good.stderr
    shown, every = call(npz[0]).stdout, call(npz[0], "--all").stdout
    assert "| alg overall |" in shown and shown.splitlines()[0].count("|") - 1 <= 9
    assert "pcv bias spread" in every and "pcv bias spread" not in shown
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "logits.npz", **{**npz[1], "classes": np.array(list("wxyz"))})
    mixed = call(npz[0].parent, tmp_path / "other")
    assert mixed.returncode == 2 and "are over different classes (4 and 4)" in mixed.stderr and not mixed.stdout
    nothing = call()
    assert nothing.returncode == 2 and nothing.stderr == "error: name the folder of a run\n"
    bad = call(npz[0].parent, tmp_path / "nowhere")
    assert bad.returncode == 2 and "nowhere" in bad.stderr and len(bad.stderr.splitlines()) == 1 and not bad.stdout


def test_effective_rank():
    """Of k orthogonal directions of one length it is k, of lengths 3 and 1 exp(H(3/4, 1/4)), whatever is added."""
    basis = torch.linalg.qr(torch.cat([torch.ones(50, 1), torch.randn(50, 6)], 1).double())[0][:, 1:]
    for k in (1, 3, 6):
        assert evaluation.effective_rank(basis[:, :k] + 7) == pytest.approx(k, abs=1e-6)
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    two = basis[:, :2] * torch.tensor([3.0, 1.0])
    turned = two @ torch.linalg.qr(torch.randn(2, 2).double())[0]
    for features in (two, turned, turned.numpy(), torch.cat([two, torch.zeros(50, 3).double()], 1)):
        assert evaluation.effective_rank(features) == pytest.approx(want, abs=1e-6)


def test_features_without_a_rank():
    for features in (torch.full((4, 3), math.nan), torch.full((4, 3), math.inf), torch.ones(4, 3), torch.ones(1, 3)):
        assert evaluation.effective_rank(features) is None
