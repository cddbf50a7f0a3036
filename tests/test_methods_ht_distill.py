"""The flagship's terms against closed forms, and what each of them holds in place."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods_mathematics import method

SEEN = torch.tensor([True, False, True, False, False])


@pytest.fixture
def ht_distill(methods_can_be_imported):
    return method("ht_distill")


@pytest.fixture
def methods_can_be_imported(monkeypatch):
    from conftest import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "methods"))


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def test_three_parts_are_the_kl_over_all_classes(ht_distill):
    """KL of the shares + the source's share of U x KL inside U + its share of S x KL inside S, image by image."""
    torch.manual_seed(0)
    z, source_z = torch.randn(2, 6, 5, dtype=torch.float64) * 3
    for i in range(6):
        one, source_one = z[i : i + 1], source_z[i : i + 1]
        p, q = source_one.softmax(1), one.softmax(1)
        part = p[0, SEEN].sum()
        share, _ = ht_distill.share(one, source_one, SEEN, None, part)  # the prior is the source's own
        inside_unseen = ht_distill.relations(one, source_one, SEEN)
        inside_seen = ht_distill.relations(one, source_one, ~SEEN)
        total = share + (1 - part) * inside_unseen + part * inside_seen
        assert total.item() == pytest.approx(kl(p, q).item(), abs=1e-9)


def test_relations_are_the_papers_selective_distillation(ht_distill):
    torch.manual_seed(1)
    z, source_z = torch.randn(2, 6, 5, dtype=torch.float64)
    p, q = source_z[:, ~SEEN].softmax(1), z[:, ~SEEN].softmax(1)
    value = ht_distill.relations(z, source_z, SEEN).item()
    assert value == pytest.approx(kl(p, q).mean().item(), abs=1e-12)
    assert ht_distill.relations(source_z, source_z, SEEN).item() == pytest.approx(0, abs=1e-12)
    for moved in (z - 2.0 * ~SEEN, z + 3.0 * SEEN, z.index_copy(1, torch.tensor([0, 2]), torch.randn(6, 2).double())):
        assert ht_distill.relations(moved, source_z, SEEN).item() == pytest.approx(value, abs=1e-9)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(ht_distill.relations(z, source_z, SEEN), z)
    assert (gradient[:, SEEN] == 0).all(), "the seen classes are free to adapt"


def of_share(*shares):
    """Logits [N, 5], one image each, whose seen classes have these shares."""
    shares = torch.tensor(shares, dtype=torch.float64)[:, None]
    return torch.where(SEEN, (shares / 2).log(), ((1 - shares) / 3).log())


def test_the_share_holds_the_unseen_classes_up_together(ht_distill):
    torch.manual_seed(2)
    z = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    s = z.softmax(1)[:, SEEN].sum(1).mean().item()
    for source, prior in ((0.3, 0.5), (0.9, 0.1)):
        spread = of_share(source - 0.05, source + 0.05)
        term, means = ht_distill.share(z, spread, SEEN, None, prior)
        assert [m.item() for m in means] == pytest.approx([s, source]) and not any(m.requires_grad for m in means)
        wanted = (source + prior) / 2
        value = wanted * math.log(wanted / s) + (1 - wanted) * math.log((1 - wanted) / (1 - s))
        assert term.item() == pytest.approx(value, abs=1e-7)
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
        rises = gradient[:, SEEN].sum() < 0  # a step against the gradient raises the seen logits
        assert rises == (s < wanted)
    # a step's own share moves the running mean by a tenth; its gradient is that of the KL at the mean, undiminished
    now = of_share(0.9).requires_grad_()
    term, means = ht_distill.share(now, of_share(0.5), SEEN, [torch.tensor(0.4), torch.tensor(0.3)], 0.48)
    assert [m.item() for m in means] == pytest.approx([0.45, 0.32])
    mean, wanted = 0.45, (0.32 + 0.48) / 2
    (gradient,) = torch.autograd.grad(term, now)
    by_share = (mean - wanted) / (mean * (1 - mean))
    assert gradient[:, SEEN].sum().item() == pytest.approx(by_share * 0.9 * 0.1, abs=1e-6)


def test_terms_are_finite_where_nothing_is_unseen_or_all_is_certain(ht_distill):
    logits = (torch.eye(5)[:, [1, 2, 3, 4, 0]] * 200).requires_grad_()
    for seen in (SEEN, torch.ones(5, dtype=torch.bool)):
        share, _ = ht_distill.share(logits, torch.eye(5) * 200, seen, None, 0.4)
        total = ht_distill.relations(logits, torch.eye(5) * 200, seen) + share
        (gradient,) = torch.autograd.grad(total, logits)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()
    assert ht_distill.relations(logits, torch.eye(5), torch.ones(5, dtype=torch.bool)).item() == 0


