"""An adapted model on new images, and its export: as an engineer would use them."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import replicas
import torch
import torchvision
from conftest import ROOT

import models
import predict
from data.decode import read_image
from files import InputError

pytestmark = pytest.mark.usefixtures("quick_start")
WHY = "an optional requirement, see requirements-optional.txt"
SIZE = ("--image-size", "32", "--batch-size", "4")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two domains with a split of their own; the target's training part has two of four classes."""
    root = tmp_path_factory.mktemp("photos")
    names = ["cup", "fork", "knife", "plate"]
    replicas.tree(root / "a", names, 10)
    replicas.tree(root / "b" / "train", names[:2], 6)
    replicas.tree(root / "b" / "test", names, 5)
    return root


@pytest.fixture
def adapted(photos, run_method):
    """A run of naive_ft on the photographs, by the network's name."""

    def call(arch="small_cnn", method="naive_ft"):
        flags = ("--dataset", "folder", "--data-root", str(photos), "--source", "a", "--target", "b")
        flags += ("--arch", arch, "--name", f"{method}-{arch}")
        weights = () if arch in models.SMALL else ("--weights", "none")
        return run_method(method, *flags, *weights, *SIZE, "--overwrite")[1]

    return call


def program(*words, **how):
    command = [sys.executable, str(ROOT / "predict.py"), *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, **how)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_as_good_as_the_run_says(adapted, photos, read, tmp_path):
    folder = adapted()
    done, arrays, _ = read(folder)
    out = program(folder, photos / "b" / "test", "--out", tmp_path / "p.csv")
    assert out.returncode == 0, out.stderr
    rows = read_rows(tmp_path / "p.csv")
    assert list(rows[0]) == list(predict.COLUMNS) and len(rows) == 20
    right = [row["class"] == row["file"].split("/")[-2] for row in rows]
    assert 100 * np.mean(right) == done["final"]["overall"]
    by_name = {row["file"]: row for row in rows}
    names = sorted(by_name)  # the order of the run's test images
    logits = arrays["test_logits"][np.argsort(arrays["test_labels"], kind="stable")]
    probability = torch.from_numpy(logits).softmax(1).max(1).values
    assert [float(by_name[name]["probability"]) for name in names] == pytest.approx(probability.tolist(), abs=2e-6)
    assert {(row["class"] in ("cup", "fork"), row["group"]) for row in rows} <= {(True, "seen"), (False, "unseen")}
    assert all(row["class"] != row["runner_up"] for row in rows)
    assert "20 images" in out.stdout and "0 skipped" in out.stdout


def test_wrong_words_are_named(adapted, photos, tmp_path):
    folder = adapted()
    (tmp_path / "file").write_text("in the way of a folder")
    for words, match in (
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--batch-size", "-1"), "--batch-size -1: must be at least 1"),
        (("--out", tmp_path / "file" / "p.csv"), "file: no folder can be made there"),
    ):
        out = program(folder, photos / "b" / "test", *words, cwd=tmp_path)
        assert out.returncode == 2 and match in out.stderr and "Traceback" not in out.stderr, out.stderr
    assert not list(tmp_path.glob("*.csv"))


