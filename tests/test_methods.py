"""Every script, run as a program."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import models
import runs

pytestmark = pytest.mark.usefixtures("quick_start")
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("oracle", [False, True], ids=["", "oracle"])
def test_a_run_leaves_all_its_files(method, oracle, run_method, read, capsys):
    names, folder = run_method(method, *(["--oracle"] if oracle else []))
    done, arrays, log = read(folder)
    assert folder.name == "split0-seed0" and folder.parent.name == method + "-oracle" * oracle
    n_test, n_train = len(arrays["test_labels"]), len(arrays["train_labels"])
    for name, shape in {
        "test_logits": (n_test, 10),
        "train_logits": (n_train, 10),
        "seen": (10,),
        "classes": (10,),
    }.items():
        assert arrays[name].shape == shape
        if "logits" in name:
            assert arrays[name].dtype == np.float32 and arrays[f"source_{name}"].shape == shape
    assert set(arrays["train_labels"]) == set(range(10) if oracle else np.flatnonzero(arrays["seen"]))
    # the figures of done.json, of the log's last line and of eval.py are one and the same, to the last digit
    assert evaluation.read_run(folder)["final"] == done["final"]
    assert evaluation.read_run(folder)["source"] == done["source"]
    assert {key: log[0][key] for key in done["source"]} == done["source"]
    assert {key: log[-1][key] for key in done["final"]} == done["final"]
    assert [line["epoch"] for line in log] == list(range(len(log))) and log[0]["step"] == 0 and log[0]["loss"] is None
    assert json.loads((folder / "args.json").read_text()) == done["args"]
    assert done["versions"]["torch"] == torch.__version__ and done["versions"]["amp"] is None
    # model.pt is a model that gives these logits
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["classes"] == list(arrays["classes"])
    model = names.get("result", names["model"])  # of wise_ft
    model.load_state_dict(saved["model"])
    assert np.array_equal(models.predict(model, names["task"].target_test.images), arrays["test_logits"])
    assert "source (epoch 0)" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_in_bfloat16(method, run_method, read, runs_dir):
    runs = runs_dir / "bfloat16"  # beside the source model of the other tests, not among them
    names, folder = run_method(method, "--amp", "bfloat16", runs=runs)
    done, arrays, log = read(folder)
    assert done["versions"]["amp"] == "torch.bfloat16"
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}
    assert np.isfinite(log[2]["loss"])  # of the second epoch: lolsgd ends no round in the first
    logits = arrays["source_test_logits"]  # the head was not autocast
    assert (logits != torch.from_numpy(logits).bfloat16().float().numpy()).mean() > 0.9


class FindWaits(TorchDispatchMode):
    """Notes the operations that give a program a number or a shape it can only have once the device is done.

    While watching is set: .item(), float(tensor) and branches on tensors; boolean masks as indices.
    """

    def __init__(self):
        super().__init__()
        self.watching = False
        self.operations = 0
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if self.watching:
            self.operations += 1
            waits = name in ("_local_scalar_dense", "equal", "nonzero", "masked_select")
            if name in ("index", "index_put_"):
                waits = any(index is not None and index.dtype is torch.bool for index in args[1])
            self.waits += [name] * waits
        return function(*args, **(kwargs or {}))


LOOPS = [(method, ()) for method in METHODS]
LOOPS += [("bn_adapt", ("--mode", mode)) for mode in ("stats", "pool")] + [("lp_ft", ("--pull", "1"))]
LOOPS += [("lolsgd", ("--ce", "subset")), ("grad_proj", ("--reference", "gap", "--scope", "layer"))]


@pytest.mark.parametrize("method, flags", LOOPS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_a_loop_never_waits_for_the_device(method, flags, run_method, monkeypatch):
    """From the end of a step to the end of the next, but for how batches and a Run work inside."""
    find = FindWaits()

    def unwatched(owner, name, watch_after):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            watching = find.watching
            find.watching = False
            result = function(*args, **kwargs)
            find.watching = watching if watch_after is None else watch_after
            return result

        monkeypatch.setattr(owner, name, call)

    unwatched(runs.Run, "step", watch_after=True)
    unwatched(runs.Run, "evaluate", watch_after=False)
    unwatched(data.Batches, "__call__", watch_after=None)
    unwatched(models, "predict", watch_after=False)  # of an evaluation
    with find:
        names, _ = run_method(method, *flags, "--name", " ".join(("waits", method, *flags)))
    assert names["run"].steps >= 6 and find.operations > 100 and not find.waits


def test_a_pseudo_split_is_a_run_beside_the_run(run_method, read):
    folder = run_method("masked_ft", "--name", "calibrated")[1]
    assert evaluation.read_run(folder)["pcv"] is None
    splits = []
    for k in ("0", "1"):
        beside = run_method("masked_ft", "--name", "calibrated", "--pseudo-split", k)[1]
        done, arrays, _ = read(beside)
        assert beside == folder.with_name(f"split0-seed0-pseudo{k}") and done["args"]["pseudo_split"] == int(k)
        assert arrays["seen"].sum() == 3 and len(set(arrays["test_labels"])) == 5
        splits.append([arrays[name] for name in ("test_logits", "test_labels", "seen")])
    assert evaluation.read_run(folder)["pcv"]["gamma"] == evaluation.pcv_gamma(splits)[0]


def test_runs_from_other_source_models_lie_beside_each_other(run_method, read, tmp_path):
    one, two = (run_method("masked_ft", "--source-seed", seed, runs=tmp_path)[1] for seed in "01")
    assert one.name == "split0-seed0" and two == one.with_name("split0-seed0-source1")
    logits = [read(folder)[1]["source_test_logits"] for folder in (one, two)]
    assert not np.array_equal(*logits)


def test_a_run_says_its_command(run_method, read):
    done = read(run_method("l2_sp", "--name", "a name")[1])[0]
    assert done["command"].startswith("python methods/l2_sp.py --epochs 2") and "--name 'a name'" in done["command"]


def test_same_seeds_same_bits(run_method, read, tmp_path):
    first = read(run_method("ht_distill", "--name", "a", "--rank-weight", "0.1")[1])[1]
    again = read(run_method("ht_distill", "--name", "b", "--rank-weight", "0.1")[1])[1]
    other = read(run_method("ht_distill", "--name", "c", "--seed", "1")[1])[1]
    split = read(run_method("ht_distill", "--name", "d", "--split-seed", "1")[1])[1]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert np.array_equal(first["source_test_logits"], other["source_test_logits"])
    assert not np.array_equal(first["test_logits"], other["test_logits"])
    assert not np.array_equal(first["seen"], split["seen"])


def test_bn_mode(run_method):
    for mode, same in (("eval", True), ("train", False)):
        names = run_method("naive_ft", "--bn-mode", mode, "--name", mode)[0]
        before, after = names["source_model"].state_dict(), names["model"].state_dict()
        statistics = [key for key in before if "running" in key]
        assert statistics and all(torch.equal(before[key], after[key]) == same for key in statistics)


def test_a_finished_run_is_kept(run_method, capsys):
    _, folder = run_method("naive_ft", "--name", "kept")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        run_method("naive_ft", "--name", "kept")
    assert stop.value.code == 0 and "already finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_method("naive_ft", "--name", "kept", "--lr", "0.001")
    assert stop.value.code == 2 and "lr 0.005 (now 0.001)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run_method("naive_ft", "--name", "kept", "--lr", "0.001", "--overwrite")
    assert json.loads((folder / "done.json").read_text())["args"]["lr"] == 0.001


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill", "infomax"])
def test_a_diverging_run_stops(method, run_method, capsys):
    flags = ("--lr", "1e9", "--backbone-lr", "1e9", "--clip-grad", "3e38")
    with pytest.raises(SystemExit) as stop:
        run_method(method, *flags, "--name", f"{method}-diverging")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "with --lr 1000000000.0 and --backbone-lr 1000000000.0: try lower ones" in error
    assert re.match(r"error: step [123]: the loss, (nan|inf), is not finite", error.splitlines()[-1])  # below a bar


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill", "wise_ft"])  # test_methods_siblings: all import the same
def test_a_script_and_its_modules_are_all_it_takes(method, tmp_path, runs_dir, run_method):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    for file in (f"methods/{method}.py", "models.py", "eval.py", "runs.py", "files.py"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=lambda _, names: [n for n in names if n[-3:] != ".py"])
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    command = [sys.executable, f"{method}.py", *QUICK, "--source-checkpoint", str(source)]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "mnist-optdigits" / method / "split0-seed0" / "done.json").exists()


def test_a_calibrated_run_has_its_bias_in_the_head(run_method, read):
    plain = run_method("ht_distill", "--name", "uncalibrated")[1]
    for how, gamma in (("alg", evaluation.read_run(plain)["alg_source"]["gamma"]), ("-1.5", -1.5)):
        names, folder = run_method("ht_distill", "--calibrate", how, "--name", f"calibrated {how}")
        (done, arrays, log), (_, before, _) = read(folder), read(plain)
        assert done["calibration"] == pytest.approx(gamma, abs=1e-5)
        biased = before["test_logits"] + done["calibration"] * ~before["seen"]
        np.testing.assert_allclose(arrays["test_logits"], biased, atol=1e-4)
        model = torch.load(folder / "model.pt", weights_only=True)["model"]
        assert torch.equal(model["head.bias"], names["model"].head.bias)
        assert log[-1]["gamma"] == done["calibration"] and log[-1]["overall"] == done["final"]["overall"]
    assert read(plain)[0]["calibration"] is None


# ---------------------------------------------------------------- a reader's own script

MINE = (ROOT / "methods" / "l2_sp.py").read_text()


def my_script(folder, *changes):
    """A script that a reader made of l2_sp.py: its text with each (old, new) of changes, in a folder of its own."""
    text = MINE
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "mine.py"
    path.write_text(text.replace("parents[1]", "parents[0]"))
    for file in ("models.py", "eval.py", "runs.py", "files.py", "data"):
        shutil.copytree(ROOT / file, folder / file) if file == "data" else shutil.copy(ROOT / file, folder / file)
    return path


@pytest.fixture
def run_mine(tmp_path, runs_dir, run_method):
    """Run a changed l2_sp.py as a program of its own, from the session's source model."""
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))

    def call(changes, *flags):
        path = my_script(tmp_path / "mine", *changes)
        command = [sys.executable, path, *QUICK, "--source-checkpoint", source, "--runs-dir", tmp_path / "runs", *flags]
        return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)

    return call


