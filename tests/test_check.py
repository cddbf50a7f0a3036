"""results/check.py: what is printed, held against runs whose accuracies are known."""

import runpy
import shutil
import sys

import pytest
from conftest import ROOT
from test_benchmark import fake_run

from eval import read_run
from runs import result_table

PAGE = """# Holistic transfer

| method | mnist to optdigits* | mean | worst |
| --- | --- | --- | --- |
| masked_ft | 1.0 | 1.0 | 1.0 |

It closes 60.0 of the gap, masked_ft is 10.0 ± 0.0 above naive_ft; torch 2.14.1.

```bash
echo 12.3
```

## Elsewhere

Not about the tables: 77.7.
"""
RESULTS = """## By task

**digits mnist to optdigits, 5 seen***

| method | overall | seen | U/U | vs naive ft |
| --- | --- | --- | --- | --- |
| source model | 1 | 1 | 1 | 1 |
| masked_ft | 1 | 1 | 1 | 1 |

**overall**

| method | mnist to optdigits, 10 % | mnist to optdigits, 90 % |
| --- | --- | --- |
| naive_ft | 1 | 1 |

**digits elsewhere to nowhere, 5 seen**

| method | overall |
| --- | --- |
| naive_ft | 1 |
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """results/check.py as a program on pages of its own; its exit code and what it printed."""
    (tmp_path / "results").mkdir()
    (tmp_path / "methods").mkdir()
    shutil.copy(ROOT / "results" / "check.py", tmp_path / "results")
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "results" / "README.md").write_text(RESULTS)
    (tmp_path / "results" / "table.csv").write_text("")
    (tmp_path / "methods" / "naive_ft.py").write_text(
        "# overall 60.0 ± 0.0, unseen 60.0 on mnist to optdigits, ten splits"
    )
    task = {"dataset": "digits", "source": "mnist", "target": "optdigits", "seen_classes": "5"}
    for split_seed in (0, 1):
        for method, overall in (("naive_ft", 60), ("masked_ft", 80), ("naive_ft-oracle", 100)):
            fake_run(tmp_path / "runs", method, split_seed, overall, **task)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "results" / "check.py"), str(tmp_path / "runs"), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return stop.value.code, capsys.readouterr().out

    return call


def test_what_differs_is_named_and_tables_are_put_right(check, tmp_path):
    code, printed = check()
    assert code == 1 and "results/table.csv: other figures" in printed
    assert "README.md:7: 10.0 ± 0.0 is in no table of the runs" in printed, "it is 20.0"
    assert "12.3" not in printed and "77.7" not in printed and "2.14" not in printed
    assert "results/README.md: not compared: digits elsewhere to nowhere, 5 seen" in printed
    check("--write")
    page, results = ((tmp_path / name).read_text() for name in ("README.md", "results/README.md"))
    assert "| masked_ft |          60.0 ± 0.0 | 60.0 |  60.0 |" in page and "echo 12.3" in page
    assert "| source model | 50.0 ± 0.0 |" in results and "+20.0 ± 0.0" in results
    assert "| naive_ft | 1" in results, "a table that the runs do not have stays"
    code, printed = check()
    assert code == 1 and printed.splitlines()[-2:] == [
        "README.md:7: 10.0 ± 0.0 is in no table of the runs",
        "1 differences",
    ]
    (tmp_path / "README.md").write_text(page.replace("10.0 ± 0.0 above", "20.0 ± 0.0 above"))
    code, printed = check()
    assert code == 0 and printed.splitlines()[-1] == "0 differences"


def test_other_folders_and_what_a_run_prints(check, tmp_path):
    """Methods on the grid's tasks are titled by their folder, other tasks are columns beside the grid's."""
    task = {"dataset": "digits", "source": "mnist", "target": "optdigits"}
    first = fake_run(tmp_path / "runs/digits/mnist-optdigits", "ht_distill", 0, 90, seen_classes="5", **task)
    fake_run(tmp_path / "pools", "infomax_tail", 0, 70, seen_classes="5", **task)
    fake_run(tmp_path / "seen2", "masked_ft", 0, 40, seen_classes="2", **task)
    (tmp_path / "results" / "README.md").write_text(
        "**digits mnist to optdigits, 5 seen, pools**\n\n| method | overall |\n|-|-|\n"
        "| infomax_tail | 1 |\n| ht_distill | 1 |\n\n"
        "**overall**\n\n| method | mnist to optdigits, 2 seen | mnist to optdigits, 5 seen |\n|-|-|-|\n"
        "| masked_ft | 1 | 1 |\n\n"
        "| model | overall |\n|-|-|\n| result | 1 |\n"
    )
    printed = check(str(tmp_path / "pools"), str(tmp_path / "seen2"), "--write")[1]
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| infomax_tail |    70.0 |" in page and "| ht_distill   |    90.0 |" in page
    assert "| masked_ft |                       40.0 |                 80.0 ± 0.0 |" in page
    assert result_table(read_run(first)) in page and "not compared" not in printed
    assert "| infomax_tail" not in (tmp_path / "results" / "table.csv").read_text(), "table.csv is the grid's"


def test_one_digit_is_enough(check, tmp_path):
    check("--write")
    page = (tmp_path / "README.md").read_text().replace("10.0 ± 0.0 above", "20.0 ± 0.0 above")
    (tmp_path / "README.md").write_text(page)
    assert check()[0] == 0
    for file, old, new in (
        ("README.md", "60.0 of the gap", "60.1 of the gap"),
        ("results/README.md", "50.0", "50.1"),
        ("results/table.csv", "80.0", "80.1"),
        ("methods/naive_ft.py", "unseen 60.0", "unseen 60.1"),
    ):
        path = tmp_path / file
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert path.read_text() != text
        code, printed = check()
        assert code == 1 and file in printed and printed.splitlines()[-1] == "1 differences", printed
        path.write_text(text)
