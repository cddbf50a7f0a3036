"""Every script, run as a program."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT

import eval as evaluation

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
    names["model"].load_state_dict(saved["model"])
    assert np.array_equal(evaluation.predict(names["model"], names["task"].target_test.images), arrays["test_logits"])
    assert "source (epoch 0)" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_in_bfloat16(method, run_method, read, runs_dir):
    runs = runs_dir / "bfloat16"  # beside the source model of the other tests, not among them
    names, folder = run_method(method, "--amp", "bfloat16", runs=runs)
    done, arrays, log = read(folder)
    assert done["versions"]["amp"] == "torch.bfloat16"
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}
    assert all(line["loss"] is None or np.isfinite(line["loss"]) for line in log)
    logits = arrays["source_test_logits"]  # the head was autocast
    assert np.array_equal(logits, torch.from_numpy(logits).bfloat16().float().numpy())


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


def test_without_its_terms_ht_distill_is_naive_ft(run_method):
    flags = ("--split-seed", "2", "--bn-mode", "train")
    naive = run_method("naive_ft", *flags)[0]["model"].state_dict()
    same = run_method("ht_distill", *flags, "--distill-weight", "0", "--rank-weight", "0")[0]["model"].state_dict()
    other = run_method("ht_distill", *flags, "--name", "other")[0]["model"].state_dict()
    assert all(torch.equal(naive[key], same[key]) for key in naive)
    assert not all(torch.equal(naive[key], other[key]) for key in naive)


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


def test_a_diverging_run_stops(run_method, capsys):
    with pytest.raises(SystemExit) as stop:
        run_method("naive_ft", "--lr", "1e9", "--backbone-lr", "1e9", "--clip-grad", "inf", "--name", "diverging")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "with --lr 1000000000.0 and --backbone-lr 1000000000.0: try lower ones" in error
    assert re.match(r"error: step [123]: the loss, (nan|inf), is not finite", error)


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill", "wise_ft"])  # test_siblings: all import the same
def test_a_script_and_three_modules_are_all_it_takes(method, tmp_path, runs_dir, run_method):
    run_method("naive_ft", "--name", "caches the source model", "--overwrite")
    for file in (ROOT / "methods" / f"{method}.py", ROOT / "models.py", ROOT / "eval.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=lambda _, names: [n for n in names if n[-3:] != ".py"])
    source = next((runs_dir / "source_models").glob("digits-mnist-small_cnn-*.pt"))
    command = [sys.executable, f"{method}.py", *QUICK, "--source-checkpoint", str(source)]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "mnist-optdigits" / method / "split0-seed0" / "done.json").exists()
