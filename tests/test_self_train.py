"""results/self_train.py: which predictions become labels, the strong views, and a run as a user starts it."""

import json
import runpy
import sys

import pytest
import torch
from conftest import QUICK, ROOT
from test_methods_mathematics import method

import data


@pytest.fixture
def self_train(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    return method("self_train")


def test_a_class_that_is_rare_asks_for_less(self_train):
    probabilities = torch.tensor([[0.96, 0.02, 0.02], [0.94, 0.03, 0.03], [0.26, 0.5, 0.24], [0.28, 0.46, 0.26]])
    mean = torch.tensor([0.6, 0.3, 0.1])  # thresholds 0.95, 0.475 and 0.158
    assert self_train.confident(probabilities.log(), mean, 0.95).tolist() == [True, False, True, False]
    assert self_train.confident(probabilities.log(), torch.ones(3) / 3, 0.95).tolist() == [True, False, False, False]
    assert self_train.confident(probabilities.log(), mean, 0.0).all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 20)])
def test_a_square_of_half_the_sides_is_black(self_train, shape):
    rng = data.generator("cpu", 0)
    images = self_train.black_out(torch.ones(50, *shape), rng)
    black = images == 0
    assert black.float().mean((1, 2, 3)).sub(0.25).abs().max() < 0.05 and ((images == 1) | black).all()
    assert torch.equal(black, black[:, :1].expand_as(black)), "the same place in every channel"
    rows, columns = black.any(3)[:, 0], black.any(2)[:, 0]
    assert torch.equal(black[:, 0], rows[:, :, None] & columns[:, None]), "one box"
    assert len({tuple(row) for row in rows.tolist()}) > 5 and len({tuple(row) for row in columns.tolist()}) > 5
    again = self_train.black_out(torch.ones(50, *shape), data.generator("cpu", 0))
    assert torch.equal(images, again)


def test_it_runs_and_without_weight_it_is_infomax(run_method, runs_dir, monkeypatch):
    infomax = run_method("infomax", "--name", "infomax_alone")[0]["model"].state_dict()
    script, weights = ROOT / "results" / "self_train.py", []
    for weight in ("0", "3"):
        own = ["--self-train-weight", weight, "--name", f"self_train_{weight}"]
        monkeypatch.setattr(sys, "argv", [str(script), "--runs-dir", str(runs_dir), *QUICK, *own])
        names = runpy.run_path(str(script), run_name="__main__")
        weights.append(names["model"].state_dict())
    done = json.loads((names["run"].folder / "done.json").read_text())
    assert done["command"].startswith("python results/self_train.py --runs-dir ")
    for key, value in infomax.items():
        torch.testing.assert_close(weights[0][key], value, atol=5e-5, rtol=1e-4)  # more images in one pass: rounding
    assert (weights[1]["head.weight"] - infomax["head.weight"]).abs().max() > 5e-4, "the term would be seen"
