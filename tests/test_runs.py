"""Runs that are stopped, started twice, out of disk or memory, or that go wrong: nothing is lost, and it says so."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import replicas
import torch
from conftest import ROOT

import data
import models
import runs
from files import take_lock

METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(function, count, signal): send this process a signal in the count-th call of an attribute."""

    def call(owner, name, count, number):
        function, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return call


def without_times(log):
    return [{k: v for k, v in line.items() if k != "seconds" and not k.endswith("per_second")} for line in log]


def same_result(one, other):
    """Whether (names and folder of a run, what the fixture read says) are the same to the last bit."""
    (_, arrays, log), (_, other_arrays, other_log) = one, other
    return without_times(log) == without_times(other_log) and all(
        np.array_equal(arrays[name], other_arrays[name]) for name in arrays.keys() | other_arrays.keys()
    )


def stopped(run, code):
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == code


LOLSGD = ("--copies", "2", "--tau", "2", "--epochs", "3")
CASES = [(method, ()) for method in METHODS if method not in ("bn_adapt", "lolsgd")]
CASES += [("bn_adapt", ("--mode", mode)) for mode in ("affine", "stats", "pool")]
CASES += [("lolsgd", LOLSGD), ("naive_ft", ("--bn-mode", "train", "--arch", "dropout"))]


