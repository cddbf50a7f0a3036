"""Damaged files and wrong command lines: each is named in one line, or shown to be harmless."""

import functools
import io
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import task_flags

import data
import eval as evaluation
import models
import runs as runs_module
from files import InputError

whole_task = data.load_task


def small_task(args):
    """Read once for the same flags, with a quarter of the images and five steps of source training."""
    return cached_small_task(task_flags(args))


@functools.cache
def cached_small_task(flags):
    task = whole_task(flags)
    for split in (task.target_train, task.target_test):
        split.images, split.labels = split.images[::4], split.labels[::4]
    task.source_recipe = {**task.source_recipe, "steps": 5}
    task.source_train.images, task.source_train.labels = task.source_train.images[::4], task.source_train.labels[::4]
    return task


# ---------------------------------------------------------------- damaged files


def damaged(whole, others, rng):
    """The bytes `whole`, truncated, with bits flipped, with a block of zeros or noise, or another file's."""
    kind = rng.choice(["truncated", "flipped", "flipped", "flipped", "zeros", "noise", "swapped"])
    bad, start = bytearray(whole), rng.randrange(len(whole))
    if kind == "truncated":
        bad = bad[:start]
    elif kind == "flipped":
        for _ in range(rng.choice([1, 1, 2, 8])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif kind in ("zeros", "noise"):
        block = bad[start : start + rng.choice([1, 16, 512])]
        bad[start : start + len(block)] = bytes(len(block)) if kind == "zeros" else rng.randbytes(len(block))
    else:
        bad = rng.choice(others)
    return bytes(bad)


def numbers(folder):
    """All that a finished run says, but for the times."""
    with np.load(folder / "logits.npz") as file:
        arrays = {name: file[name].tolist() for name in file.files}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    done = json.loads((folder / "done.json").read_text())
    del done["args"]["runs_dir"], done["command"]
    for times in (*lines, done):
        times["seconds"] = times["images_per_second"] = times["test_images_per_second"] = 0
    return arrays, lines, done


@pytest.fixture
def runs(run_method, monkeypatch, tmp_path, tmp_path_factory):
    """A folder with a run that was stopped in its second epoch, a finished one, and their source model; made once."""
    monkeypatch.setattr(data, "load_task", small_task)
    if not MADE:
        MADE.extend(make_runs(run_method, monkeypatch, tmp_path_factory.mktemp("made")))
    shutil.copytree(MADE[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "digits" / "mnist-optdigits", MADE[1]


MADE = []


def make_runs(run_method, monkeypatch, tmp_path):
    run_method("naive_ft", "--name", "finished", "--no-save-model", runs=tmp_path)
    run_method("naive_ft", "--name", "stopped", "--no-save-model", runs=tmp_path)
    folder = tmp_path / "digits" / "mnist-optdigits"
    assert not list(tmp_path.rglob("model.pt"))
    want = numbers(folder / "stopped" / "split0-seed0")
    shutil.rmtree(folder / "stopped")
    step = runs_module.Run.step

    def stopping(run, *args, **kwargs):
        if run.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(run, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs_module.Run, "step", stopping)
        run_method("naive_ft", "--name", "stopped", "--no-save-model", runs=tmp_path)
    return tmp_path, want


FILES = {"stopped": ["args.json", "log.jsonl", "checkpoint.pt"], "finished": ["args.json", "logits.npz", "done.json"]}


@pytest.mark.parametrize("name, file", [(name, file) for name, files in FILES.items() for file in files])
def test_damaged_files_of_a_run(name, file, runs, run_method, capsys, tmp_path):
    folder, want = runs[0] / name / "split0-seed0", runs[1]
    want = want if name == "stopped" else numbers(folder)
    shown = runs_module.result_table(evaluation.read_run(runs[0] / "finished" / "split0-seed0"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng, named = random.Random(f"{name} {file}"), 0
    others = [content for other, content in files.items() if other != file]
    if file == "logits.npz":  # another run's, whole and without a fault of its own
        with np.load(folder / file) as arrays, io.BytesIO() as stream:
            rolled = {name: np.roll(array, 1, 0) if "logits" in name else array for name, array in arrays.items()}
            np.savez(stream, **rolled)
            others = [stream.getvalue()]
    for case in range(30 if file != "log.jsonl" else 4):
        bad = damaged(files[file], others, rng)
        shutil.rmtree(folder)
        folder.mkdir()
        for other, content in files.items():
            (folder / other).write_bytes(bad if other == file else content)
        capsys.readouterr()
        try:
            run_method("naive_ft", "--name", name, "--no-save-model", runs=tmp_path)
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if code:
            assert code == 2 and err.startswith("error: ") and str(folder) in err and err.count("\n") == 1, (case, err)
            assert "--overwrite" in err, err
            named += 1
        elif name == "finished":
            assert shown in out, (case, bad)
        else:
            assert numbers(folder) == want, (case, bad)
    assert named == 0 if file == "log.jsonl" else named > 15, "the log is written anew; other damage is mostly found"


@pytest.mark.parametrize("kind", ["cache", "--source-checkpoint"])
def test_damaged_source_models(kind, tmp_path):
    task = small_task(data.TaskArgs("digits"))
    source = models.source_model(task, "small_cnn", cache=tmp_path).state_dict()
    path = next((tmp_path / "source_models").glob("*.pt"))
    where = {"cache": tmp_path} if kind == "cache" else {"checkpoint": str(path)}
    whole, rng, named = path.read_bytes(), random.Random(kind), 0
    other = io.BytesIO()
    torch.save({"model": {name: 0 * w for name, w in source.items()}, "classes": task.classes[::-1]}, other)
    for case in range(54):
        path.write_bytes(damaged(whole, [b"", b"{}", other.getvalue()], rng))
        try:
            got = models.source_model(task, "small_cnn", **where).state_dict()
            assert all(torch.equal(got[name], source[name]) for name in source), case
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            named += 1
    assert named > 25


def test_a_source_model_of_another_recipe_or_with_nan(tmp_path):
    task = small_task(data.TaskArgs("digits"))
    for seed in (0, 1):
        models.source_model(task, "small_cnn", cache=tmp_path, seed=seed)
    one, other = (tmp_path / "source_models").glob("*.pt")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"\.pt: not the source model that was put there; delete it"):
            models.source_model(task, "small_cnn", cache=tmp_path, seed=seed)
    saved = torch.load(one, weights_only=True)
    saved["model"]["head.weight"][0, 0] = torch.nan
    torch.save(saved, one)
    with pytest.raises(InputError, match=r"\.pt: does not fit the model; not finite: head.weight"):
        models.source_model(task, "small_cnn", checkpoint=str(one))


def test_damaged_lists_of_seen_classes(tmp_path):
    path, classes, rng, named = tmp_path / "seen.txt", [str(digit) for digit in range(10)], random.Random(0), 0
    for _ in range(54):
        bad = damaged(b"0\n3\n4\n8\n9\n", [b"0,1,2", bytes(range(256)), b"zero\none\n"], rng)
        path.write_bytes(bad)
        try:
            seen = data.choose_seen(str(path), classes, np.ones(10, bool), 0)
            lines = bad.decode().split("\n")  # a flipped digit is another valid list
            assert seen.tolist() == [name in map(str.strip, lines) for name in classes], bad
        except InputError as error:
            assert f"--seen-classes {path}" in str(error) and "\n" not in str(error)
            named += 1
    assert named > 25


# ---------------------------------------------------------------- wrong command lines


def wrong():
    """(method, flags, the flag that the message must name)"""
    for flag in ("epochs", "steps-per-epoch", "batch-size", "source-steps", "source-batch-size"):
        for value in ("0", "-1", "1.5", "many", "nan", ""):
            yield "naive_ft", [f"--{flag}", value], flag
    for flag in ("seed", "split-seed", "source-seed"):
        for value in ("-1", str(2**63), "1.5", "one"):
            yield "lp_ft", [f"--{flag}", value], flag
    for own in (["-1"], ["x"], ["0", "--oracle"], ["0", "--seen-classes", "1"]):
        yield "lp_ft", ["--pseudo-split", *own], "pseudo-split"
    for flag in ("lr", "backbone-lr", "weight-decay", "checkpoint-every", "source-lr", "source-backbone-lr"):
        for value in ("-0.1", "nan", "inf", "1e39", "fast"):
            yield "frozen_classifier", [f"--{flag}", value], flag
    for value in ("0", "-1", "nan", "inf", "tight"):
        yield "naive_ft", ["--clip-grad", value], "clip-grad"
    own = {
        "lolsgd": {
            "copies": ("0", "-1", "2.5"),
            "tau": ("0", "x"),
            "left-out": ("1.5", "-0.1", "nan"),
            "ce": ("no",),
            "rank-weight": ("-1",),
        }
    }
    own |= {
        "ht_distill": {
            "relations-weight": ("-1", "inf"),
            "share-weight": ("-1", "nan"),
            "rank-weight": ("-1", "nan"),
            "pull": ("-1", "inf"),
            "seen-prior": ("-0.1", "1.5", "nan"),
        }
    }
    own |= {"wise_ft": {"mixing": ("2", "-0.1", "nan"), "mode": ("mean",)}, "l2_sp": {"pull": ("-1", "inf", "nan")}}
    own |= {"lp_ft": {"probe-steps": ("-1", "0.5"), "ft-lr-scale": ("-1", "nan"), "pull": ("-1", "inf")}}
    own |= {
        "masked_ft": {"alpha": ("-1", "x")},
        "grad_proj": {"reference": ("x",), "scope": ("x",), "memory": ("1.1", "-0.1")},
        "bn_adapt": {"mode": ("x",), "bn-mode": ("on",), "unlabelled": (".",)},
        "infomax": {
            "infomax-weight": ("-1", "inf"),
            "alpha": ("-1", "2"),
            "memory": ("1.1",),
            "prior": ("nowhere.txt",),
        },
    }
    for method, flags in own.items():
        for flag, values in flags.items():
            for value in values:
                yield method, [f"--{flag}", value], flag
    yield "wise_ft", ["--name", "../up"], "name"
    for value in ("nan", "pcv", ""):
        yield "naive_ft", ["--calibrate", value], "calibrate"
    yield "wise_ft", ["--name", ".."], "name"
    yield "wise_ft", ["--mode", "logits", "--calibrate", "alg"], "calibrate"
    yield "wise_ft", ["--mode", "logits", "--reestimate-bn"], "reestimate-bn"
    yield "bn_adapt", ["--mode", "stats", "--bn-mode", "train"], "bn-mode"
    yield "naive_ft", ["--amp", "float64"], "amp"
    yield "naive_ft", ["--oracle", "yes"], "yes"
    yield "naive_ft", ["--lr"], "lr"
    yield "naive_ft", ["--learning-rate", "1"], "learning-rate"
    yield "naive_ft", ["--tau", "1"], "tau"  # another method's
    yield "naive_ft", ["--dataset", "mnist"], "dataset"
    yield "naive_ft", ["--source", "serif"], "source"
    yield "naive_ft", ["--dataset", "glyphs", "--target", "mnist"], "target"
    yield "naive_ft", ["--source", "optdigits", "--target", "optdigits"], "target"
    names = ",".join("0123456789" * 20)  # longer than a file's name can be
    for value in ("0", "-3", "10", "99999999999999999999", "²", "nowhere.txt", ".", "paper", names):
        yield "naive_ft", ["--seen-classes", value], "seen-classes"
    yield "naive_ft", ["--batch-size", "100000"], "batch-size"
    for value in ("-0.1", "1", "nan", "half"):
        yield "naive_ft", ["--test-share", value], "test-share"
    yield "naive_ft", ["--classes", "nowhere.txt"], "classes"
    yield "bn_adapt", ["--arch", "lenet"], "arch"
    for folder in (".", "nowhere"):
        yield "infomax", ["--unlabelled", folder], "unlabelled"
    yield "naive_ft", ["--arch", "resnet"], "arch"
    yield "naive_ft", ["--arch", "vit_b_16", "--weights", "none"], "arch"
    yield "naive_ft", ["--weights", "imagenet"], "weights"
    yield "naive_ft", ["--weights", "nowhere.pth", "--arch", "resnet18"], "weights"
    yield "naive_ft", ["--source-checkpoint", "nowhere.pt"], "source-checkpoint"
    yield "naive_ft", ["--source-checkpoint", "."], "source-checkpoint"
    for value in ("toaster", "meta", "cpu:x", "cuda:99", "mps", "mps:0", ""):
        yield "naive_ft", ["--device", value], "device"


WRONG = list(wrong())


def test_there_are_a_hundred_wrong_command_lines():
    assert len(WRONG) >= 100 and len({(method, *flags) for method, flags, _ in WRONG}) == len(WRONG)


@pytest.mark.parametrize("method", sorted({method for method, _, _ in WRONG}))
def test_wrong_command_lines(method, run_method, tmp_path, capsys, monkeypatch):
    cached = functools.cache(whole_task)
    monkeypatch.setattr(data, "load_task", lambda args, pool=False: cached(task_flags(args), pool))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for flags, flag in [(flags, flag) for other, flags, flag in WRONG if other == method]:
        started = time.process_time()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(models, "train_source", lambda *args, flags=flags, **rest: pytest.fail(f"{flags} trained"))
            run_method(method, *flags, quick=False, runs=tmp_path / "runs")
        error, wrong = capsys.readouterr().err, flag if flag == "yes" else f"--{flag}"
        assert stop.value.code == 2 and wrong in error and "Traceback" not in error, (flags, error)
        assert time.process_time() - started < 5, flags
        assert not list((tmp_path / "runs").iterdir()), flags
