"""The mathematics of every method against naive loops, closed forms and limit cases."""

import copy
import importlib
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import data
import models


@pytest.fixture(scope="module", autouse=True)
def methods_can_be_imported():
    sys.path.insert(0, str(ROOT / "methods"))
    yield
    sys.path.remove(str(ROOT / "methods"))


def method(name):
    return importlib.import_module(name)


SEEN = torch.tensor([True, False, True, False, False])


class CountOperations(TorchDispatchMode):
    """How many operations PyTorch dispatches in the block: as many kernels, or more, as a device is asked to start."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def resnet50():
    return models.build("resnet50", 65, (3, 224, 224), "none").to(memory_format=torch.channels_last)


def loop_lumped_kl(logits, source_logits, seen):
    """KL(source || model) over the unseen classes and all seen ones as one, mean over images, by a loop."""
    total = 0.0
    for z, source_z in zip(logits.tolist(), source_logits.tolist(), strict=True):
        groups = [[k] for k in range(len(seen)) if not seen[k]] + [[k for k in range(len(seen)) if seen[k]]]
        p, q = (np.array([np.exp(np.array(v))[group].sum() for group in groups]) for v in (source_z, z))
        p, q = p / p.sum(), q / q.sum()
        total += (p * np.log(p / q)).sum() / len(logits)
    return total


# ---------------------------------------------------------------- masked_ft


def test_restricted_cross_entropy():
    torch.manual_seed(0)
    loss = method("masked_ft").restricted_cross_entropy
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 2, 0, 2, 2, 0])
    assert loss(logits, labels, SEEN, 1.0) == F.cross_entropy(logits, labels)
    only_seen = F.cross_entropy(logits[:, SEEN], torch.tensor([0, 1, 0, 1, 1, 0]))
    assert loss(logits, labels, SEEN, 0.0).item() == pytest.approx(only_seen.item(), abs=1e-12)
    want = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):  # FedRS with alpha 0.3
        scaled = [v if s else 0.3 * v for v, s in zip(z, SEEN.tolist(), strict=True)]
        want += (math.log(sum(map(math.exp, scaled))) - scaled[y]) / 6
    assert loss(logits, labels, SEEN, 0.3).item() == pytest.approx(want, abs=1e-12)


def test_masked_cross_entropy_does_not_touch_the_unseen_rows():
    torch.manual_seed(0)
    head, features = torch.nn.Linear(4, 5), torch.randn(6, 4)
    labels = torch.tensor([0, 2, 0, 2, 2, 0])
    method("masked_ft").restricted_cross_entropy(head(features), labels, SEEN, 0.0).backward()
    assert (head.weight.grad[~SEEN] == 0).all() and (head.bias.grad[~SEEN] == 0).all()
    assert (head.weight.grad[SEEN].abs().sum(1) > 0).all()


# ---------------------------------------------------------------- grad_proj


def flat(lists):
    return [value for values in lists for value in values]


def loop_project(g, p):
    dot = sum(a * b for a, b in zip(g, p, strict=True))
    pp = sum(b * b for b in p)
    return [a - dot / pp * b for a, b in zip(g, p, strict=True)] if dot < 0 else list(g)


def projected(gradients, references, scope):
    """What project makes of the lists of tensors, in their shapes, and the cosine and share that it returns."""
    grad_proj = method("grad_proj")
    (g, g_parts), (p, p_parts) = grad_proj.vector_of(gradients), grad_proj.vector_of(references)
    torch._foreach_copy_(g_parts, gradients)
    torch._foreach_copy_(p_parts, references)
    sizes = [len(g)] if scope == "global" else [x.numel() for x in gradients]
    return g_parts, *grad_proj.project(g, p, sizes)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_projection_against_a_loop(seed, scope):
    torch.manual_seed(seed)
    g, p = ([torch.randn(shape) for shape in ((3, 2), (4,), (2, 2, 2))] for _ in range(2))
    got, cosine, share = projected(g, p, scope)
    flat_g, flat_p = ([x.double().flatten().tolist() for x in xs] for xs in (g, p))
    if scope == "layer":
        want = [v for a, b in zip(flat_g, flat_p, strict=True) for v in loop_project(a, b)]
        conflicts = [np.dot(a, b) < 0 for a, b in zip(flat_g, flat_p, strict=True)]
    else:
        want = loop_project(flat(flat_g), flat(flat_p))
        conflicts = [np.dot(flat(flat_g), flat(flat_p)) < 0]
    assert torch.cat([x.flatten() for x in got]).tolist() == pytest.approx(want, abs=1e-5)
    assert share.item() == pytest.approx(np.mean(conflicts))
    a, b = np.array(flat(flat_g)), np.array(flat(flat_p))
    assert cosine.item() == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)
    dots = [float((x * y).sum()) for x, y in zip(got, p, strict=True)]
    assert min(dots) >= -1e-5 if scope == "layer" else sum(dots) >= -1e-5


def test_references_remember_the_steps_before():
    remember = method("grad_proj").remember
    p = torch.zeros(3)
    remember(p, torch.tensor([1.0, 2.0, 4.0]), 0.5)
    assert p.tolist() == [1, 2, 4]
    remember(p, torch.tensor([3.0, torch.inf, torch.nan]), 0.5)  # what overflowed adds nothing
    assert p.tolist() == [3.5, 1, 2]
    remember(p, torch.tensor([1.0, -torch.inf, -4.0]), 0.5)
    assert p.tolist() == [2.75, 0.5, -3]


def test_parts_of_a_vector_have_the_layout_of_the_parameters():
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameters = [*conv.parameters(), *torch.nn.Linear(2, 5).parameters()]
    vector, parts = method("grad_proj").vector_of(parameters)
    torch._foreach_copy_(parts, [w.detach() for w in parameters])
    for part, w in zip(parts, parameters, strict=True):
        assert torch.equal(part, w) and part.stride() == w.stride()
    assert vector.sum().item() == pytest.approx(sum(w.sum().item() for w in parameters), abs=1e-5)
    assert len(vector) == 108 + 4 + 10 + 5


def test_projection_in_float32_and_without_a_reference():
    half, _, _ = projected([torch.ones(3, dtype=torch.bfloat16)], [-torch.ones(3, dtype=torch.bfloat16)], "global")
    assert half[0].dtype == torch.float32 and half[0].abs().max() == 0
    same, cosine, share = projected([torch.ones(3)], [torch.zeros(3)], "global")
    assert torch.equal(same[0], torch.ones(3)) and cosine == 0 and share == 0


@pytest.mark.parametrize("overflow", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_gradient_that_overflowed_has_a_finite_cosine_and_still_stops_the_scaler(scope, overflow):
    gradients, references = [torch.tensor([1.0, overflow]), torch.ones(3)], [torch.ones(2), -torch.ones(3)]
    got, cosine, share = projected(gradients, references, scope)
    assert cosine == 0 and torch.isfinite(share), "one step that is skipped must not spoil an epoch's mean"
    assert not got[0].isfinite().all(), "the GradScaler looks here, and skips the step"


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_projection_takes_few_operations(scope, resnet50):
    """Not several for each of ResNet-50's 161 parameters: a GPU would wait for their starts."""
    grad_proj, parameters = method("grad_proj"), list(resnet50.parameters())
    (g, g_parts), (fresh, fresh_parts) = grad_proj.vector_of(parameters), grad_proj.vector_of(parameters)
    p, gradients = torch.ones_like(g), [torch.randn_like(w) for w in parameters]
    sizes = [len(g)] if scope == "global" else [w.numel() for w in parameters]
    with CountOperations() as operations:
        torch._foreach_copy_(g_parts, gradients)
        torch._foreach_copy_(fresh_parts, gradients)
        grad_proj.remember(p, fresh, 0.5)
        grad_proj.project(g, p, sizes)
    assert len(parameters) == 161 and operations.count <= (50 if scope == "global" else 250)


