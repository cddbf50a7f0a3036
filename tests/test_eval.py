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
from eval import InputError


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
    return result


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
        ({"seen": np.array([1, 0, 1, 0])}, "want logits"),
        ({"seen": np.array([True] * 4)}, "4 of 4 are seen"),
        ({"seen": np.array([False] * 4)}, "0 of 4 are seen"),
    ],
)
def test_bad_arrays_are_named(change, message):
    arrays = {"logits": np.zeros((3, 4)), "labels": np.array([0, 1, 2]), "seen": np.array([True, False, True, False])}
    with pytest.raises(InputError, match=message):
        evaluation.accuracies(**{**arrays, **change})


def test_write_atomic_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    evaluation.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        evaluation.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


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
        "seen": np.array([True, True, False, False]),
    }
    path = tmp_path_factory.mktemp("run") / "logits.npz"
    np.savez(path, **arrays)
    return path, arrays


def test_read_run_recomputes(npz):
    path, arrays = npz
    run = evaluation.read_run(path.parent)
    assert run["final"] == evaluation.accuracies(arrays["test_logits"], arrays["test_labels"], arrays["seen"])
    assert run["source"] == evaluation.accuracies(arrays["source_test_logits"], arrays["test_labels"], arrays["seen"])


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
        with pytest.raises(InputError, match=f"{name}.npz: not the complete logits.npz"):
            evaluation.read_run(bad)
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"foreign.npz: not the complete logits.npz of a run"):
        evaluation.read_run(tmp_path / "foreign.npz")
    np.savez(tmp_path / "pickled.npz", **{**npz[1], "seen": np.array([{}], dtype=object)})
    with pytest.raises(InputError, match=r"pickled.npz: not the complete"):
        evaluation.read_run(tmp_path / "pickled.npz")
    np.savez(tmp_path / "nan.npz", **{**npz[1], "test_logits": npz[1]["test_logits"] * np.nan})
    with pytest.raises(InputError, match=r"nan.npz, test_logits: row 0 has nan"):
        evaluation.read_run(tmp_path / "nan.npz")
    with pytest.raises(InputError, match="nowhere"):
        evaluation.read_run(tmp_path / "nowhere")


def test_command_line(npz, tmp_path):
    def call(*arguments):
        command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)

    good = call(npz[0].parent, "--format", "json")
    assert json.loads(good.stdout) == [evaluation.read_run(npz[0])], good.stderr
    bad = call(npz[0].parent, tmp_path / "nowhere")
    assert bad.returncode == 2 and "nowhere" in bad.stderr and len(bad.stderr.splitlines()) == 1 and not bad.stdout
