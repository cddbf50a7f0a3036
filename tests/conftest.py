import dataclasses
import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import quick_python
import replicas

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Threads of small steps wait for each other where others use the cores too. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import data  # noqa: E402

QUICK = ("--epochs", "2", "--steps-per-epoch", "3", "--device", "cpu")


def load_task(*values, **flags):
    """The task of these flags, as a script loads it."""
    return data.load_task(data.TaskArgs(*values, **flags))


@dataclasses.dataclass(unsafe_hash=True)
class HashableArgs(data.PoolArgs, data.TaskArgs):
    pass


def task_flags(args):
    """The TaskArgs, and PoolArgs if any, in a script's args, which can be a key of a cache."""
    return HashableArgs(**{field.name: getattr(args, field.name, None) for field in dataclasses.fields(HashableArgs)})


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    """One cache of source models for the whole session, where it takes a few steps to train one."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def quick_source(monkeypatch):
    """A source model of 30 steps is enough for tests of the machinery, not of the figures."""
    for entry in data.DATASETS.values():
        monkeypatch.setitem(entry["source_recipe"], "steps", 30)
        if "source_recipe_for" in entry:
            monkeypatch.setitem(entry, "source_recipe_for", lambda images, entry=entry: entry["source_recipe"])


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Threads and precision, which scripts set for their process."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@functools.cache
def few_digits(domain, root=None):
    """Every third image of `digits`, read once."""
    images, labels, classes = data.digits(domain)
    return images[::3], labels[::3], classes


@pytest.fixture
def run_method(runs_dir, monkeypatch):
    """Run methods/NAME.py as a program, in this process; returns its globals and its folder."""
    monkeypatch.setitem(data.DATASETS["digits"], "load", few_digits)

    def call(name, *flags, quick=True, runs=runs_dir):
        argv = [str(ROOT / "methods" / f"{name}.py"), *(QUICK if quick else ()), "--runs-dir", str(runs), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        names = runpy.run_path(argv[0], run_name="__main__")
        return names, names["run"].folder

    return call


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    with quick_python.server(folder):
        yield folder / "python"


@pytest.fixture
def quick_start(stand_in, monkeypatch):
    """Scripts that a test starts as processes of their own need not import PyTorch first."""
    monkeypatch.setattr(sys, "executable", str(stand_in))


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """Run benchmark.py as a program, in this process; returns its exit code, what it printed, and its errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmark.py"), *map(str, words)])
        capsys.readouterr()
        code = 0
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own handlers
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root with all replicas."""
    path = tmp_path_factory.mktemp("data")
    for name in ("office_home", "domainnet", "femnist", "iwildcam", "inat_fungi", "vtab", "folder"):
        getattr(replicas, name)(path)
    return path


@pytest.fixture
def read():
    """The files of a finished run: its done.json, the arrays of logits.npz, the lines of log.jsonl."""

    def call(folder):
        done = json.loads((folder / "done.json").read_text())
        with np.load(folder / "logits.npz", allow_pickle=False) as file:
            arrays = dict(file)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return done, arrays, log

    return call