@pytest.mark.parametrize("reference", ["lumped", "gap"])
def test_preservation_is_zero_at_the_source_and_feels_the_unseen_sink(reference):
    torch.manual_seed(0)
    logits = torch.randn(6, 5)
    preservation = method("grad_proj").preservation
    assert preservation(logits, logits, SEEN, reference).item() == pytest.approx(0, abs=1e-6)
    sunk = (logits - 1.0 * ~SEEN).requires_grad_()
    kept = preservation(sunk, logits, SEEN, reference)
    kept.backward()
    assert kept > 0.01 and (sunk.grad.sum(0)[~SEEN] < 0).all(), "raising the unseen logits lowers it"
    if reference == "lumped":
        assert kept.item() == pytest.approx(loop_lumped_kl(sunk.detach(), logits, SEEN), abs=1e-6)
    else:
        gap, source_gap = (z[:, SEEN].mean() - z[:, ~SEEN].mean() for z in (sunk, logits))
        assert kept.item() == pytest.approx((gap - source_gap).square().item(), abs=1e-6)
    nothing = preservation(sunk, logits, SEEN | True, reference)
    (gradient,) = torch.autograd.grad(nothing, sunk)
    assert nothing == 0 and (gradient == 0).all()


# ---------------------------------------------------------------- l2_sp