@pytest.mark.parametrize("method, flags", CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_every_method_goes_on_in_the_middle_of_an_epoch(method, flags, run_method, read, stop_at, monkeypatch, capsys):
    def dropout(channels, side):
        backbone, features = models.small_cnn(channels, side)
        return torch.nn.Sequential(backbone, torch.nn.Dropout(0.5)), features

    monkeypatch.setitem(models.SMALL, "dropout", dropout)
    stop = 5 if method != "lolsgd" else 7  # the second step of a round's second copy
    want = read(run_method(method, *flags, "--name", " ".join(("whole", method, *flags)))[1])
    flags = (*flags, "--name", " ".join(("stopped", method, *flags)))
    stop_at(runs.Run, "step", stop, signal.SIGTERM)
    stopped(lambda: run_method(method, *flags), 143)
    assert "stopped by SIGTERM; the same command" in capsys.readouterr().err
    names, folder = run_method(method, *flags)
    assert f"goes on after step {stop}\n" in capsys.readouterr().out
    assert same_result(read(folder), want) and not (folder / "checkpoint.pt").exists()
    assert names["run"].steps == want[2][-1]["step"]


class Interrupted:
    """The function, but the user presses Ctrl-C as its count-th call begins."""

    def __init__(self, function, count):
        self.function = function
        self.calls_left = count

    def __call__(self, *args, **kwargs):
        self.calls_left -= 1
        if self.calls_left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.function(*args, **kwargs)


def test_a_stop_in_an_evaluation(run_method, read, stop_at, capsys, monkeypatch):
    want = read(run_method("wise_ft", "--name", "whole")[1])
    flags = ("wise_ft", "--name", "stopped")
    predict = models.predict
    # predict: epoch 0's test and training images, epochs 1 and 2, eleven points of the curve, then the result
    for count in (1, 3, 8, 1):
        counted = Interrupted(predict, count)
        with monkeypatch.context() as patch:
            patch.setattr(models, "predict", counted)
            patch.setattr(runs, "predict", counted)
            stopped(lambda: run_method(*flags), 130)
        assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().err
    assert same_result(read(run_method(*flags)[1]), want)


def test_source_training_goes_on(run_method, runs_dir, tmp_path, stop_at, capsys):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    want = torch.load(next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt")), weights_only=True)
    for count in (7, 9):
        stop_at(data.Batches, "__call__", count, signal.SIGTERM)
        stopped(lambda: run_method("naive_ft", runs=tmp_path), 143)
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err
    (unfinished,) = (tmp_path / "source_models").glob("*.unfinished")
    assert torch.load(unfinished, weights_only=True)["steps"] == 16
    assert not (tmp_path / "digits").exists(), "a folder in which nothing was written"
    run_method("naive_ft", runs=tmp_path)
    assert sorted(path.suffix for path in (tmp_path / "source_models").iterdir()) == [".lock", ".pt"]
    got = torch.load(unfinished.with_suffix(".pt"), weights_only=True)
    assert all(torch.equal(got["model"][name], want["model"][name]) for name in want["model"])


def test_a_stopped_overwrite_says_how_to_go_on(run_method, read, stop_at, capsys):
    _, folder = run_method("naive_ft", "--name", "twice")
    want = read(folder)
    stop_at(runs.Run, "step", 2, signal.SIGINT)
    stopped(lambda: run_method("naive_ft", "--name", "twice", "--overwrite"), 130)
    assert "the same command, without --overwrite, goes on" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "args.json", "checkpoint.pt", "log.jsonl"]
    assert same_result(read(run_method("naive_ft", "--name", "twice")[1]), want)


def test_one_owner_per_folder(run_method, capsys):
    _, folder = run_method("naive_ft", "--name", "owned")
    (folder / ".log.jsonl.123.tmp").write_text("half a li")
    lock = take_lock(folder / ".lock", "x")
    stopped(lambda: run_method("naive_ft", "--name", "owned"), 0)  # a result can be shown to everybody
    stopped(lambda: run_method("naive_ft", "--name", "owned", "--overwrite"), 3)
    assert f"another process is at work in {folder}" in capsys.readouterr().err
    lock.release()
    run_method("naive_ft", "--name", "owned", "--overwrite")
    assert not list(folder.glob(".*.tmp"))


def test_a_checkpoint_of_other_arguments_or_origin(run_method, stop_at, capsys, runs_dir, tmp_path):
    folders = []
    for seed in ("0", "1"):
        stop_at(runs.Run, "step", 4, signal.SIGTERM)
        stopped(lambda seed=seed: run_method("naive_ft", "--seed", seed, "--name", "swap"), 143)
        folders.append(runs_dir / "digits" / "mnist-optdigits" / "swap" / f"split0-seed{seed}")
    (folders[0] / "checkpoint.pt").rename(folders[1] / "checkpoint.pt")
    stopped(lambda: run_method("naive_ft", "--seed", "1", "--name", "swap"), 2)
    error = capsys.readouterr().err
    assert f"{folders[1]}/checkpoint.pt: of a training with seed 0 (now 1)" in error and "--overwrite" in error
    stop_at(runs.Run, "step", 4, signal.SIGTERM)
    stopped(lambda: run_method("naive_ft", runs=tmp_path), 143)
    (path,) = (tmp_path / "source_models").glob("digits-mnist-small_cnn-*.pt")
    source = torch.load(path, weights_only=True)
    source["model"]["head.bias"] += 1
    torch.save(source, path)
    stopped(lambda: run_method("naive_ft", runs=tmp_path), 2)
    assert "checkpoint.pt: of a run from another source model" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tmpfs", "file size limit"])
def test_a_full_disk_loses_no_checkpoint(kind, run_method, read, runs_dir, tmp_path, stop_at, capsys, request):
    want = read(run_method("naive_ft", "--name", f"fits on {kind}")[1])
    source = str(next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt")))
    disk = tmp_path / "disk"
    disk.mkdir()
    if kind == "tmpfs":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True
        )
        if mounted.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.decode().strip()}")
        request.addfinalizer(lambda: subprocess.run(["umount", disk], check=True))
    flags = ("--name", "full", "--source-checkpoint", source)
    stop_at(runs.Run, "step", 4, signal.SIGTERM)
    stopped(lambda: run_method("naive_ft", *flags, runs=disk), 143)
    checkpoint = next(disk.rglob("checkpoint.pt"))
    before = checkpoint.read_bytes()
    if kind == "tmpfs":
        with pytest.raises(OSError, match="No space left"), open(disk / "ballast", "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        stopped(lambda: run_method("naive_ft", *flags, "--checkpoint-every", "0", runs=disk), 2)
        (disk / "ballast").unlink()
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, limits[1]))
        try:
            stopped(lambda: run_method("naive_ft", *flags, "--checkpoint-every", "0", runs=disk), 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    why = "No space left on device" if kind == "tmpfs" else "File too large"
    assert error.startswith(f"error: {checkpoint.parent}/") and f"cannot be written ({why})" in error
    assert checkpoint.read_bytes() == before and not list(disk.rglob(".*.tmp"))
    assert same_result(read(run_method("naive_ft", *flags, runs=disk)[1]), want)


def test_a_weight_that_overflows_is_never_saved(run_method, capsys):
    flags = ("--lr", "3e38", "--clip-grad", "3e38", "--steps-per-epoch", "1", "--name", "overflow")
    stopped(lambda: run_method("naive_ft", *flags), 2)
    assert "step 1: a weight is not finite, with --lr 3e+38" in capsys.readouterr().err


def test_a_source_training_that_diverges(run_method, tmp_path, monkeypatch, capsys):
    task = data.load_task(data.TaskArgs("digits"))
    monkeypatch.setattr(task, "source_recipe", {**task.source_recipe, "lr": 1e9, "backbone_lr": 1e9})
    monkeypatch.setattr(data, "load_task", lambda args: task)
    stopped(lambda: run_method("naive_ft", runs=tmp_path), 2)
    error = capsys.readouterr().err
    assert "is not finite, with --source-lr 1000000000.0" in error and "clip-grad" not in error
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".lock"]


