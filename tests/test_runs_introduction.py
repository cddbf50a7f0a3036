"""What a run says before it trains, and while it does."""

import io
import re
import sys

import numpy as np
import pytest
import replicas

import runs

FLAGS = ("--image-size", "16", "--arch", "small_cnn")


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    replicas.office_home(root)
    return str(root)


def test_first_lines(run_method, capsys):
    _, folder = run_method("naive_ft", "--name", "introduced", "--seen-classes", "2", "--lr", "0.1")
    lines = capsys.readouterr().out.partition("\nepoch ")[0].splitlines()[-5:]
    assert lines[0].startswith("10 classes, 2 seen: ") and lines[0].count(", ") == 1 + 1 + 7
    assert lines[1].startswith("images of optdigits: ") and lines[1].endswith(" to test on")
    assert lines[2:] == [
        "small_cnn in float32 on cpu",
        "2 x 3 steps of 64 images, --lr 0.1, --backbone-lr 0.005",
        str(folder),
    ]


def test_many_names_are_shortened():
    names = [f"class{i}" for i in range(30)]
    assert runs.shortened(names[:8]) == ", ".join(names[:8])
    assert runs.shortened(names, 3) == "class0, class1, class2 and 27 more"


def test_a_batch_shrinks_to_the_images_and_says_so(office, run_method, read, capsys):
    flags = ("--dataset", "office_home", "--target", "Real_World", "--data-root", office, *FLAGS)
    _, folder = run_method("naive_ft", *flags, "--seen-classes", "3", "--name", "shrunk")
    shown = capsys.readouterr().out.partition("\nepoch ")[0]
    assert "a batch has all 21 images, not the recipe's 64" in shown
    assert read(folder)[0]["args"]["batch_size"] == 21
    with pytest.raises(SystemExit):
        run_method("naive_ft", *flags, "--seen-classes", "3", "--batch-size", "64", "--name", "as told")
    assert "--batch-size 64: the training set has 21 images" in capsys.readouterr().err


def logits_of(predicted, classes=12):
    return np.eye(classes)[predicted]


@pytest.mark.parametrize("given", [True, False])
def test_a_weak_teacher(given):
    labels = np.repeat(np.arange(5), 20)
    rng = np.random.default_rng(0)
    assert runs.hints(logits_of(labels), labels, given) == []
    half = np.where(rng.random(100) < 0.5, labels, rng.integers(0, 12, 100))
    assert runs.hints(logits_of(half), labels, given) == []
    (line,) = runs.hints(logits_of(rng.integers(0, 12, 100)), labels, given)
    assert line.startswith("a weak teacher, the source model is right on ")
    assert ("--classes" in line) == given and ("--source-steps" in line) != given
    (line,) = runs.hints(logits_of(np.full(100, 7)), labels, given)
    assert "a weak teacher" in line, "one answer for all is no other order"


def test_another_order_of_the_classes():
    rng, order = np.random.default_rng(0), [str(i) for i in range(12)]
    labels = np.repeat([0, 3, 4, 10, 11], 20)
    predicted = np.where(rng.random(100) < 0.8, labels, rng.integers(0, 12, 100))
    alphabetical = np.array([sorted(order).index(name) for name in order])  # 0, 1, 10, 11, 2, ...
    for shuffled in (alphabetical[predicted], rng.permutation(12)[predicted], (predicted + 1) % 12):
        (line,) = runs.hints(logits_of(shuffled), labels, True)
        assert f"in another order on {np.mean(predicted == labels):.0%}: check the order of --classes" in line
        assert "another order" not in "".join(runs.hints(logits_of(shuffled), labels, False)), "of a model of ours"
    two = np.repeat([0, 1], 50)
    assert "a weak teacher" in runs.hints(logits_of(np.full(100, 5)), two, True)[0]


def test_a_bar_within_an_epoch_on_a_terminal(run_method, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    run_method("naive_ft", "--name", "bar")
    assert re.search(r"\d/6 \[", screen.getvalue()), "2 epochs of 3 steps"