def test_cut_mix_takes_every_pixel_from_one_of_two_images(ht_distill):
    images = torch.arange(1.0, 101).view(100, 1, 1, 1).expand(100, 1, 20, 20)
    mixed = ht_distill.cut_mix(images, torch.Generator().manual_seed(0))
    own, other = mixed == images, mixed == images.roll(1, 0)
    assert (own | other).all()
    share = own.float().mean((1, 2, 3))
    assert 0.15 < share.min() < 0.3 and 0.7 < share.max() < 0.85 and 0.45 < share.mean() < 0.55
    upright = (own == own[:, :, :1]).all(3).all(2).all(1)  # every row alike: a cut from side to side
    assert 30 < upright.sum() < 70 and (own == own[:, :, :, :1]).all(3).all(2).all(1)[~upright].all()
    assert ht_distill.cut_mix(images[:0], torch.Generator()).shape == (0, 1, 20, 20)


def test_rank(ht_distill):
    torch.manual_seed(0)
    features = torch.randn(50, 6, dtype=torch.float64)
    correlation = np.corrcoef(features.numpy().T)
    want = np.mean([correlation[i, j] ** 2 for i in range(6) for j in range(6) if i != j])
    assert ht_distill.rank(features).item() == pytest.approx(want, abs=1e-5)
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(50, 1, dtype=torch.float64), features], 1))[0][:, 1:]
    assert ht_distill.rank(orthogonal).item() == pytest.approx(0, abs=1e-9)
    assert ht_distill.rank(features[:, :1].repeat(1, 4)).item() == pytest.approx(1, abs=1e-4)
    dead = torch.relu(features - 100).requires_grad_()
    ht_distill.rank(dead).backward()
    assert torch.isfinite(dead.grad).all(), "features that ReLU has switched off must not give nan"


def test_a_run_logs_the_rank_before_and_after(run_method, read):
    names, folder = run_method("ht_distill", "--name", "ranks")
    _, _, log = read(folder)
    ranks = [line["effective_rank"] for line in log]
    assert len(ranks) == 3 and all(1 < rank < 128 for rank in ranks) and len(set(ranks)) == 3
    images = names["task"].target_train.images
    features = names["models"].predict(names["model"], images, return_features=True)[1].astype(np.float64)
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    share = values[values > 0] / values.sum()
    assert ranks[-1] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


NO_TERM = ("--relations-weight", "0", "--share-weight", "0", "--rank-weight", "0", "--pull", "0")


def test_without_its_terms_it_is_naive_ft(run_method):
    flags = ("--split-seed", "2", "--bn-mode", "train")
    naive = run_method("naive_ft", *flags)[0]["model"].state_dict()
    same = run_method("ht_distill", *flags, *NO_TERM)[0]["model"].state_dict()
    other = run_method("ht_distill", *flags, "--name", "other")[0]["model"].state_dict()
    assert all(torch.equal(naive[key], same[key]) for key in naive)
    assert not all(torch.equal(naive[key], other[key]) for key in naive)


def test_the_papers_method_distils_the_batch_itself(run_method, monkeypatch):
    """With share weight 0 there is no cut image: the relations are those of the labelled images, as published."""
    seen, original = [], F.kl_div

    def kl_div(z, source_z, **how):
        seen.append(z.shape)
        return original(z, source_z, **how)

    monkeypatch.setattr(F, "kl_div", kl_div)
    flags = (
        "--share-weight",
        "0",
        "--relations-weight",
        "1",
        "--rank-weight",
        "0.1",
        "--freeze-head",
        "--name",
        "paper",
    )
    names = run_method("ht_distill", *flags)[0]
    assert set(seen) == {(64, 10), (2,)}, "relations of the batch of 64; the share, whose weight is 0, of two groups"
    before, after = names["source_model"].state_dict(), names["model"].state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"]) and torch.equal(
        before["head.bias"], after["head.bias"]
    )
    assert not torch.equal(before["backbone.0.weight"], after["backbone.0.weight"])


def test_the_share_is_a_running_mean_towards_the_prior(run_method):
    low = run_method("ht_distill", "--seen-prior", "0.1", "--name", "rare")[0]
    high = run_method("ht_distill", "--seen-prior", "0.9", "--name", "often")[0]
    images = low["task"].target_test.images
    import models

    shares = []
    for names in (low, high):
        logits = torch.from_numpy(models.predict(names["model"], images))
        shares.append(torch.as_tensor(logits).softmax(1)[:, names["task"].seen].sum(1).mean().item())
        assert len(names["state"]["shares"]) == 2 and not any(mean.requires_grad for mean in names["state"]["shares"])
    assert shares[0] < shares[1], "who expects seen classes gets them"


def test_each_step_goes_back_to_the_source_by_pull_times_the_backbones_rate(run_method, monkeypatch):
    given, lerp = [], torch._foreach_lerp_

    def noted(weights, ends, share):
        given.append((list(weights), list(ends), share))
        lerp(weights, ends, share)

    monkeypatch.setattr(torch, "_foreach_lerp_", noted)
    names = run_method("ht_distill", "--pull", "3", "--lr", "0.01", "--name", "pulled")[0]
    rate = names["args"].backbone_lr
    want = [3 * rate * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [share for *_, share in given] == pytest.approx(want)
    for part, name in enumerate(("model", "source_model")):
        assert all(a is b for a, b in zip(given[0][part], names[name].parameters(), strict=True))