def test_a_list_may_have_any_bytes(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9.jpg\n\nb.jpg\n")  # with a mark, as Windows does
    assert predict.find_images([tmp_path / "list.txt"]) == ["caf\udce9.jpg", "b.jpg"]


def test_folders_at_any_depth(tmp_path):
    for name in ("x/a.jpg", "x/y/b.PNG", "x/.thumbnails/c.jpg", "x/.d.jpg", "x/e.txt", "z/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "z")
    (tmp_path / "x" / "y" / "back").symlink_to(tmp_path / "x")
    found = predict.find_images([tmp_path / "x"])
    assert found == [str(tmp_path / "x" / name) for name in ("a.jpg", "link/f.jpg", "y/b.PNG")]


def test_an_export_is_compared_before_it_takes_the_place(adapted, tmp_path, monkeypatch):
    model = predict.load(adapted())
    model.head.weight.data *= 1e4  # large logits differ by more, and no more in relation
    path = tmp_path / "model.pt2"
    path.write_text("the one before")
    load = torch.export.load

    class Wrong:
        def __init__(self, file):
            self.program = load(file)

        def module(self):
            return lambda images: self.program.module()(images) * 1.01

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(InputError, match=r"--export pt2: what was written differs from the model by 0\.01; it was del"):
        predict.export(model, "pt2", path)
    assert path.read_text() == "the one before" and os.listdir(tmp_path) == ["model.pt2"]
    monkeypatch.setattr(torch.export, "load", load)
    predict.export(model, "pt2", path)
    assert path.read_bytes()[:2] == b"PK" and os.listdir(tmp_path) == ["model.pt2"]


def test_export_leaves_the_model_as_it_is(adapted, tmp_path):
    model = predict.load(adapted())
    model.amp = torch.bfloat16
    predict.export(model, "pt2", tmp_path / "model.pt2")
    assert model.amp is torch.bfloat16


def test_any_list_and_unreadable_images(adapted, photos, tmp_path):
    folder = adapted()
    good = sorted((photos / "b" / "test" / "cup").iterdir())
    (tmp_path / "more").mkdir()
    shutil.copy(good[0], tmp_path / "more" / "with, comma.jpg")
    (tmp_path / "more" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(f"{good[1]}\n\n{good[2]}\n{good[1]}\n{tmp_path}/missing.jpg\n")
    out = program(folder, good[0], tmp_path / "more", tmp_path / "list.txt", "--out", tmp_path / "p.csv")
    assert out.returncode == 0, out.stderr
    assert [row["file"] for row in read_rows(tmp_path / "p.csv")] == [
        str(good[0]), str(tmp_path / "more" / "with, comma.jpg"), str(good[1]), str(good[2])
    ]  # fmt: skip
    assert "broken.jpg: not an image in a known format" in out.stderr and "missing.jpg: missing" in out.stderr
    before = (tmp_path / "p.csv").read_bytes()
    again = program(folder, good[3], "--out", tmp_path / "p.csv")
    assert again.returncode == 2 and "exists already; pass --overwrite" in again.stderr
    assert (tmp_path / "p.csv").read_bytes() == before
    for words, message in (
        ((folder, tmp_path / "nowhere"), "nowhere: no such image, folder or list"),
        ((tmp_path, good[0]), "not a readable checkpoint"),
        ((folder,), "name images to predict, or pass --export"),
    ):
        wrong = program(*words, "--out", tmp_path / "q.csv")
        assert wrong.returncode == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "more", "p.csv"]


def test_a_stopped_start_goes_on_and_no_row_is_lost_or_twice(adapted, photos, tmp_path):
    folder, many = adapted(), tmp_path / "many"
    many.mkdir()
    source = sorted((photos / "b" / "test" / "cup").iterdir())[0]
    for i in range(600):
        os.link(source, many / f"{i:04d}.jpg")
    command = [sys.executable, str(ROOT / "predict.py"), folder, many, "--out", tmp_path / "p.csv", "--batch-size", "4"]
    start = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any(part.stat().st_size for part in tmp_path.glob(".p.csv.*.part")) and start.poll() is None:
        time.sleep(0.01)
    start.send_signal(signal.SIGINT)
    _, errors = start.communicate()
    assert start.returncode == 130 and "the same command goes on" in errors, errors
    (part,) = tmp_path.glob(".p.csv.*.part")
    before = part.read_bytes().count(b"\n")
    assert 0 < before < 600 and not (tmp_path / "p.csv").exists()
    with open(part, "ab") as stream:
        stream.write(b"cut in the mid")
    out = program(*command[2:])
    assert out.returncode == 0, out.stderr
    files = [row["file"] for row in read_rows(tmp_path / "p.csv")]
    assert sorted(files) == [str(many / f"{i:04d}.jpg") for i in range(600)] and not part.exists()


def test_a_row_is_cut_within_a_name_that_has_a_line_break(tmp_path):
    whole, part = b'file,class\nx.jpg,cup\n"a\nb.jpg",cup\n', tmp_path / "part"
    names, ends = ["file", "x.jpg", "a\nb.jpg"], [0, 11, 21, len(whole)]
    for length in range(len(whole) + 1):
        part.write_bytes(whole[:length])
        kept = max(end for end in ends if end <= length)
        assert predict.whole_rows(part) == set(names[: ends.index(kept)])
        assert part.read_bytes() == whole[:kept]


def test_rows_that_are_there_are_not_predicted_again(tmp_path, monkeypatch):
    part, asked = tmp_path / "part", []
    part.write_text("a.png,kept,1,seen,x\ncut")
    monkeypatch.setattr(predict, "decode", lambda file, model: asked.append(file) or (file, "why"))
    assert predict.predict(None, ["a.png", "b.png"], part, 4) == {"b.png": "why"}
    assert asked == ["b.png"] and part.read_text() == "a.png,kept,1,seen,x\n"


@pytest.mark.parametrize(("arch", "fit"), [("clip:tiny", "crop"), ("resnet18", "squash")])
def test_images_are_decoded_as_the_runs_were(arch, fit, tmp_path):
    replicas.photo(tmp_path / "x.png", 1)
    model = types.SimpleNamespace(arch=arch, image_size=8, channels=3)
    pixels = predict.decode(str(tmp_path / "x.png"), model)[1].movedim(0, 2).numpy()
    assert np.array_equal(pixels, read_image(tmp_path / "x.png", 8, fit))


def test_onnx_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="--export onnx: needs packages that are optional"):
        predict.export_onnx(None, None, tmp_path / "model.onnx", {})


def test_export_to_torch(adapted):  # resnet18 and timm: see test_readme
    folder = adapted()
    model = predict.load(folder)
    images = torch.rand(5, 3, 32, 32)
    want = model(images)
    assert model.classes == ["cup", "fork", "knife", "plate"] and model.seen.tolist() == [True, True, False, False]
    assert program(folder, "--export", "pt2").returncode == 0
    got = torch.export.load(folder / "model.pt2").module()(images)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    again = program(folder, "--export", "pt2")
    assert again.returncode == 2 and "exists already" in again.stderr
    out = program(folder, "--export", "state-dict")
    assert out.returncode == 2 and "small_cnn has no naming of its own" in out.stderr


def test_a_head_that_is_a_convolution_is_exported_as_one(tmp_path):
    timm, arch = pytest.importorskip("timm", reason=WHY), "resnetv2_50x1_bit"
    model = models.build(f"timm:{arch}", 4, (3, 32, 32), "none").eval()
    model.classes, model.seen, model.arch = list("abcd"), torch.tensor([True, False, True, False]), f"timm:{arch}"
    model.image_size, model.channels = 32, 3
    predict.export(model, "state-dict", tmp_path / "model.state_dict.pt")
    state = torch.load(tmp_path / "model.state_dict.pt", weights_only=True)
    assert state["head.fc.weight"].shape == (4, 2048, 1, 1)
    theirs, images = timm.create_model(arch, num_classes=4).eval(), torch.rand(5, 3, 32, 32)
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs((images - model.mean) / model.std), model(images), atol=1e-5, rtol=1e-5)


