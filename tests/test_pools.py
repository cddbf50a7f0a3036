"""results/pools.py: what is in an unkind pool, and a run on one as a user starts it."""

import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_task

import data
from results import pools


@pytest.fixture(scope="module")
def whole():
    return load_task("digits", oracle=True)


@pytest.mark.parametrize("kind", pools.KINDS)
def test_kinds(kind, whole):
    split, seen = whole.target_train, whole.seen
    pool, counts = pools.unkind(kind, split, seen, seed=0)
    again, _ = pools.unkind(kind, split, seen, seed=0)
    assert torch.equal(pool.images, again.images) and set(pool.labels.tolist()) == {-1}
    assert pool.images.shape[1:] == split.images.shape[1:] and pool.images.dtype is torch.uint8
    known, count = int(counts.sum()), len(pool.labels)
    of_unseen = int(counts[~seen].sum())
    if kind == "tail":
        assert counts.max() > 40 * counts.min() > 0
    elif kind == "tiny":
        assert known == count == 20
    elif kind == "noseen":
        assert counts[seen].sum() == 0 and of_unseen == count > 600
    elif kind == "unseen10":
        assert of_unseen / count == pytest.approx(0.1, abs=0.002)
    elif kind == "turned":
        assert count == len(split.labels)
        back = pools.turned(pool.images, -25.0).float()
        order = np.random.default_rng((0, pools.KINDS.index(kind))).permutation(count)
        original = split.images[torch.from_numpy(order)].float()
        assert (back - original).abs().mean() < 0.5 * (pool.images.float() - original).abs().mean()
    else:
        assert (count - known) / count == pytest.approx(int(kind[-2:]) / 100, abs=0.002)


def test_a_run_on_an_unkind_pool(tmp_path, monkeypatch, read):
    for name in ("load_task", "read_shares"):  # put back afterwards
        monkeypatch.setattr(data, name, getattr(data, name))
    flags = [
        "--epochs",
        "1",
        "--steps-per-epoch",
        "2",
        "--runs-dir",
        str(tmp_path),
        "--prior",
        "pool",
        "--device",
        "cpu",
    ]
    argv = [str(ROOT / "results" / "pools.py"), "tiny", str(ROOT / "methods" / "infomax.py"), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    (folder,) = tmp_path.glob("digits/*/infomax_tiny/*")
    assert read(folder)[0]["unlabelled_images"] == 20
