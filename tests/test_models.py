import contextlib
import platform
import subprocess
import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, load_task
from torch import nn

import models
from files import InputError


@pytest.mark.parametrize("arch", ["small_cnn", "lenet", "resnet18"])
def test_classifier_is_head_of_features_of_normalised_images(arch):
    torch.manual_seed(0)
    model = models.build(arch, 7, (1, 28, 28), None if arch in models.SMALL else "none").eval()
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    logits, features = model(images, return_features=True)
    assert logits.shape == (3, 7) and features.shape == (3, model.head.in_features)
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model(images.float() / 255), logits)
    standard = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(model.head(model.backbone(standard)), logits)


def test_a_vit_has_the_size_of_its_weights_also_without_them(monkeypatch):
    def small(arch, weights, image_size):
        return torchvision.models.VisionTransformer(image_size, 14, 1, 2, 8, 8)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    assert models.build("vit_h_14", 7, (3, 518, 518), "none")(torch.rand(1, 3, 518, 518)).shape == (1, 7)


def test_vit_wants_its_size():
    with pytest.raises(InputError, match="--arch vit_b_16: needs images of 224x224, these are 28x28"):
        models.build("vit_b_16", 7, (1, 28, 28), "none")


@pytest.mark.parametrize("arch", ["resnet", "fasterrcnn_resnet50_fpn", "eval"])
def test_unknown_architecture(arch):
    with pytest.raises(InputError, match=f"--arch {arch}: unknown; choose small_cnn, lenet, resnet18"):
        models.build(arch, 7, (3, 64, 64))


def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(InputError, match=r"resnet18 could not be downloaded.*--weights FILE"):
        models.build("resnet18", 7, (3, 64, 64))


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    published = torchvision.models.resnet18(weights=None)
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    model = models.build("resnet18", 7, (3, 64, 64), str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.backbone.conv1.weight, published.conv1.weight)
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(
        InputError, match=r"wrong.pth: does not fit the model; missing: bn1.weight.*conv1.weight \(2,\), not"
    ):
        models.build("resnet18", 7, (3, 64, 64), str(tmp_path / "wrong.pth"))
    with pytest.raises(InputError, match=r"--weights nowhere.pth"):
        models.build("resnet18", 7, (3, 64, 64), "nowhere.pth")


def test_source_model_is_trained_once(tmp_path, monkeypatch):
    task = load_task("digits")
    first = models.source_model(task, "small_cnn", cache=tmp_path)
    monkeypatch.setattr(models, "train_source", lambda *a, **k: pytest.fail("trained again"))
    second = models.source_model(load_task("digits", split_seed=5), "small_cnn", cache=tmp_path)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not first.training and not any(layer.training for layer in models.batchnorms(first))


@pytest.mark.parametrize("change", [{"seed": 1}, {"arch": "lenet"}, {"amp": torch.bfloat16}, "images", "recipe"])
def test_what_determines_a_source_model_is_in_its_key(tmp_path, monkeypatch, change):
    trained = []
    monkeypatch.setattr(models, "train_source", lambda *a, **k: trained.append(1))
    task = load_task("digits")
    models.source_model(task, "small_cnn", cache=tmp_path)
    if change == "images":
        task.source_train.images[0] = 1
    elif change == "recipe":
        task.source_recipe = {**task.source_recipe, "lr": 1.0}
    models.source_model(task, **{"arch": "small_cnn", **(change if isinstance(change, dict) else {})}, cache=tmp_path)
    assert len(trained) == 2


def test_a_source_model_of_a_gpu_is_not_taken_for_a_cpus():
    task = load_task("digits")
    places = "cpu", "cuda", "cuda:1"
    cpu, cuda, other = (models.source_key(task, "small_cnn", None, 0, torch.device(place), None) for place in places)
    assert cpu != cuda == other


