"""What the README tells people to do, done."""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import replicas
import torch
from conftest import ROOT

import data
import predict
import runs

pytestmark = pytest.mark.usefixtures("quick_start")
README, DATA_README = ((ROOT / name).read_text() for name in ("README.md", "data/README.md"))
CLASSES = [f"{name}_{i}" for i in range(2, 0, -1) for name in ("valve", "bolt", "nut", "gear", "cog", "pin")]
SEEN = ["bolt_1", "cog_2", "gear_1", "nut_2", "valve_2"]
SHORT = "--image-size 32 --epochs 2 --steps-per-epoch 10 --device cpu"


def block(words, text=README):
    """The first code block after these words."""
    return re.search(rf"{re.escape(words)}.*?```\w+\n(.*?)```", text, re.DOTALL)[1]


def test_the_loss_is_the_scripts_very_code():
    code = textwrap.indent(block("ours:").strip(), " " * 16).replace("\n\n", "\n")
    assert "relations(" in code and "share(" in code
    assert code in (ROOT / "methods" / "ht_distill.py").read_text()


def make_network(arch):
    if arch.startswith("timm:"):
        timm = pytest.importorskip("timm", reason="an optional requirement, see requirements-optional.txt")
        made = timm.create_model(arch.removeprefix("timm:"), num_classes=12)
        return made, made.pretrained_cfg["mean"], made.pretrained_cfg["std"]
    import torchvision

    made = torchvision.models.get_model(arch, num_classes=12)
    return made, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def train_elsewhere(arch, folder):
    """What somebody's own program does: train on images of all classes, save the state dict and the classes."""
    torch.manual_seed(0)
    network, mean, std = make_network(arch)
    replicas.tree(folder / "elsewhere", CLASSES, 4)
    files = [str(folder / "elsewhere" / name / f"{i:05d}.jpg") for name in CLASSES for i in range(4)]
    pixels = np.stack([data.images.read_image(file, 32) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    labels = torch.arange(12).repeat_interleave(4)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "hers.pth")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def shell(commands, folder, project=ROOT):
    """The commands, with the project's programs and short runs, in a folder of the reader's own."""
    commands = re.sub(r"^python (\S+)", rf"{sys.executable} {project}/\1", commands, flags=re.MULTILINE)
    commands = re.sub(r"^(.*/methods/.*)$", rf"\1 {SHORT}", commands, flags=re.MULTILINE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ec", commands], check=False, cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def make_photos(folder):
    """60 labelled images of 5 classes, and 200 of all 12 without labels, as files in one folder."""
    for name in SEEN:
        for i in range(12):
            replicas.photo(folder / "photos" / "new_camera" / name / f"{i}.jpg", CLASSES.index(name), 100 + i)
    (folder / "unlabelled").mkdir()
    for i in range(200):
        replicas.photo(folder / "unlabelled" / f"{i:03d}.jpg", i % 12, 1000 + i)


@pytest.fixture(scope="module")
def hers(tmp_path_factory):
    """By the name of a network, a folder with her model of it and her images, to be copied."""

    @functools.cache
    def make(arch):
        folder = tmp_path_factory.mktemp("hers")
        train_elsewhere(arch, folder)
        make_photos(folder)
        return folder

    return make


def check_predictions(folder, run, done, arrays):
    """200 rows for the unlabelled, and the run's own accuracy to the last digit on its own test images."""
    predicted = rows(folder / "predictions.csv")
    assert len(predicted) == 200 and {row["class"] for row in predicted} <= set(CLASSES)
    assert all((row["class"] in SEEN) == (row["group"] == "seen") for row in predicted)
    domain = data.FOLDER["load"]("new_camera", folder / "photos")
    _, test = data.split_target(domain, "new_camera", 0)
    files = [folder / "photos" / domain.images[i] for i in test]
    (folder / "test.txt").write_text("\n".join(map(str, files)))
    shell(f"python predict.py {run} test.txt --out test.csv", folder)
    right = [row["class"] == row["file"].split("/")[-2] for row in rows(folder / "test.csv")]
    assert len(right) == len(arrays["test_labels"]) == 20 and 100 * np.mean(right) == done["final"]["seen"]


def check_exports(arch, run):
    model, images = predict.load(run), torch.rand(3, 3, 32, 32)
    assert model.classes == CLASSES and [CLASSES[i] for i in model.seen.nonzero()] == sorted(SEEN, key=CLASSES.index)
    want = model(images).detach()
    theirs = make_network(arch)[0].eval()
    theirs.load_state_dict(torch.load(run / "model.state_dict.pt", weights_only=True))
    model, theirs, exact = model.double(), theirs.double(), images.double()  # another layout rounds otherwise
    torch.testing.assert_close(theirs((exact - model.mean) / model.std), model(exact), atol=1e-5, rtol=0)
    onnxruntime = pytest.importorskip("onnxruntime", reason="an optional requirement, see requirements-optional.txt")
    session = onnxruntime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], want, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet10t"])
def test_your_model_your_images_your_predictions(arch, hers, tmp_path, read):
    shutil.copytree(hers(arch), tmp_path, dirs_exist_ok=True)
    commands = block("## Your images, your predictions").replace("--arch resnet18", f"--arch {arch}")
    try:
        import onnx  # noqa: F401
    except ImportError:
        commands = commands.replace("--export onnx", "--export pt2 --overwrite")
    printed = shell(commands, tmp_path)
    assert "12 classes, 5 seen: valve_2, nut_2, cog_2, bolt_1, gear_1; unseen: bolt_2, " in printed
    assert "images of new_camera: 40 to train on, 20 to test on" in printed
    run = tmp_path / "runs" / "folder" / "hers-new_camera" / "ht_distill" / "split0-seed0"
    done, arrays, log = read(run)
    assert log[0]["train_accuracy"] > 80 and "check the order" not in printed
    check_predictions(tmp_path, run, done, arrays)
    check_exports(arch, run)


def test_classes_in_a_wrong_order_are_warned_about(hers, tmp_path):
    shutil.copytree(hers("resnet18"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "classes.txt").write_text("\n".join(sorted(CLASSES)) + "\n")
    command = "\n".join(block("## Your images, your predictions").splitlines()[:3])
    printed = shell(command, tmp_path)
    assert re.search(r"right on \d+% of the labelled images, with its classes in another order on (8|9|10)\d%", printed)
    assert "check the order of --classes" in printed
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    with pytest.raises(AssertionError, match=r"holds a run with classes bolt_1,bolt_2,.* pass --overwrite"):
        shell(command, tmp_path)


@pytest.fixture
def project(tmp_path):
    """A copy of the project, to add to."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "results", "runs", "datasets", "tests"))
    return folder


QUICK = "--source-steps 20 --epochs 1 --steps-per-epoch 2 --device cpu"


def test_add_a_method(project):
    before = (project / "methods" / "naive_ft.py").read_text()
    commands = block("**Add a method**").replace("--split-seeds 0-2", f'--split-seeds 0 --flags="{QUICK}"')
    commands = commands.replace("--split-seeds", "--pairs digits:mnist:optdigits --split-seeds")
    printed = shell(commands, project, project)
    assert "| smoothed " in printed and "| naive_ft " in printed
    loss = "F.cross_entropy(model(images), labels)"
    assert before.count(loss) == 1
    mine = (project / "methods" / "smoothed.py").read_text()
    assert mine == before.replace(loss, "F.cross_entropy(model(images), labels, label_smoothing=0.1)")


def test_add_a_data_set(project):
    code = block("## Add a data set", DATA_README)
    entry = block(code, DATA_README)
    (project / "data" / "stripes.py").write_text(code)
    with open(project / "data" / "__init__.py", "a") as file:
        file.write(entry)
    which = f"--methods ht_distill --pairs stripes:thin:thick --split-seeds 0 --flags='{QUICK}'"
    shell(f"python benchmark.py run {which}", project, project)
    (done,) = (project / "runs" / "stripes").rglob("done.json")
    assert json.loads(done.read_text())["source"]["overall"] > 30


def test_the_grids_commands(tmp_path):
    text = block("More, and what failed:").partition("python benchmark.py report")[0]
    lines = shell(text.replace("benchmark.py run", "benchmark.py run --print-commands"), tmp_path).splitlines()
    assert len(lines) == 6 * 8 * 10
    paper = next(line for line in lines if "ht_distill_paper" in line)
    own = set(re.findall(r"^    (\w+): ", (ROOT / "methods" / "ht_distill.py").read_text(), re.MULTILINE))
    own |= {field.name for kind in (data.TaskArgs, runs.RunArgs) for field in dataclasses.fields(kind)}
    assert {word[2:].replace("-", "_") for word in paper.split() if word.startswith("--")} <= own
