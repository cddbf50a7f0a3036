"""The user's own command at DomainNet's full size: real to clipart, all 221,076 entries of the published lists.

    python tests/full_size_domainnet.py FOLDER > results/speed/full_size.md

About 150 s on two cores, and 0.8 GB below FOLDER. pytest does not collect it. Drawn are 1,380 JPEGs of about 40x30
pixels; each stands under some 160 names, as a link, and is decoded under every one of them. A hundredth of the data
set is drawn beside it, to compare the time of a step.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval  # noqa: E402
import models  # noqa: E402

COUNTS = {"real": (120906, 52041), "clipart": (33525, 14604)}  # train and test, as published
CLASSES = 345
COPIES = 2  # different images of a class and domain
FLAGS = "--dataset domainnet --source real --target clipart --image-size 32 --arch small_cnn --device cpu"
FLAGS += " --source-steps 100 --epochs 2 --steps-per-epoch 50"

TEXT = """# DomainNet at full size

```bash
python tests/full_size_domainnet.py FOLDER > results/speed/full_size.md
```

`ht_distill.py {flags}`
on a replica with all 221,076 entries of the lists, with {cores} cores and {threads} thread(s) for the network. The
caches are built with a bar and the time left. Second start: the largest of three runs. Steps: medians of 20 turns,
in one process. The images are drawn colours and the steps few, so accuracies mean nothing here.
"""


def class_names():
    """Names in the lists' order, which is not that of sorted(): letters' case and punctuation do not count."""
    return [f"{'T' if i % 7 == 0 else 't'}hing{'-_'[i % 2]}{i:03d}" for i in range(CLASSES)]


def draw(root, share):
    """The data set below root/domainnet with this share of the published numbers of images."""
    base, rng = root / "domainnet", np.random.default_rng(0)
    for domain, counts in COUNTS.items():
        for label, name in enumerate(class_names()):
            folder = base / domain / name
            folder.mkdir(parents=True)
            colour = np.array([label * 37 % 256, label * 91 % 256, label * 151 % 256])
            for copy in range(COPIES):
                pixels = colour + rng.normal(0, 25 if domain == "real" else 40, (30, 40 + copy, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"drawn_{copy}.jpg")
        number = 0
        for part, count in zip(("train", "test"), counts, strict=True):
            lines = []
            for i in range(int(count * share)):
                label, number = i % CLASSES, number + 1
                folder = f"{domain}/{class_names()[label]}"
                file = f"{folder}/{domain}_{label + 1:03d}_{number:06d}.jpg"
                os.link(base / folder / f"drawn_{number // CLASSES % COPIES}.jpg", base / file)
                lines.append(f"{file} {label}\n")
            (base / f"{domain}_{part}.txt").write_text("".join(lines))


def run(root, *flags):
    """Run ht_distill; returns its seconds until each line of output, its peak memory in GB, its folder and stderr."""
    command = [sys.executable, "-u", str(ROOT / "methods" / "ht_distill.py"), *FLAGS.split(), *flags]
    command += ["--data-root", str(root), "--runs-dir", str(root / "runs")]
    start, times, lines = time.perf_counter(), [], []
    with open(root / "stderr.txt", "w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in child.stdout:
            times.append(time.perf_counter() - start)
            lines.append(line.rstrip("\n"))
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    errors = (root / "stderr.txt").read_text()
    if child.returncode:
        raise SystemExit(errors)
    epoch_0 = next(time for time, line in zip(times, lines, strict=True) if line.split()[:1] == ["0"])
    (folder,) = (root / "runs").glob("domainnet/*/ht_distill/split0-seed0")
    return {"first_step": epoch_0, "memory": usage.ru_maxrss * 1024 / 1e9, "folder": folder, "errors": errors}


def step_times(root, turns=20, steps=25):
    """Milliseconds of a step of fine-tuning on all images, and on a hundredth of them: medians over turns."""
    model = models.build("small_cnn", CLASSES, (3, 32, 32)).to(memory_format=torch.channels_last)
    optimizer, batches, times = torch.optim.SGD(model.parameters(), 0.005), {}, {}
    for name in ("full", "hundredth"):
        flags = {"image_size": 32, "arch": "small_cnn", "data_root": root / name}
        task = data.load_task(data.TaskArgs("domainnet", "real", "clipart", **flags))
        batches[name], times[name] = task.target_train.batches(64, "cpu", seed=0), []
    for turn in range(turns):
        for name in batches:
            start = time.perf_counter()
            for step in range(turn * steps, (turn + 1) * steps):
                images, labels = batches[name](step)
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            times[name].append(1000 * (time.perf_counter() - start) / steps)
    return [statistics.median(seen) for seen in times.values()]


def main():
    root = Path(sys.argv[1])
    start = time.perf_counter()
    draw(root / "full", 1)
    draw(root / "hundredth", 0.01)
    drawn = time.perf_counter() - start
    first = run(root / "full")
    bars = re.findall(r"decoding domainnet-(\w+): 100%[^\n]*\| (\d+)/\2 \[([\d:]+)<", first["errors"])
    bars = {domain: (count, minutes) for domain, count, minutes in bars}
    assert len(bars) == 2 and re.search(r"decoding domainnet-real: +[1-9]\d?%.*<\d\d:\d\d", first["errors"])
    again = [run(root / "full", "--overwrite") for _ in range(3)]
    full, hundredth = step_times(root)
    start = time.perf_counter()
    eval.read_run(again[0]["folder"])
    metrics = time.perf_counter() - start
    rows = [(f"cache of {domain}, {count} images, min:s", minutes) for domain, (count, minutes) in bars.items()]
    rows += [
        ("second start to the first step, s (limit 10)", f"{max(one['first_step'] for one in again):.1f}"),
        ("peak memory, first start, GB (limit 2.5)", f"{first['memory']:.2f}"),
        ("peak memory, second start, GB (limit 2.5)", f"{max(one['memory'] for one in again):.2f}"),
        ("all metrics of 14,604 x 345 logits, s (limit 2)", f"{metrics:.2f}"),
        ("a step of fine-tuning, 64 images, ms", f"{full:.1f}"),
        ("the same with a hundredth of the images, ms", f"{hundredth:.1f}"),
        ("ratio of the two (limit 1.1)", f"{full / hundredth:.2f}"),
        ("drawing the replica, s", f"{drawn:.0f}"),
    ]
    print(TEXT.format(flags=FLAGS, cores=os.cpu_count(), threads=torch.get_num_threads()))
    print("| what | figure |\n| --- | ---: |")
    for what, figure in rows:
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main()
