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


@pytest.mark.parametrize("amp", ["bfloat16", "float16", "off"])
@pytest.mark.parametrize("method", ["naive_ft", "ht_distill", "lolsgd", "grad_proj", "lp_ft"])
def test_methods_run_in_every_precision(method, amp, run_method, read):
    _, folder = run_method(method, *CUDA, "--amp", amp, "--name", f"{method}-{amp}", "--overwrite")
    done, arrays, log = read(folder)
    assert done["versions"]["gpu"] and np.isfinite(arrays["test_logits"]).all()
    assert all(np.isfinite(line["loss"]) for line in log[1:])


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16, None])
def test_the_gpu_computes_what_the_cpu_does(amp):
    task = data.load_task(data.TaskArgs("digits"))
    torch.manual_seed(0)
    model = models.build("small_cnn", 10, (1, 28, 28)).to(memory_format=torch.channels_last)
    want = predict(model, task.target_test.images[:100])
    model.cuda().amp = amp
    got = predict(model, task.target_test.images[:100])
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < (1e-3 if amp is None else 3e-2) * np.abs(want).max()


@pytest.mark.parametrize("arch", ["small_cnn", "resnet50"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_channels_last_is_kept_through_the_model(arch, amp):
    model = models.build(arch, 7, (3, 64, 64), None if arch in models.SMALL else "none")
    model.to("cuda", memory_format=torch.channels_last).amp = amp
    wrong = []

    def look(module, _, output):
        if output.ndim == 4 and min(output.shape[1:]) > 1:
            wrong.extend([module] * (not output.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        module.register_forward_hook(look)
    split = data.Split(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8) % 7, {"crop": 0.7})
    images, labels = split.batches(4, "cuda", 0)(0)
    F.cross_entropy(model(images), labels).backward()
    assert not wrong


@pytest.mark.parametrize("method", ["naive_ft", "ht_distill"])
def test_compile(method, run_method, read):
    plain, compiled = (
        read(run_method(method, *CUDA, "--amp", "off", "--name", f"{method}{len(more)}", *more)[1])[1]["test_logits"]
        for more in ((), ("--compile",))
    )
    assert np.abs(plain - compiled).max() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("mapped", [True, False])
def test_batches_from_everywhere_are_the_same(mapped, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    images = torch.from_numpy(pixels).movedim(3, 1)
    if mapped:
        images = data.Images(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(500), "key")
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


@pytest.mark.parametrize("method", [path.stem for path in (ROOT / "methods").glob("*.py")])
def test_no_method_waits_for_the_device(method, run_method, monkeypatch):
    def then(name, mode):
        function = getattr(runs.Run, name)

        def call(self, *arguments, **more):
            torch.cuda.set_sync_debug_mode("default")
            result = function(self, *arguments, **more)
            torch.cuda.set_sync_debug_mode(mode)
            return result

        monkeypatch.setattr(runs.Run, name, call)

    then("step", "error")  # from the end of a step to the end of the next
    then("evaluate", "default")
    run_method(method, *CUDA, "--amp", "bfloat16", "--name", f"{method}-strict")


@pytest.mark.parametrize("resident", ["on", "off"])
def test_a_step_never_waits_for_the_device(resident):
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 8):  # within one pass: a new pass moves its order to the device
            update(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