def test_a_source_without_test_images_is_no_obstacle(run_method, tmp_path, monkeypatch):
    task = data.load_task(data.TaskArgs("digits"))
    monkeypatch.setattr(task, "source_test", task.source_test.take(np.arange(0)))
    monkeypatch.setattr(data, "load_task", lambda args: task)
    assert (run_method("naive_ft", runs=tmp_path)[1] / "done.json").exists()


def test_out_of_memory_names_the_batch_size(run_method, runs_dir, monkeypatch, capsys):
    run_method("naive_ft", "--name", "fits in memory")

    def cross_entropy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nand more")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    source = str(next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt")))
    stopped(lambda: run_method("naive_ft", "--name", "oom", "--source-seed", "7"), 2)
    assert "source model, batches of 64 images: cpu is out of memory" in capsys.readouterr().err
    stopped(lambda: run_method("naive_ft", "--name", "oom", "--batch-size", "70"), 2)
    error = capsys.readouterr().err
    assert error.startswith("error: --batch-size 70 ") and "--device cpu is out of memory" in error
    assert len(error.splitlines()) == 1 and "--resident" not in error
    for resident in ("auto", "on", "off"):
        flags = ("--name", f"oom-{resident}", "--device", "auto", "--resident", resident, "--source-checkpoint", source)
        stopped(lambda flags=flags: run_method("naive_ft", *flags), 2)
        error = capsys.readouterr().err
        assert error.startswith("error: --batch-size 64 is too large: --device auto is out of memory")
        assert ("; --resident off frees the images" in error) == (resident != "off")


def test_versions_name_the_gpu_that_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"the GPU at {device}")
    model = torch.nn.Linear(1, 1)
    assert runs.versions(model)["gpu"] is None
    on_second = [types.SimpleNamespace(device=torch.device("cuda:1"))]
    monkeypatch.setattr(model, "parameters", lambda: iter(on_second))
    assert runs.versions(model)["gpu"] == "the GPU at cuda:1"


def test_tensorboard_has_what_the_log_has(run_method, read, stop_at):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("naive_ft", "--track", "tensorboard", "--name", "tracked")
    stop_at(runs.Run, "step", 4, signal.SIGTERM)
    stopped(lambda: run_method(*flags), 143)
    folder = run_method(*flags)[1]
    log = read(folder)[2]
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    figures = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    want = {(name, line["step"]): value for line in log for name, value in line.items() if value is not None}
    assert figures == pytest.approx(want, rel=1e-6) and len(log) == 3
    run_method(*flags, "--overwrite")
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1, "those of the run before are gone"
    run_method("wise_ft", "--track", "tensorboard", "--name", "curve")  # a line of its log has more than numbers


