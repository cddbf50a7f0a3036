"""Files that survive: atomic writes, locks, the request to stop. Checkpoints: see test_runs.py."""

import os

import pytest

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