def test_a_flag_of_a_readers_own_has_bounds_of_its_own(run_mine):
    """No shared module knows a flag of one script: another script's of that name may mean something else."""
    changes = ("pull: float = 1.0", "memory: int = 200"), ("args.pull", "args.memory"), ('"pull"', '"memory"')
    done = run_mine(changes, "--memory", "3")
    assert done.returncode == 0, done.stderr
    refused = run_mine((), "--pull", "-1")
    assert refused.returncode == 2 and refused.stderr == "error: --pull -1.0: must be 0 or more\n"


def test_an_exception_that_is_not_ours_keeps_its_traceback(run_mine):
    failing = ("loss = F.cross", 'raise TimeoutError("my feature store")\n                loss = F.cross')
    done = run_mine([failing])
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: my" not in done.stderr
    assert done.stderr.rstrip().endswith("TimeoutError: my feature store")


def test_help_is_grouped_and_says_what_none_stands_for():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # no terminal's width

    def help_of(method):
        command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), "--help"]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    shown = help_of("ht_distill")
    places = [shown.index(f"─ {group} options ─") for group in ("method", "training", "task", "run")]
    assert places == sorted(places) and "None" not in shown
    assert max(map(len, shown.splitlines())) == 100
    for flag, default in (("steps-per-epoch", "digits 15, photographs 500"), ("lr", "digits 0.005, photographs 0.001")):
        line = shown[shown.index(f"--{flag} ") :].partition("(default: ")[2]
        assert " ".join(line.replace("│", " ").split()).startswith(default)
    assert len(help_of("naive_ft").splitlines()) <= 80


def test_the_source_models_training_has_flags(run_method, read, tmp_path, capsys):
    flags = ("--source-steps", "7", "--source-batch-size", "9", "--source-lr", "0.01", "--source-backbone-lr", "0.02")
    done, _, _ = read(run_method("naive_ft", *flags, runs=tmp_path)[1])
    assert "7/7" in capsys.readouterr().err
    assert [done["args"][f"source_{name}"] for name in ("steps", "batch_size", "lr", "backbone_lr")] == [
        7,
        9,
        0.01,
        0.02,
    ]
    assert len(list((tmp_path / "source_models").glob("*.pt"))) == 1
    run_method("naive_ft", "--source-steps", "8", "--name", "other", runs=tmp_path)
    assert len(list((tmp_path / "source_models").glob("*.pt"))) == 2


@pytest.mark.parametrize("method", ["naive_ft", "grad_proj"])
def test_a_compiled_run_gives_the_same(method, run_method, read, monkeypatch):
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_with(self, backend="aot_eager"))
    torch.compiler.reset()
    folders = [run_method(method, *how, "--name", f"{method}{len(how)}")[1] for how in ((), ("--compile",))]
    np.testing.assert_allclose(*(read(folder)[1]["test_logits"] for folder in folders), atol=1e-3)