@pytest.mark.parametrize("name", ["l2_sp", "lp_ft"])
def test_pull_is_the_gradient_of_its_penalty(name):
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(4)]
    w = [(tensor + torch.randn_like(tensor)).requires_grad_() for tensor in start]
    loss = sum((tensor**3).sum() for tensor in w)
    penalty = 0.7 / 2 * sum(((a - b) ** 2).sum() for a, b in zip(w, start, strict=True))
    want = torch.autograd.grad(loss + penalty, w)
    loss = sum((tensor**3).sum() for tensor in w)
    loss.backward()
    method(name).pull_to(start, w, 0.7)
    for tensor, gradient in zip(w, want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("name", ["l2_sp", "lp_ft"])
def test_a_pull_takes_few_operations(name, resnet50):
    parameters, start = list(resnet50.parameters()), [w.detach() + 1 for w in resnet50.parameters()]
    for w in parameters:
        w.grad = torch.zeros_like(w)
    with CountOperations() as operations:
        method(name).pull_to(iter(start), iter(parameters), 0.5)
    assert operations.count <= 10
    for w, w0 in zip(parameters, start, strict=True):
        assert torch.equal(w.grad, 0.5 * (w.detach() - w0))
    resnet50.zero_grad()


def test_an_update_and_the_flagships_terms_take_few_operations(resnet50):
    """Two groups of parameters, as every script has, of which CUDA makes lists; none for each parameter."""
    rates = [{"params": resnet50.backbone.parameters(), "lr": 0.1}, {"params": resnet50.head.parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(rates, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True)
    for _ in range(2):  # the first makes the momentum
        for w in resnet50.parameters():
            w.grad = torch.ones_like(w)
        with CountOperations() as update:
            torch.nn.utils.clip_grad_norm_(resnet50.parameters(), 5.0, foreach=True)
            optimizer.step()
    ht_distill, seen = method("ht_distill"), torch.arange(65) < 30
    logits, source_logits = torch.randn(2, 16, 65)
    with CountOperations() as terms:
        ht_distill.relations(logits, source_logits, seen)
        ht_distill.share(logits, source_logits, seen, None, 0.5)
        ht_distill.rank(torch.randn(64, 2048))
    assert update.count + terms.count < len(list(resnet50.parameters())), (update.count, terms.count)
    resnet50.zero_grad()


# ---------------------------------------------------------------- lolsgd


def test_drawn_classes():
    draw = method("lolsgd").draw_classes
    seen = torch.arange(20) % 2 == 0
    drawn = [draw(seen, 0.4, torch.Generator().manual_seed(i)) for i in range(20)]
    assert all(int(kept.sum()) == 6 and not (kept & ~seen).any() for kept in drawn)
    assert len({tuple(kept.tolist()) for kept in drawn}) > 10
    assert torch.equal(draw(seen, 0.0, torch.Generator()), seen)
    assert draw(seen, 1.0, torch.Generator()).sum() == 2


def test_average_of_the_copies_against_a_loop():
    """Copies that take known steps end in their mean, BatchNorm buffers too, and each starts where the round began."""
    layer = torch.nn.BatchNorm1d(2)
    weights = [tensor for tensor in layer.state_dict().values() if tensor.is_floating_point()]
    end_copy, end_round = method("lolsgd").end_copy, method("lolsgd").end_round
    want_weight, want_mean = 1.0, 0.0
    for _ in range(2):
        start, moved, steps = [tensor.clone() for tensor in weights], [], [2.0, 4.0, 6.0]
        for step in steps:
            assert layer.weight.tolist() == pytest.approx([want_weight] * 2), "a copy starts where the round began"
            with torch.no_grad():
                layer.weight += step
                layer.running_mean += 0.1 * step
            moved.append(end_copy(weights, start))
        spread = end_round(weights, moved)
        want_weight += np.mean(steps)
        want_mean += 0.1 * np.mean(steps)
        assert layer.weight.tolist() == pytest.approx([want_weight] * 2)
        assert layer.running_mean.tolist() == pytest.approx([want_mean] * 2)
        assert spread.item() == pytest.approx(np.std(steps) / np.mean(steps), rel=1e-4)


def test_a_copy_trains_on_its_own_classes(run_method, monkeypatch):
    """Each copy is given the same classes at all its steps, a share of the seen ones, and copies differ."""
    given, original = [], data.Batches.__call__

    def call(self, step, classes=None):
        images, labels = original(self, step, classes)
        if classes is not None:
            assert classes[labels].all()
            given.append((step, tuple(classes.tolist())))
        return images, labels

    monkeypatch.setattr(data.Batches, "__call__", call)
    names = run_method("lolsgd", "--tau", "2", "--steps-per-epoch", "8", "--left-out", "0.6", "--name", "own")[0]
    assert [step for step, _ in given] == list(range(16))
    assert all(given[step][1] == given[step + 1][1] for step in range(0, 16, 2)), "the two steps of a copy"
    assert all(sum(kept) == 2 and not (torch.tensor(kept) & ~names["task"].seen).any() for _, kept in given)
    assert len({kept for _, kept in given}) > 2


def test_lolsgd_with_the_papers_other_terms(run_method, read):
    """The functions are ht_distill's to the letter; the head stays, and the terms change what is trained."""
    texts = [(ROOT / "methods" / f"{name}.py").read_text() for name in ("ht_distill", "lolsgd")]
    for name in ("relations", "rank"):
        bodies = [text[text.index(f"def {name}(") :].partition("\n\n\n")[0] for text in texts]
        assert bodies[0] == bodies[1]
    terms = ("--relations-weight", "1", "--rank-weight", "0.1", "--freeze-head")
    names, folder = run_method("lolsgd", "--tau", "1", *terms, "--name", "lolsgd with terms")
    _, alone = run_method("lolsgd", "--tau", "1", "--freeze-head", "--name", "lolsgd with its head")
    assert torch.equal(names["model"].head.weight, names["source_model"].head.weight)
    assert not np.array_equal(read(folder)[1]["test_logits"], read(alone)[1]["test_logits"])


def test_one_copy_with_all_classes_is_sgd_that_forgets_its_momentum(run_method):
    flags = ("--copies", "1", "--left-out", "0", "--tau", "2", "--steps-per-epoch", "4", "--name", "one")
    names = run_method("lolsgd", *flags)[0]
    args, source, task = names["args"], names["source_model"], names["task"]
    model = copy.deepcopy(source)
    batches = task.target_train.batches(args.batch_size, "cpu", args.seed)
    for step in range(8):
        if step % 2 == 0:
            optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / 8))
        images, labels = batches(step, task.seen)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
    for got, want in zip(names["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ce, untouched", [("all", "none"), ("seen", "unseen"), ("subset", "unseen")])
def test_only_masked_cross_entropy_leaves_the_unseen_rows_alone(run_method, ce, untouched):
    """The paper's, over all C logits, is the default."""
    flags = () if ce == "all" else ("--ce", ce)
    flags += ("--weight-decay", "0", "--steps-per-epoch", "10", "--name", f"rows of {ce}")
    names = run_method("lolsgd", *flags)[0]
    seen = names["task"].seen
    before, after = (names[model].head.weight for model in ("source_model", "model"))
    moved = (before != after).any(1)
    assert names["args"].ce == ce and moved[seen].all()
    assert moved[~seen].all() if untouched == "none" else not moved[~seen].any()


@pytest.mark.parametrize("steps, taken", [(3, 20), (15, 20), (32, 60)])
def test_the_cosine_ends_with_the_last_round(run_method, monkeypatch, steps, taken):
    """Rounds are whole and there is one at least; no step is past the end, where a cosine would rise again."""
    rates, step = [], torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        rates.append(self.param_groups[1]["lr"])  # the head's
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    names = run_method("lolsgd", "--steps-per-epoch", str(steps), "--name", f"cosine {steps}")[0]
    want = [names["args"].lr * 0.5 * (1 + math.cos(math.pi * i / taken)) for i in range(taken)]
    assert names["run"].steps == taken and rates[-taken:] == pytest.approx(want, abs=1e-9)
    assert names["scheduler"].get_last_lr() == pytest.approx([0, 0], abs=1e-9)


# ---------------------------------------------------------------- the others


def test_frozen_head_is_bit_equal(run_method):
    names = run_method("frozen_classifier", "--name", "frozen")[0]
    before, after = names["source_model"].state_dict(), names["model"].state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"]) and torch.equal(
        before["head.bias"], after["head.bias"]
    )
    assert not torch.equal(before["backbone.0.weight"], after["backbone.0.weight"])


@pytest.mark.parametrize("mode", ["affine", "stats", "pool"])
def test_bn_adapt_changes_batchnorm_only(run_method, mode):
    names = run_method("bn_adapt", "--mode", mode, "--name", mode)[0]
    before, after = names["source_model"].state_dict(), names["model"].state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    layers = {name for name, layer in names["model"].named_modules() if layer in names["layers"]}
    parts = ("weight", "bias") if mode == "affine" else ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{part}" for layer in layers for part in parts}


def test_a_batch_of_the_pool_may_exceed_the_labelled_images(run_method):
    names = run_method("bn_adapt", "--mode", "pool", "--name", "large", "--batch-size", "220")[0]
    assert len(names["task"].target_train.labels) < 220 <= len(names["task"].target_unlabelled.labels)
    assert names["images"].shape[0] == 220


@pytest.mark.parametrize("mode", ["stats", "pool"])
def test_bn_stats_are_the_mean_over_the_batches(mode, run_method):
    names = run_method("bn_adapt", "--mode", mode, "--name", f"{mode}_mean")[0]
    task, split = names["task"], names["batches"].split
    assert split is (task.target_train if mode == "stats" else task.target_unlabelled)
    epoch = [names["batches"](step)[0] for step in range(3, 6)]  # the last epoch: every epoch starts anew
    first = names["source_model"].backbone[0]
    outputs = [first((images - 0.5) / 0.5) for images in epoch]
    want = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(names["model"].backbone[1].running_mean, want, atol=1e-4, rtol=1e-4)


def test_bn_stats_are_those_of_the_network_that_is_evaluated(run_method, tmp_path, monkeypatch):
    def dropping(channels, side):
        network, features = small_cnn(channels, side)
        return torch.nn.Sequential(torch.nn.Dropout(0.5), *network), features

    small_cnn = models.SMALL["small_cnn"]
    monkeypatch.setitem(models.SMALL, "small_cnn", dropping)
    names = run_method("bn_adapt", "--mode", "stats", "--source-steps", "1", runs=tmp_path)[0]
    first = names["source_model"].backbone[1]
    epoch = [names["batches"](step)[0] for step in range(3, 6)]
    want = torch.stack([first((images - 0.5) / 0.5).mean((0, 2, 3)) for images in epoch]).mean(0)
    torch.testing.assert_close(names["model"].backbone[2].running_mean, want, atol=1e-4, rtol=1e-4)


def test_bn_adapt_needs_batchnorm(run_method, capsys, monkeypatch):
    import models

    monkeypatch.setattr(models, "source_model", lambda *args: pytest.fail("trained one first"))
    with pytest.raises(SystemExit) as stop:
        run_method("bn_adapt", "--arch", "lenet", "--name", "lenet")
    assert stop.value.code == 2 and "--arch lenet: has no BatchNorm" in capsys.readouterr().err


def test_bn_stats_have_nothing_to_compile(run_method, capsys):
    with pytest.raises(SystemExit) as stop:
        run_method("bn_adapt", "--mode", "stats", "--compile", "--name", "compiled")
    assert stop.value.code == 2 and "--compile: --mode stats has no training step" in capsys.readouterr().err


def test_fit_head_finds_the_separating_head():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = F.one_hot(labels, 4).float() + 0.1 * torch.randn(300, 4)
    head = torch.nn.Linear(4, 3)
    method("lp_ft").fit_head(head, features, labels, 200, 64, 0.5, 0.0, torch.Generator().manual_seed(0))
    assert (head(features).argmax(1) == labels).all()


def test_lp_ft_starts_from_the_probed_head(run_method):
    names = run_method("lp_ft", "--lr", "0", "--backbone-lr", "0", "--name", "still")[0]
    assert torch.equal(names["model"].head.weight, names["source_model"].head.weight), "no rate, no probe"
    names = run_method("lp_ft", "--ft-lr-scale", "0", "--name", "probe only")[0]
    before, after = names["source_model"].state_dict(), names["model"].state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"head.weight", "head.bias"}
    assert names["probe"] > names["run"].lines[0]["train_accuracy"]


