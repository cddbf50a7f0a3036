"""Files that survive: atomic writes, locks, the request to stop. Checkpoints: see test_runs.py."""

import os
import signal
import types

import pytest
import torch

import files
from files import InputError


def test_write_atomic_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(InputError, match=r"deep/file: cannot be written .*no space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_a_run_from_before_a_flag_was_there_is_the_same_run():
    new = {"lr": 0.1, "no_flip": False, "classes": None, "pseudo_split": None}
    assert files.differences({"lr": 0.1}, new) == files.differences(new, {"lr": 0.1}) == ""
    assert files.differences({"lr": 0.1}, new | {"no_flip": True}) == "no_flip None (now True)"
    assert files.differences(new, new | {"pseudo_split": 0}) == "pseudo_split None (now 0)"
    assert files.differences({"lr": 0.0}, {"lr": 0}) == ""


def test_a_second_signal_does_not_wait_for_the_step():
    stop = files.Stop()
    stop.hold()
    stop.on_signal(signal.SIGTERM, None)  # waits
    with pytest.raises(SystemExit) as end:
        stop.on_signal(signal.SIGINT, None)
    assert end.value.code == 130


def test_a_signal_that_is_ignored_stays_so():
    before, stop = signal.signal(signal.SIGINT, signal.SIG_IGN), files.Stop()
    try:
        stop.listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and [*stop.handlers] == [signal.SIGTERM]
    finally:
        stop.give_back()
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_every_so_many_minutes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(files, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    checkpoint = files.Checkpoint(tmp_path / "c.pt", {}, files.Stop(2.0))
    checkpoint.resume(model=torch.nn.Linear(1, 1))
    now[0] += 119
    assert not checkpoint.due()
    now[0] += 1
    assert checkpoint.due()
    checkpoint.save(steps=1)
    assert not checkpoint.due() and files.read_checkpoint(tmp_path / "c.pt")["steps"] == 1


def test_a_folder_that_cannot_be_synchronised_is_no_failure(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(22, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", only_files)
    files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
