"""Information maximisation against closed forms, its pool, and its cost."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_methods_mathematics import method

import data
from files import InputError

SEEN = torch.tensor([True, False, True, False, False])


@pytest.fixture
def infomax(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "methods"))
    return method("infomax")


def test_an_unseen_class_counts_alpha_times(infomax):
    torch.manual_seed(0)
    z, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 2, 0, 2, 2, 0])
    for alpha in (0.0, 0.03, 1.0):
        weights = torch.where(SEEN, 1.0, alpha).double()
        share = z.exp() * weights / (z.exp() * weights).sum(1, keepdim=True)
        want = -share[torch.arange(6), labels].log().mean()
        assert infomax.discounted_cross_entropy(z, labels, SEEN, alpha).item() == pytest.approx(want.item(), abs=1e-7)
    assert torch.equal(infomax.discounted_cross_entropy(z, labels, SEEN, 1.0), F.cross_entropy(z, labels))
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(infomax.discounted_cross_entropy(z, labels, SEEN, 0.0), z)
    assert (gradient[:, ~SEEN] == 0).all(), "masked: nothing pushes an unseen class down"


def test_entropy_and_imbalance_are_shots(infomax):
    """With a uniform prior their sum is L_ent + L_div of SHOT and log C."""
    torch.manual_seed(1)
    z = torch.randn(7, 5, dtype=torch.float64) * 2
    p = z.softmax(1)
    assert infomax.uncertainty(z).item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), abs=1e-12)
    mean = p.mean(0)
    l_div = (mean * mean.log()).sum()
    assert infomax.imbalance(mean, torch.full((5,), 0.2)).item() == pytest.approx(
        (l_div + math.log(5)).item(), abs=1e-6
    )
    prior = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).double()
    assert infomax.imbalance(mean, prior).item() == pytest.approx((mean * (mean / prior).log()).sum().item(), abs=1e-12)
    assert infomax.imbalance(prior, prior).item() == pytest.approx(0, abs=1e-12)


def test_certain_predictions_have_finite_gradients(infomax):
    logits = (torch.eye(5) * 200).requires_grad_()
    mean = logits.softmax(1).mean(0) * torch.tensor([1.0, 1, 1, 1, 0])
    total = infomax.uncertainty(logits) + infomax.imbalance(mean, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]))
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_running_mean_has_the_steps_own_gradient(infomax):
    now, before = torch.tensor([0.7, 0.3], requires_grad=True), torch.tensor([0.5, 0.5])
    mean = infomax.running_mean(now, before, 0.9)
    assert mean.tolist() == pytest.approx([0.52, 0.48])
    (gradient,) = torch.autograd.grad(mean[0], now)
    assert gradient.tolist() == [1, 0]
    assert infomax.running_mean(now, before, 0.0).tolist() == pytest.approx(now.tolist())


def test_concerns():
    """Nothing of a kind pool; each of too few images, of other class shares, of images that the source model doubts."""
    uniform, certain = torch.full((4,), 0.25), torch.eye(4).repeat(10, 1) * 20
    assert data.pool_concerns(certain, certain[:20], uniform) == []
    assert "19 besides" in data.pool_concerns(certain, certain[:21], uniform)[0]
    skewed = torch.cat([certain[:8], certain[:1].repeat(32, 1)])
    (text,) = data.pool_concerns(skewed, certain[:20], uniform)
    assert "other class shares" in text and "distance 0.60" in text
    doubtful = torch.cat([certain[:36], torch.zeros(4, 4)])  # a tenth has the largest entropy, log 4
    assert data.pool_concerns(torch.cat([certain[:37], torch.zeros(3, 4)]), certain[:20], uniform) == []
    (text,) = data.pool_concerns(torch.cat([doubtful, torch.zeros(4, 4)]), certain[:20], uniform)
    assert f"{8 / 44 * math.log(4):.2f} nats" in text


def test_without_weight_and_with_alpha_1_it_is_naive(run_method, read):
    flags = ("--infomax-weight", "0", "--alpha", "1")
    pair = (("naive_ft", ("--name", "naive_same")), ("infomax", (*flags, "--name", "infomax_same")))
    weights = [run_method(name, *own)[0]["model"].state_dict() for name, own in pair]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=5e-5, rtol=1e-4)  # both batches in one pass: rounding
    moved = run_method("naive_ft", "--name", "naive_moved", "--lr", "0.006")[0]["model"].state_dict()["head.weight"]
    assert (moved - weights[0]["head.weight"]).abs().max() > 5e-4, "another rate would be seen"


def test_labels_of_the_pool_are_never_read(run_method, read, monkeypatch):
    load_task, arrays = data.load_task, []
    for wrong in (False, True):

        def load(*args, wrong=wrong, **flags):
            task = load_task(*args, **flags)
            if wrong:
                task.target_unlabelled.labels = torch.arange(len(task.target_unlabelled.labels)) % 10
            return task

        monkeypatch.setattr(data, "load_task", load)
        for name, own in (("infomax", ()), ("bn_adapt", ("--mode", "pool"))):
            arrays.append(read(run_method(name, *own, "--name", f"{name}_{wrong}")[1])[1]["test_logits"])
    assert all(np.array_equal(right, wrong) for right, wrong in zip(arrays[:2], arrays[2:], strict=True))


def test_a_prior_from_a_file(run_method, tmp_path, capsys):
    path = tmp_path / "shares.txt"
    path.write_text("".join(f"{digit} {digit + 1}\n" for digit in range(10)))
    names = run_method("infomax", "--prior", str(path), "--name", "infomax_prior")[0]
    assert names["prior"].tolist() == pytest.approx([(digit + 1) / 55 for digit in range(10)])
    path.write_text("".join(f"{digit} 1\n" for digit in range(10)))
    with pytest.raises(SystemExit) as stop:  # the finished run was of other shares
        run_method("infomax", "--prior", str(path), "--name", "infomax_prior")
    assert stop.value.code == 2 and "holds a run with prior" in capsys.readouterr().err
    names = run_method("infomax", "--prior", "source", "--name", "infomax_source")[0]
    logits = names["models"].predict(names["source_model"], names["task"].target_unlabelled.images)
    assert names["prior"].tolist() == pytest.approx(torch.from_numpy(logits).softmax(1).mean(0).tolist())


def test_wrong_shares_are_named(tmp_path):
    path = tmp_path / "shares.txt"
    for text, match in (
        ("a 1\nb\n", "line 2: 'b'"),
        ("a 1\n", r"\['b'\]"),
        ("a 1\nb -1\n", "0 or more"),
        ("a 0\nb 0", "0 or more"),
        ("a 1\na 3\nb 1\n", "line 2: a second number for a"),
        ("\xe4 1\nb 1\n", "needs a number"),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=match):
            data.read_shares(path, ["a", "b"], "--prior")
    path.write_text("a 1\n\nb 3\n\n")
    assert data.read_shares(path, ["a", "b"], "--prior").tolist() == [0.25, 0.75], "empty lines are no lines"


def test_a_run_says_that_it_is_another_setting(run_method, read, capsys):
    names, folder = run_method("infomax", "--name", "infomax_says")
    count = len(names["task"].target_unlabelled.labels)
    assert f"another setting: {count} unlabelled images of the target" in capsys.readouterr().out
    assert read(folder)[0]["unlabelled_images"] == count
    folder = run_method("naive_ft", "--name", "naive_says")[1]
    assert "unlabelled" not in capsys.readouterr().out and read(folder)[0]["unlabelled_images"] == 0