def test_tensorboard_is_asked_for_where_it_is_missing(run_method, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stopped(lambda: run_method("naive_ft", "--track", "tensorboard", "--name", "untracked"), 2)
    error = capsys.readouterr().err
    assert error == "error: --track tensorboard: needs a package that is optional: pip install tensorboard\n"


def test_a_name_is_one_scripts(run_method, capsys):
    run_method("naive_ft", "--name", "shared")
    stopped(lambda: run_method("frozen_classifier", "--name", "shared"), 2)
    assert "holds a run with script naive_ft (now frozen_classifier)" in capsys.readouterr().err


def test_other_weights_in_the_same_file_are_another_run(run_method, runs_dir, tmp_path, capsys):
    names = run_method("naive_ft", "--name", "before")[0]
    saved = {"model": names["source_model"].state_dict(), "classes": names["task"].classes}
    path = tmp_path / "hers.pt"
    torch.save(saved, path)
    flags = ("naive_ft", "--source-checkpoint", str(path), "--name", "her own")
    run_method(*flags)
    stopped(lambda: run_method(*flags), 0)
    saved["model"]["head.bias"] += 1
    torch.save(saved, path)
    stopped(lambda: run_method(*flags), 2)
    assert "holds a run with source_checkpoint_sha256" in capsys.readouterr().err


def test_other_images_by_the_environment_are_another_run(run_method, tmp_path, monkeypatch, capsys):
    flags = ("naive_ft", "--dataset", "folder", "--source", "a", "--target", "b", "--arch", "small_cnn")
    for root in ("one", "other"):
        replicas.tree(tmp_path / root / "a", ["x", "y", "z"], 8)
        replicas.tree(tmp_path / root / "b", ["x", "y"], 8)
    monkeypatch.setenv("HT_DATA", str(tmp_path / "one"))
    run_method(*flags, "--image-size", "16", runs=tmp_path / "runs")
    stopped(lambda: run_method(*flags, "--image-size", "16", runs=tmp_path / "runs"), 0)
    monkeypatch.setenv("HT_DATA", str(tmp_path / "other"))
    stopped(lambda: run_method(*flags, "--image-size", "16", runs=tmp_path / "runs"), 2)
    assert f"holds a run with data_root {tmp_path / 'one'} (now" in capsys.readouterr().err


def test_a_finished_run_shows_what_its_logits_say(run_method, capsys):
    _, folder = run_method("naive_ft", "--name", "shown")
    table = capsys.readouterr().out[-500:]
    stopped(lambda: run_method("naive_ft", "--name", "shown"), 0)
    assert capsys.readouterr().out.endswith(table.split("images/s")[-1][-300:])
    done = json.loads((folder / "done.json").read_text())
    done["final"]["unseen"] += 0.01
    (folder / "done.json").write_text(json.dumps(done))
    stopped(lambda: run_method("naive_ft", "--name", "shown"), 2)
    assert f"{folder}: logits.npz does not give what done.json has" in capsys.readouterr().err


def test_a_fingerprint_is_of_labels_seen_classes_and_the_pool_too():
    task, model = data.load_task(data.TaskArgs("digits")), models.build("small_cnn", 10, (1, 28, 28))
    train = task.target_train
    changes = ({}, {"seen": ~task.seen}, {"target_train": train.take(np.arange(5))})
    changes += ({"target_test": train}, {"target_unlabelled": train})
    assert len({runs.fingerprint(model, dataclasses.replace(task, **change)) for change in changes}) == 5


def test_logits_that_are_not_finite_end_a_run(run_method, monkeypatch, capsys):
    predict = runs.predict
    monkeypatch.setattr(runs, "predict", lambda *args: predict(*args) * np.nan)
    stopped(lambda: run_method("naive_ft", "--name", "nan logits"), 2)
    assert "error: logits of the target's test images: row 0 has nan or inf" in capsys.readouterr().err


def test_a_run_on_other_images_is_not_shown_as_this_one(run_method, capsys):
    _, folder = run_method("naive_ft", "--name", "other images")
    done = json.loads((folder / "done.json").read_text())
    assert set(done["images"]) == {"source", "train", "test"}
    for name in done["images"]:
        (folder / "done.json").write_text(json.dumps(done | {"images": {**done["images"], name: "of yesterday"}}))
        stopped(lambda: run_method("naive_ft", "--name", "other images"), 2)
        assert "holds a run on other images; pass --overwrite" in capsys.readouterr().err
    (folder / "done.json").write_text(json.dumps(done | {"images": {"test": done["images"]["test"]}}))
    stopped(lambda: run_method("naive_ft", "--name", "other images"), 0)  # an older run, which names fewer


def test_what_pretrained_weights_hold_is_recorded(tmp_path):
    @dataclasses.dataclass
    class Args(data.TaskArgs, runs.RunArgs):
        pass

    found = set()
    for content in (b"one", b"two"):
        (tmp_path / "w.pth").write_bytes(content)
        args = Args(weights=str(tmp_path / "w.pth"), seen_classes="5")
        found.add(runs.record_of(args, "x", [])["weights_sha256"])
    assert len(found) == 2