def test_lp_ft_with_a_pull_and_no_probe_is_l2_sp(run_method):
    flags = ("--probe-steps", "0", "--ft-lr-scale", "1", "--weight-decay", "0")
    pulled = run_method("lp_ft", *flags, "--pull", "0.7", "--name", "no probe")[0]
    l2_sp = run_method("l2_sp", "--pull", "0.7", "--name", "the pull alone")[0]
    free = run_method("lp_ft", *flags, "--name", "neither")[0]["model"].head.weight
    states = [names["model"].state_dict() for names in (pulled, l2_sp)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    assert not torch.equal(free, states[1]["head.weight"]), "by default nothing pulls"


@pytest.mark.parametrize("mode", ["weights", "logits"])
def test_wise_ft_ends_are_the_two_models(run_method, read, mode):
    for mixing, share in (("0", 0.0), ("1", 1.0)):
        flags = ("--mixing", mixing, "--mode", mode, "--bn-mode", "train", "--name", f"wise-{mode}-{mixing}")
        _, folder = run_method("wise_ft", *flags)
        _, arrays, log = read(folder)
        curve = log[-1]["curve"]
        assert [point["mixing"] for point in curve] == [i / 10 for i in range(11)]
        assert curve[0]["overall"] == log[0]["overall"] and curve[-1]["overall"] == log[-2]["overall"]
        assert log[-1]["overall"] == curve[round(10 * share)]["overall"]
        assert (folder / "model.pt").exists() == (mode == "weights"), "two models are not one"
        if share == 0:
            np.testing.assert_allclose(arrays["test_logits"], arrays["source_test_logits"], atol=1e-5)


def test_interpolation_and_its_batchnorm_statistics():
    torch.manual_seed(0)
    a, b = (models.build("small_cnn", 5, (1, 28, 28)).eval() for _ in range(2))
    b.backbone[1].running_mean += 1
    wise = method("wise_ft")
    middle = wise.interpolate(a, b, 0.3)
    for x, y, z in zip(a.parameters(), b.parameters(), middle.parameters(), strict=True):
        torch.testing.assert_close(z, 0.7 * x + 0.3 * y)
    torch.testing.assert_close(middle.backbone[1].running_mean, torch.full((16,), 0.3))

    class TwoBatches:
        images = torch.rand(2, 8, 1, 28, 28)

        def __len__(self):
            return 2

        def __call__(self, step):
            return self.images[step], None

    wise.reestimate(middle, models.batchnorms(middle), TwoBatches())
    outputs = middle.backbone[0]((TwoBatches.images.flatten(0, 1) - 0.5) / 0.5)
    torch.testing.assert_close(middle.backbone[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not middle.training and not middle.backbone[1].training
    assert middle.backbone[1].momentum == 1 / 2, "None would give the same, but wait for the device in every layer"
    for share, end in ((0.0, a), (1.0, b)):
        kept = wise.interpolate(a, b, share).state_dict()
        assert all(torch.equal(kept[key], value) for key, value in end.state_dict().items())


def test_statistics_are_re_estimated_between_the_ends_only(run_method, read):
    flags = ("--bn-mode", "train", "--name")
    plain = read(run_method("wise_ft", *flags, "plain")[1])[2][-1]["curve"]
    again = read(run_method("wise_ft", "--reestimate-bn", *flags, "again")[1])[2][-1]["curve"]
    assert [one == other for one, other in zip(plain, again, strict=True)] == [True] + [False] * 9 + [True]