def test_source_checkpoints(tmp_path):
    task = load_task("digits")
    model = models.build("small_cnn", 10, (1, 28, 28))
    good = {"model": model.state_dict(), "classes": task.classes, "arch": "small_cnn"}
    path = str(tmp_path / "model.pt")

    def load(content):
        torch.save(content, path)
        return models.source_model(task, "small_cnn", checkpoint=path, cache=tmp_path)

    for content in (good, model.state_dict()):
        assert torch.equal(load(content).head.weight, model.head.weight)
    with pytest.raises(InputError, match=r"model.pt: its classes or their order are not those of digits"):
        load({**good, "classes": task.classes[::-1]})
    with pytest.raises(InputError, match=r"model.pt: does not fit the model; of another shape: head.weight \(9, 128\)"):
        load(models.build("small_cnn", 9, (1, 28, 28)).state_dict() | {"head.bias": torch.zeros(10)})
    with pytest.raises(InputError, match=r"model.pt: does not fit the model; missing"):
        load([1, 2])
    (tmp_path / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"model.pt: not a readable checkpoint"):
        models.source_model(task, "small_cnn", checkpoint=path)
    assert not (tmp_path / "source_models").exists()


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        models.read_checkpoint(tmp_path / "evil.pt", "--source-checkpoint")
    assert not (tmp_path / "ran").exists()


def test_device_without_one():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: not available here"):
            models.choose_device("cuda", "auto", "small_cnn")
    with pytest.raises(InputError, match="--device toaster"):
        models.choose_device("toaster", "auto", "small_cnn")


@pytest.mark.parametrize(
    ("name", "dtype"), [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", None)]
)
def test_amp_on_a_cpu(name, dtype, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True}, raising=False)
    assert models.choose_device("cpu", "auto", "resnet18") == (cpu, dtype)
    assert models.choose_device("cpu", "auto", "small_cnn") == (cpu, None)
    assert models.choose_device("cpu", "off", "resnet18") == (cpu, None)
    assert models.choose_device("cpu", "bfloat16", "small_cnn") == (cpu, torch.bfloat16)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert models.choose_device("cpu", "auto", "resnet18") == (cpu, None)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_amp_on_a_gpu_does_not_count_emulation(native, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))  # the GPU that is not there
    for name in ("cuda", "cuda:1"):
        device = torch.device(name)
        assert models.choose_device(name, "auto", "resnet18") == (device, dtype)
        assert models.choose_device(name, "auto", "small_cnn") == (device, None)
        assert models.choose_device(name, "off", "resnet18") == (device, None)
    assert asked == [torch.device("cuda"), torch.device("cuda:1")]


