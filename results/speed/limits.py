"""How much of the device's limits a training step reaches; for measure.py, which finds the modules."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import models


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and give: what would cross the memory bus without caches."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            once = {id(tensor): tensor for tensor in tensors}
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in once.values())
        return result


def seconds_of(device, do, *arguments):
    """(Seconds that do(*arguments) takes on a device with nothing else to do, what it returns)."""
    start = time.perf_counter()
    result = do(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def throughput_and_bandwidth(device, dtype):
    """FLOP/s of one large matrix product, and bytes/s, in and out, of one large copy; the best of five."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.rand(2, side, side, device=device, dtype=dtype)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    product = min(seconds_of(device, torch.mm, a, b)[0] for _ in range(5))
    copy = min(seconds_of(device, block.clone)[0] for _ in range(5))
    return 2 * side**3 / product, 2 * size / copy


def step_figures(device, batches, update, rounds):
    """(Seconds of reading a batch [rounds], of the whole step [rounds], peak memory in MB).

    The memory is the device's, of these steps alone, whatever was there before; None on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for step in range(1, rounds + 1):
        reading, batch = seconds_of(device, batches, step)
        updating, _ = seconds_of(device, update, *batch)
        times.append((reading, reading + updating))
    reading, whole = np.transpose(times)
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return reading, whole, peak


def device_limits(arch, root, device, batch_size, rounds):
    """{what: figures of all rounds} of a training step on the photographs in `root`.

    Data's share of its time, and the shares of the device's matrix throughput and memory bandwidth that it reaches.
    """
    models.tune_process()
    device, amp = models.choose_device(device, "auto", arch)
    task = data.load_task(data.TaskArgs("folder", "a", "b", "5", oracle=True, data_root=str(root)))
    batches = task.target_train.batches(batch_size, device, 0)
    model = models.build(arch, 10, (3, 224, 224), "none").to(device, memory_format=torch.channels_last).train()
    model.amp = amp
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def update(images, labels):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        update(*batches(0))
    throughput, bandwidth = throughput_and_bandwidth(device, amp or torch.float32)
    reading, whole, peak = step_figures(device, batches, update, rounds)
    flop_share = flops.get_total_flops() / whole / throughput
    byte_share = traffic.bytes / whole / bandwidth
    shares = {
        "data (reading, augmentation), % of a step": 100 * reading / whole,
        f"of {throughput / 1e12:.3g} TFLOP/s in a matrix product, %": 100 * flop_share,
        f"of {bandwidth / 1e9:.3g} GB/s in a copy, % (all tensors in and out; caches help)": 100 * byte_share,
    }
    if peak is not None:
        shares["peak device memory of a step, MB"] = [peak]
    return {f"{arch}: {what}": figures for what, figures in shares.items()}