def test_export_to_onnx(adapted):
    onnx, onnxruntime = (pytest.importorskip(name, reason=WHY) for name in ("onnx", "onnxruntime"))
    folder = adapted("resnet18")
    out = program(folder, "--export", "onnx")
    assert out.returncode == 0, out.stderr
    model = predict.load(folder)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 7):
        images = torch.rand(count, 3, 32, 32)
        got = session.run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(got, model(images).detach().numpy(), atol=1e-4)
    about = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert about["classes"] == '["cup", "fork", "knife", "plate"]' and about["image_size"] == "32"
    assert "from 0 to 1" in about["preprocessing"]


def test_attention_is_exported_to_onnx(tmp_path):
    pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    vit = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    vit.heads = torch.nn.Identity()
    model, images = models.Classifier(vit, torch.nn.Linear(8, 3), [0.5], [0.5]).eval(), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        got = predict.export_onnx(model, images, tmp_path / "model.onnx", {})
        torch.testing.assert_close(got, model(images), atol=1e-5, rtol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_digits_are_predicted_in_gray(run_method, tmp_path):
    from PIL import Image

    names, folder = run_method("naive_ft", "--name", "gray")
    images = names["task"].target_test.images[:20]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02d}.png")
    model = predict.load(folder)
    assert (model.channels, model.image_size) == (1, 28)
    files = predict.find_images([tmp_path])
    assert all(torch.equal(predict.decode(file, model)[1], image) for file, image in zip(files, images, strict=True))
    with pytest.raises(InputError, match="not the model of a run"):
        torch.save({"model": {}}, tmp_path / "model.pt")
        predict.load(tmp_path)
