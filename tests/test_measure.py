"""results/speed: the arithmetic of measure.py, and the plain loop that it compares with."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from files import InputError

sys.path.insert(1, str(ROOT / "results" / "speed"))
import measure

import limits


def test_rows_are_medians_of_ratios_by_round():
    row = measure.row_of("x", [2.0, 9.0, 3.0], [1.0, 3.0, 6.0])
    assert row == {"what": "x", "ours": 3, "plain loop": 3, "ratio": 2, "least": 0.5, "largest": 3}
    row = measure.row_of("x", [2.0, 9.0, 3.0], [1.0, 3.0, 6.0], invert=True)
    assert (row["ratio"], row["least"], row["largest"]) == (0.5, pytest.approx(1 / 3), 2)
    assert measure.row_of("x", np.array([5.0, 5.0])) == {
        "what": "x", "ours": 5, "plain loop": None, "ratio": None, "least": None, "largest": None
    }  # fmt: skip


def test_traffic_is_every_tensor_in_and_out_once():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    with limits.Traffic() as traffic:
        product = a @ b
    assert traffic.bytes == 4 * (15 + 35 + 21)
    with limits.Traffic() as traffic:
        product.T.view(-1, 3)  # views move nothing
    assert traffic.bytes == 0
    with limits.Traffic() as traffic:
        product.mul_(product)  # one tensor, though three times
    assert traffic.bytes == 4 * 21


def test_peak_memory_is_of_the_steps_alone(monkeypatch):
    """With an allocator that stands in for the device's: 1.35 GB were there before, a step takes 5 MB."""
    peak = [1.35e9]

    def update(batch):
        peak[0] = max(peak[0], 5e6)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0.0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    reading, whole, memory = limits.step_figures(torch.device("cuda"), lambda step: (step,), update, 3)
    assert memory == 5 and len(reading) == len(whole) == 3 and (whole > reading).all()
    assert limits.step_figures(torch.device("cpu"), lambda step: (step,), update, 3)[2] is None


def test_the_limits_of_this_device(tmp_path):
    measure.draw_photos(tmp_path, 20, side=40)
    figures = limits.device_limits("resnet18", tmp_path, "cpu", 4, 2)
    assert len(figures) == 3 and all(len(values) == 2 and min(values) > 0 for values in figures.values())


def test_steps_are_as_many_as_the_device_needs():
    for device, steps in (("cpu", (60, 6)), ("cuda", (1000, 100))):
        options = measure.with_steps(measure.Speed(device=device))
        assert (options.steps, options.photo_steps) == steps
        options = measure.with_steps(measure.Speed(device=device, steps=5, photo_steps=2))
        assert (options.steps, options.photo_steps) == (5, 2)


def test_a_command_is_timed_and_its_failure_told():
    program = "import time; print('a'); x = b'x' * 200_000_000; print(len(x)); time.sleep(0.2)"
    lines, seconds, memory = measure.timed(["-c", program])
    assert lines == ["a", "200000000"] and 0 < seconds < 60 and 200 < memory < 400
    with pytest.raises(InputError, match=r"-c .*boom.*: .*boom"):
        measure.timed(["-c", "raise SystemExit('boom')"])


@pytest.mark.parametrize("augmentation, arch", [("photo", "resnet18"), ("ink", "small_cnn")])
def test_the_plain_loop_trains_and_evaluates(augmentation, arch, tmp_path, monkeypatch, capsys):
    measure.draw_photos(tmp_path, 20, side=28, classes=2)
    argv = ["plain_loop.py", tmp_path / "b/train", tmp_path / "b/test", "--arch", arch, "--classes", 2, "--workers", 0]
    argv += ["--image-size", 28, "--batch-size", 8, "--steps-per-epoch", 5, "--augmentation", augmentation]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    runpy.run_path(str(ROOT / "results" / "speed" / "plain_loop.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2] and all(line["test_images"] == 10 for line in lines)
    assert lines[2]["train_images"] == 40 and lines[2]["train_seconds"] > 0
    assert 0 <= lines[2]["test"] <= 100


def test_photographs_are_drawn_in_the_layout_of_folder(tmp_path):
    measure.draw_photos(tmp_path, 20, side=60, classes=2)
    names = {str(path.relative_to(tmp_path).parent): 0 for path in tmp_path.rglob("*.jpg")}
    assert set(names) == {f"{part}/class{c}" for part in ("a/train", "a/test", "b/train", "b/test") for c in (0, 1)}
    assert len(list((tmp_path / "b/train").rglob("*.jpg"))) == 20
    assert len(list((tmp_path / "b/test").rglob("*.jpg"))) == 10


def test_digits_are_written_as_the_plain_loop_takes_them(tmp_path):
    task = data.load_task(data.TaskArgs("digits"))
    for split in (task.target_train, task.target_test):
        split.images, split.labels = split.images[:20], split.labels[:20]
    measure.draw_digits(task, tmp_path)
    for part, split in (("train", task.target_train), ("test", task.target_test)):
        paths = sorted((tmp_path / part).rglob("*.png"), key=lambda path: path.name)
        assert [path.parent.name for path in paths] == [task.classes[label] for label in split.labels]
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
        assert np.array_equal(pixels, split.images[:, 0].numpy())