FAULTS = """
import resource, torch, models
{}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(2):
    before = faults()
    for _ in range(50):
        kept = [torch.ones(1 << 20) for _ in range(4)]
        del kept
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory allocator of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    # glibc left alone moves its threshold and may keep the memory by chance: the other process pins it at its start
    handed_back = "import ctypes; ctypes.CDLL(None).mallopt(-3, 2**17)"
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(line)], cwd=ROOT))
        for line in ("models.tune_process()", handed_back)
    )
    assert few < 100 < 10_000 < many


def test_amp_gives_float32_logits_and_features_in_its_precision():
    model = models.build("small_cnn", 7, (1, 28, 28)).eval()
    images = torch.rand(4, 1, 28, 28)
    exact = model(images)
    model.amp = torch.bfloat16
    logits, features = model(images, return_features=True)
    assert logits.dtype == features.dtype == torch.float32
    assert not torch.equal(logits, exact) and torch.allclose(logits, exact, atol=0.1)


@pytest.mark.parametrize("caller", [False, True], ids=["", "in an autocast of the caller's"])
def test_the_head_is_in_float32(caller):
    """A bfloat16 head gives logits of 16 to 32 in steps of 0.125: of 397 classes the best two tie in 4 % of images."""
    torch.manual_seed(0)
    model = models.build("small_cnn", 397, (1, 28, 28)).eval()
    model.head.weight.data *= 300
    model.amp = torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=caller):
        logits, features = model(torch.rand(200, 1, 28, 28), return_features=True)
    assert logits.abs().max() > 16 and not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias, rtol=1e-6, atol=1e-6)
    first, second = logits.topk(2, dim=1).values.T
    assert (first > second).all()
    first, second = logits.bfloat16().topk(2, dim=1).values.T
    assert (first == second).any()


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("arch", ["small_cnn", "resnet18"])
def test_one_static_graph_trains_a_compiled_model(arch, amp):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = models.build(arch, 7, (3, 32, 32), None if arch in models.SMALL else "none")
    model.amp = amp
    model.compile(backend=count)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    test_images = torch.randint(0, 256, (19, 3, 32, 32), dtype=torch.uint8)
    before = models.predict(model, test_images, batch_size=8)  # 8, 8 and 3
    for _ in range(2):
        model.train()
        for layer in models.batchnorms(model):
            layer.eval()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
            optimizer.step()
        after = models.predict(model, test_images, batch_size=8)
    assert len(graphs) == 1 and not (before == after).all()
    shapes = [node.meta["example_value"].shape for node in graphs[0].graph.nodes if node.op == "placeholder"]
    assert all(isinstance(side, int) for shape in shapes for side in shape)


def test_evaluation_halves_its_batches_until_they_fit():
    class Small(nn.Module):
        def __init__(self, most):
            super().__init__()
            self.most, self.sizes, self.weight = most, [], nn.Parameter(torch.ones(1))

        def forward(self, images, return_features):
            self.sizes.append(len(images))
            if len(images) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images.float().mean((1, 2, 3))[:, None]

    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    model = Small(6)
    assert models.predict(model, images, batch_size=16).ravel().tolist() == list(range(20))
    assert model.sizes == [16, 8, 4, 4, 4, 4, 4] and model.training
    with pytest.raises(torch.OutOfMemoryError):
        models.predict(Small(0), images)


def test_images_of_the_source_obey_resident(tmp_path, monkeypatch):
    task, asked = load_task("digits"), []
    monkeypatch.setattr(task.source_train, "batches", lambda *args, resident: asked.append(resident))
    for resident in ("off", "on"):
        with pytest.raises(TypeError):
            models.source_model(task, "small_cnn", cache=tmp_path, resident=resident)
    assert asked == ["off", "auto"]


def test_images_are_normalised_as_torchvision_says(monkeypatch):
    monkeypatch.setattr(models, "original", lambda arch, weights: (torchvision.models.resnet18(), "fc"))  # a small one
    for arch, mean in (("efficientnet_v2_l", [0.5, 0.5, 0.5]), ("efficientnet_v2_m", [0.485, 0.456, 0.406])):
        model = models.build(arch, 3, (3, 32, 32), "none")
        torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean))


@pytest.mark.parametrize(
    ("side", "cpu", "cuda"), [(28, 64, 512), (112, 15, 512), (224, 4, 512), (336, 4, 227), (2000, 4, 16)]
)
def test_larger_images_are_evaluated_fewer_at_a_time(side, cpu, cuda):
    shape = torch.Size((3, side, side))
    assert models.evaluation_batch(torch.device("cpu"), shape) == cpu
    assert models.evaluation_batch(torch.device("cuda"), shape) == cuda


def test_batchnorms_are_found():
    assert len(models.batchnorms(models.build("small_cnn", 7, (1, 28, 28)))) == 3
    assert models.batchnorms(models.build("lenet", 7, (1, 28, 28))) == []
    assert isinstance(models.batchnorms(models.build("resnet18", 7, (3, 64, 64), "none"))[0], nn.BatchNorm2d)


def test_source_model_does_not_depend_on_the_number_of_threads(tmp_path):
    before, heads = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        heads.append(models.source_model(load_task("digits"), "small_cnn", cache=tmp_path / str(threads)).head.weight)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(*heads)
