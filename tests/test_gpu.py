"""What only a CUDA GPU can show; skipped elsewhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import models
import runs
from models import predict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = ("--device", "cuda")
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))


@pytest.fixture
def float32():
    """What is float32 is multiplied in float32, not in TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def waiting():
    """waiting("error") makes it an error to wait for the device, to waiting("default") or the end of the test."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def mapped_images(folder, pixels):
    """data.Images of pixels uint8 [N, S, S, 3], in a file in the folder."""
    np.save(folder / "x.npy", pixels)
    return data.Images(np.load(folder / "x.npy", mmap_mode="r"), np.arange(len(pixels)), "key")


@pytest.mark.parametrize("amp", ["bfloat16", "float16", "off"])
@pytest.mark.parametrize("method", ["naive_ft", "ht_distill", "lolsgd", "grad_proj", "lp_ft"])
def test_methods_run_in_every_precision(method, amp, run_method, read, runs_dir):  # its source models are not a CPU's
    _, folder = run_method(method, *CUDA, "--amp", amp, "--name", f"{method}-{amp}", runs=runs_dir / "cuda")
    done, arrays, log = read(folder)
    assert done["versions"]["gpu"] == torch.cuda.get_device_name(0) and np.isfinite(arrays["test_logits"]).all()
    assert done["versions"]["amp"] == (None if amp == "off" else f"torch.{amp}")
    assert np.isfinite(log[2]["loss"])


def test_devices_and_their_precision():
    cuda = torch.device("cuda")
    assert models.choose_device("auto", "auto", "small_cnn") == (cuda, None)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert models.choose_device("auto", "auto", "resnet18") == (cuda, dtype)
    assert models.choose_device("cuda", "off", "resnet18") == (cuda, None)


@pytest.mark.parametrize(("amp", "error"), [(torch.bfloat16, 3e-2), (torch.float16, 1e-2), (None, 1e-4)])
def test_the_gpu_computes_what_the_cpu_does(amp, error, float32):
    task = data.load_task(data.TaskArgs("digits"))
    torch.manual_seed(0)
    model = models.build("small_cnn", 10, (1, 28, 28)).to(memory_format=torch.channels_last)
    want = predict(model, task.target_test.images[:100])
    model.cuda().amp = amp
    got = predict(model, task.target_test.images[:100])
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < error * np.abs(want).max()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_the_head_is_in_float32(amp, float32):
    model = models.build("small_cnn", 397, (1, 28, 28)).cuda().eval()
    model.amp = amp
    with torch.no_grad(), torch.autocast("cuda", amp):
        logits, features = model(torch.rand(50, 1, 28, 28, device="cuda"), return_features=True)
    assert logits.dtype == features.dtype == torch.float32
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", [True, False])
def test_evaluation_gives_what_the_model_does(mapped, float32, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    images = torch.from_numpy(pixels).movedim(3, 1).contiguous()
    model = models.build("resnet18", 7, (3, 32, 32), "none").to("cuda", memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        want = model(images.cuda())
    # each batch waits in the device's queue while the next ones are read, pinned and copied
    model.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))
    got = predict(model, mapped_images(tmp_path, pixels) if mapped else images, batch_size=32)
    torch.testing.assert_close(torch.from_numpy(got), want.cpu(), rtol=1e-3, atol=1e-3)


def test_evaluation_waits_only_at_its_end(monkeypatch, waiting):
    model = models.build("resnet18", 7, (3, 64, 64), "none").to("cuda", memory_format=torch.channels_last)
    images = torch.zeros(256, 3, 64, 64, dtype=torch.uint8)
    predict(model, images, batch_size=64)
    cat = torch.cat

    def cat_at_the_end(*arguments):
        waiting("default")
        return cat(*arguments)

    monkeypatch.setattr(torch, "cat", cat_at_the_end)
    waiting("error")
    predict(model, images, batch_size=64)


@pytest.mark.parametrize("arch", ["small_cnn", "resnet50"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_channels_last_is_kept_through_the_model(arch, amp):
    model = models.build(arch, 7, (3, 64, 64), None if arch in models.SMALL else "none")
    model.to("cuda", memory_format=torch.channels_last).amp = amp
    wrong, seen = [], []

    def look(module, _, output):
        if output.ndim == 4 and min(output.shape[1:]) > 1:
            seen.append(output.dtype)
            wrong.extend([module] * (not output.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        module.register_forward_hook(look)
    split = data.Split(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8) % 7, {"crop": 0.7})
    images, labels = split.batches(4, "cuda", 0)(0)
    F.cross_entropy(model(images), labels).backward()
    assert not wrong and amp in seen


@pytest.mark.parametrize(("amp", "error"), [("off", 0.05), ("bfloat16", 0.1)])
@pytest.mark.parametrize("method", ["naive_ft", "ht_distill"])
def test_compile(method, amp, error, run_method, read, runs_dir):
    flags = (*CUDA, "--amp", amp, "--name", f"{method}-{amp}")
    plain = read(run_method(method, *flags, runs=runs_dir / "cuda")[1])[1]["test_logits"]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    flags = (*flags[:-1], f"{method}-{amp}-compiled", "--compile")
    compiled = read(run_method(method, *flags, runs=runs_dir / "cuda")[1])[1]["test_logits"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert np.abs(plain - compiled).max() < error * np.abs(plain).max()


@pytest.mark.parametrize("mapped", [True, False])
def test_batches_from_everywhere_are_the_same(mapped, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), np.uint8)
    images = mapped_images(tmp_path, pixels) if mapped else torch.from_numpy(pixels).movedim(3, 1)
    split = data.Split(images, torch.arange(500), {})
    resident, read, here = (
        split.batches(64, device, 0, True, where) for device, where in (("cuda", "on"), ("cuda", "off"), ("cpu", "off"))
    )
    assert resident.images.is_cuda and resident.reader is None and read.stream is not None
    for step in range(20):
        torch.cuda._sleep(10_000_000)  # the batch after next is copied while the device is still busy
        batches = [[x.cpu() for x in batch(step)] for batch in (resident, read, here)]
        for images, labels in batches[:2]:
            assert torch.equal(labels, batches[2][1])
            torch.testing.assert_close(images, batches[2][0], rtol=0, atol=1e-6)


def test_resident_where_it_fits(monkeypatch):
    split = data.Split(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.long), {})
    assert split.batches(8, "cuda", 0).images.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 64 * 2 - 1, 10**9))
    assert not split.batches(8, "cuda", 0).images.is_cuda


@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits_for_the_device(method, run_method, monkeypatch, waiting, runs_dir):
    step, evaluate, forbidden = runs.Run.step, runs.Run.evaluate, []

    def watched_step(self, *arguments, **more):
        waiting("default")
        step(self, *arguments, **more)
        if self.steps % self.args.steps_per_epoch:  # else the epoch is over, and what follows may wait
            waiting("error")  # to the end of the next step
            forbidden.append(self.steps)

    def watched_evaluate(self, *arguments, **more):
        waiting("default")  # of a method whose epochs have other numbers of steps
        evaluate(self, *arguments, **more)

    monkeypatch.setattr(runs.Run, "step", watched_step)
    monkeypatch.setattr(runs.Run, "evaluate", watched_evaluate)
    run_method(method, *CUDA, "--amp", "bfloat16", "--name", f"{method}-strict", runs=runs_dir / "cuda")
    assert len(forbidden) >= 4  # of three steps in each of two epochs


@pytest.mark.parametrize("resident", ["on", "off"])
def test_a_step_never_waits_for_the_device(resident, waiting):
    split = data.Split(torch.zeros(256, 3, 64, 64, dtype=torch.uint8), torch.arange(256) % 7, {"crop": 0.7})
    batches = split.batches(16, "cuda", 0, True, resident)
    model = models.build("resnet18", 7, (3, 64, 64), "none").to("cuda", memory_format=torch.channels_last)
    model.amp = torch.bfloat16
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def update(step):
        images, labels = batches(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    for step in range(3):
        update(step)
    waiting("error")
    for step in range(3, 8):  # within one pass: a new pass moves its order to the device
        update(step)
