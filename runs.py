"""One run of a script: its flags, its folder, the log, the checkpoint from which it goes on, the result.

with Run(__file__, args) as run:       # an InputError inside is shown without a traceback, exit code 2
    args = run.open(task)              # writes nothing yet; a finished run is shown again and ends here
    run.start(model)                   # epoch 0, the source model
    run.resume(model=model, ...)       # goes on where an earlier start stopped: run.epoch, run.steps
    run.step(loss, images)             # counts a training step, without waiting for the device
    run.evaluate(epoch, model)         # a line in log.jsonl and on the terminal
    run.finish(model)                  # logits.npz, model.pt and, last, done.json
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff

import data
import files
from eval import accuracies, alg_gammas, compared, footnote, mean_percent, number, read_run, table
from files import InputError, fail
from models import predict

BUSY = 3  # exit code of a run whose folder another process has
PROGRESS = ("lines", "steps", "images", "values", "origin", "source")  # of a Run, in its checkpoint
HEADER = "epoch     loss    seen  unseen overall  images/s  seconds"


@dataclasses.dataclass
class RunArgs:
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    amp: Literal["auto", "bfloat16", "float16", "off"] = "auto"  # autocast; auto: not small nets; off: TF32 on CUDA
    compile: FlagCreatePairsOff[bool] = False  # torch.compile the model
    resident: Literal["auto", "on", "off"] = "auto"  # keep training images on the device; auto: on CUDA, if they fit
    runs_dir: str = "runs"  # where run folders and source models are kept
    name: data.default(str, "the script's") = None  # of the run's folder, to keep variants apart
    calibrate: data.default(Literal["alg"] | float, "none", "BIAS") = None  # on unseen logits, last: alg or a number
    track: Literal["none", "tensorboard"] = "none"  # write what log.jsonl holds for TensorBoard too
    checkpoint_every: float = 5.0  # minutes between checkpoints; 0: one after every step
    save_model: FlagCreatePairsOff[bool] = True  # without this flag model.pt keeps the adapted weights
    overwrite: FlagCreatePairsOff[bool] = False  # start anew, whatever the run folder holds


def parse(args_class):
    """The command line as an args_class; --help has a group of flags for each of its base classes."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")  # the width of --help in a file
    groups = [(base.__name__.removesuffix("Args").lower(), base) for base in args_class.__bases__]
    flags = tyro.cli(dataclasses.make_dataclass("Flags", groups), config=(tyro.conf.OmitArgPrefixes,))
    args = args_class(**{name: value for group in vars(flags).values() for name, value in vars(group).items()})
    try:
        for name, (low, high) in LIMITS.items():
            data.check_flag(name, getattr(args, name), low, high)
        if args.name and (Path(args.name).name != args.name or args.name == ".."):
            raise InputError(f"--name {args.name}: must be the name of a folder, not a path")
        if args.device.startswith("mps"):  # pytorch issues 175189 and 175190
            why = "PyTorch's gradients of channels-last networks are wrong there"
            raise InputError(f"--device {args.device}: {why}; train on cpu")
        if args.calibrate != "alg":
            data.check_flag("calibrate", args.calibrate, -data.MOST)
        if args.track == "tensorboard":
            summary_writer()
    except InputError as error:
        fail(error)
    return args


def summary_writer():
    """TensorBoard's class. Raises InputError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--track tensorboard: needs a package that is optional: pip install tensorboard") from error
    return SummaryWriter


COUNTS = ("epochs", "steps_per_epoch", "batch_size", "source_steps", "source_batch_size")
LIMITS = dict.fromkeys(COUNTS, (1, 2**63 - 1))
LIMITS |= dict.fromkeys(("seed", "split_seed", "source_seed", "pseudo_split"), (0, 2**63 - 1))
LIMITS |= dict.fromkeys(("lr", "backbone_lr", "source_lr", "source_backbone_lr", "weight_decay"), (0, data.MOST))
LIMITS |= {"test_share": (0, 0.9), "checkpoint_every": (0, data.MOST), "clip_grad": (data.LEAST, data.MOST)}


def fingerprint(model, task):
    """SHA-256 (hex) of the weights, the target's labels and seen classes, and the number of unlabelled images: it shows
    changes in files of which args.json has only the path."""
    digest, splits = hashlib.sha256(), (task.target_train, task.target_test, task.target_unlabelled)
    for tensor in (*model.state_dict().values(), task.seen, *(split.labels for split in splits if split)):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digests(task):
    """{"source", "train", "test": digest of the part's images and labels} of a task. Of images in files the digest has
    only the indices. That of "test" also has the seen classes. A part without images is left out."""
    splits, found = {"source": task.source_train, "train": task.target_train, "test": task.target_test}, {}
    for name, split in splits.items():
        if split is None:
            continue
        images, digest = split.images, hashlib.sha256(bytes(task.seen.numpy()) if name == "test" else b"")
        which = images.index if isinstance(images, data.Images) else images.numpy()
        digest.update(which.ravel())  # no copy, where they lie in order
        digest.update(split.labels.numpy().ravel())
        found[name] = digest.hexdigest()[:16]
    return found


def agree(old, new):
    """Whether figures that were written are those computed now, up to rounding; old may lack some, or be damaged."""
    try:
        return all(old[k] == new[k] or math.isclose(old[k], new[k], abs_tol=1e-6) for k in old.keys() & new.keys())
    except (AttributeError, TypeError):
        return False


def result_table(done):
    rows = [{"model": "source (epoch 0)", **done["source"]}, {"model": "result", **done["final"]}]
    return table(rows) + footnote(rows)


def versions(model):
    device = next(model.parameters()).device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    amp = next((str(module.amp) for module in model.modules() if getattr(module, "amp", None)), None)
    here = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "numpy": np.__version__, **here, "gpu": gpu, "amp": amp}


def shortened(names, most=8):
    """Names in one line; of many the first, and how many more there are."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def introduction(task, args, model):
    """What a run is about to do: its classes, its images, where and how it trains; a line each."""
    names, seen = np.array(task.classes), task.seen.numpy()
    train, test, recipe = task.target_train, task.target_test, task.recipe["batch_size"]
    yield f"{len(names)} classes, {seen.sum()} seen: {shortened(names[seen])}; unseen: {shortened(names[~seen])}"
    yield f"images of {task.target}: {len(train.labels)} to train on, {len(test.labels)} to test on"
    if test is train:
        yield "no test images (--test-share 0): all figures are of the training images and say nothing of new ones"
    if task.target_unlabelled:
        yield f"another setting: {len(task.target_unlabelled.labels)} unlabelled images of the target, of any class"
    here = versions(model)
    yield f"{args.arch} in {here['amp'] or 'float32'} on {here['gpu'] or next(model.parameters()).device}"
    rates = f"--lr {args.lr}, --backbone-lr {args.backbone_lr}"
    yield f"{args.epochs} x {args.steps_per_epoch} steps of {args.batch_size} images, {rates}"
    if args.batch_size == len(train.labels) < recipe:
        yield f"a batch has all {args.batch_size} images, not the recipe's {recipe}"


def hints(logits, labels, given):
    """What to do about a source model that is often wrong, from its logits [N, C] on the labelled images and their
    labels [N]; a line or none. given: it is the user's file, whose classes may be in another order."""
    counts = np.zeros((logits.shape[1], logits.shape[1]))
    np.add.at(counts, (labels, logits.argmax(1)), 1 / len(labels))
    right, largest = np.trace(counts), counts.sum(1).max()
    what = f"the source model is right on {right:.0%} of the labelled images"
    if given:
        from scipy.optimize import linear_sum_assignment  # takes a second

        in_another_order = counts[linear_sum_assignment(counts, maximize=True)].sum()
        if in_another_order > max(0.5, 2 * right, 1.5 * largest):
            how = "check the order of --classes"
            return [f"{what}, with its classes in another order on {in_another_order:.0%}: {how}"]
    if right < 0.3:
        how = "check --arch, --image-size and --classes" if given else "try more --source-steps, or another --arch"
        return [f"a weak teacher, {what}: {how}"]
    return []


def record_of(args, script, classes):
    """The args as args.json has them. Where they name a file, its content or digest is recorded: the file may change.
    So are the data root of `folder` where no flag gives it, and the script's name where --name is given."""
    record = dataclasses.asdict(args)
    if args.name:  # it need not say which script it is
        record["script"] = script
    if args.dataset == "folder" and args.data_root is None:
        record["data_root"] = str(data.home("folder", None))
    for name in ("source_checkpoint", "weights"):
        file = getattr(args, name)
        if file and os.path.isfile(file):
            record[f"{name}_sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    if os.path.isfile(args.seen_classes):
        listed = set(data.read_names(args.seen_classes, "--seen-classes"))
        record["seen_classes"] = json.dumps([name for name in classes if name in listed])
    if args.classes:
        record["classes"] = ",".join(classes)
    return record


class Run:
    """The folder runs/<dataset>/<source>-<target>/<method>/split<k>-seed<s>[-source<n>]/ and what is written into it.
    A pseudo run's folder ends in -pseudo<k>. epoch: the first that is left to train. steps: how many are done. source:
    the source model's logits "test" and "train" as tensors, and its accuracies, "figures"."""

    def __init__(self, script, args):
        self.args, self.started = args, time.perf_counter()
        self.script = Path(script)
        self.method = (args.name or self.script.stem) + "-oracle" * args.oracle
        self.stop, self.lock, self.writer = files.Stop(args.checkpoint_every), None, None
        self.bar = tqdm(disable=True)
        self.lines, self.epoch, self.steps, self.images = [], 1, 0, 0
        self.values, self.pending, self.origin, self.source = {}, {}, None, None

    def __enter__(self):
        self.stop.listen()
        return self

    def __exit__(self, kind, error, trace):
        self.stop.give_back()
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.lock is not None:
            self.leave()
        if isinstance(error, torch.OutOfMemoryError):
            size, device = self.args.batch_size, self.args.device
            error = f"--batch-size {size} is too large: --device {device} is out of memory"
            if device != "cpu" and self.args.resident != "off":
                error += "; --resident off frees the images"
            error = InputError(error)
        if isinstance(error, InputError):
            fail(error)
        if kind is SystemExit and self.stop.signal:
            command = "the same command" + ", without --overwrite," * (self.args.overwrite and bool(self.lines))
            print(f"stopped by {signal.Signals(self.stop.signal).name}; {command} goes on", file=sys.stderr)

    def leave(self):
        """Release the folder; delete it if empty."""
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if [path.name for path in self.folder.iterdir()] == [".lock"]:
                (self.folder / ".lock").unlink()
                for folder in (self.folder, *list(self.folder.parents)[:3]):
                    folder.rmdir()
        self.lock.release()

    def open(self, task):
        """The args, with the task's source, target, seen classes and recipe where these were None. If the folder has a
        finished run with these arguments, shows it and ends the program (exit code 0). If another process works in it,
        ends the program (exit code 3). Raises InputError if it holds a run with other arguments."""
        self.task, self.images_of_task = task, digests(task)
        known = {name: getattr(task, name) for name in ("source", "target", "seen_classes")} | task.recipe
        known |= {f"source_{name}": value for name, value in task.source_recipe.items()}
        known["batch_size"] = min(known["batch_size"], len(task.target_train.labels))
        blank = [name for name, value in vars(self.args).items() if value is None and name in known]
        args = self.args = dataclasses.replace(self.args, **{name: known[name] for name in blank})
        self.from_recipe = sorted(set(blank) - {"source", "target", "seen_classes"})
        where = f"{args.dataset}/{args.source}-{args.target}/{self.method}/split{args.split_seed}-seed{args.seed}"
        where += f"-source{args.source_seed}" if args.source_seed else ""
        where += "" if args.pseudo_split is None else f"-pseudo{args.pseudo_split}"
        self.folder = Path(args.runs_dir) / where
        self.record = {"method": self.method, **record_of(args, self.script.stem, task.classes)}
        self.show_if_finished()
        self.lock = files.take_lock(self.folder / ".lock", owned="*")
        if self.lock is None:
            print(f"another process is at work in {self.folder}; wait for it, or pass --name", file=sys.stderr)
            raise SystemExit(BUSY)
        self.show_if_finished()  # by now, perhaps
        self.checkpoint = files.Checkpoint(
            self.folder / "checkpoint.pt", compared(self.record), self.stop, args.overwrite
        )
        if saved := self.checkpoint.content:
            try:
                vars(self).update({name: saved[name] for name in PROGRESS})
                self.epoch, self.started = len(self.lines), self.started - saved["seconds"]
            except (KeyError, TypeError) as error:
                self.checkpoint.refuse(f"incomplete ({type(error).__name__}: {error})")
        return args

    def show_if_finished(self):
        """If there is a finished run, show it and exit. Raises InputError at other arguments or images, or damage."""
        if self.args.overwrite or not any((self.folder / name).exists() for name in ("args.json", "done.json")):
            return
        if other := files.differences(compared(files.read_json(self.folder / "args.json")), compared(self.record)):
            raise InputError(f"{self.folder} holds a run with {other}; pass --overwrite, --name or --runs-dir")
        if not (self.folder / "done.json").exists():
            return
        try:
            done, run = files.read_json(self.folder / "done.json"), read_run(self.folder)
        except ValueError as error:
            raise InputError(f"{error}; --overwrite runs it again") from error
        if not all(agree(done.get(part), run[part]) for part in ("source", "final")):
            raise InputError(f"{self.folder}: logits.npz does not give what done.json has; pass --overwrite")
        known = done.get("images", {})  # an older run has not all of them
        if any(known.get(name, digest) != digest for name, digest in self.images_of_task.items()):
            raise InputError(f"{self.folder} holds a run on other images; pass --overwrite, --name or --runs-dir")
        with contextlib.suppress(OSError):  # it is there if the run was killed just after it wrote done.json
            (self.folder / "checkpoint.pt").unlink()
        print(f"already finished (--overwrite runs it again): {self.folder}\n{result_table(run)}")
        raise SystemExit(0)

    def start(self, model, **extras):
        """Empty the folder and evaluate the source model as epoch 0, with extras in its log line. A run that goes on
        skips both; raises InputError if its source model, classes or labels are not those that it started with."""
        before, self.origin = self.origin, fingerprint(model, self.task)
        if self.lines:
            if before != self.origin:
                self.checkpoint.refuse("of a run from another source model or with other classes or images")
            return
        self.stop.release()
        train = self.task.target_train
        train_logits, labels = predict(model, train.images), train.labels.numpy()
        for name in ("done.json", "logits.npz", "model.pt", "checkpoint.pt", "args.json"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        print(*introduction(self.task, self.args, model), self.folder, sep="\n")
        print(*hints(train_logits, labels, self.args.source_checkpoint), HEADER, sep="\n")
        extras["train_accuracy"] = mean_percent(train_logits.argmax(1) == labels)
        figures = self.write_line(0, model, None, extras)
        self.source = {"train": torch.from_numpy(train_logits), "test": torch.from_numpy(self.test_logits)}
        self.source["figures"] = figures

    def resume(self, **parts):
        """Restore the parts, all that a step changes, from the checkpoint, if any. From here on a signal waits."""
        self.checkpoint.resume(**parts)
        self.clock = time.perf_counter()
        if self.checkpoint.content:
            self.clock -= self.checkpoint.content["seconds_since_evaluation"]
            self.checkpoint.content = None
            self.write_log()
            print(f"{self.folder} goes on after step {self.steps}\n{HEADER}")
        total = self.args.epochs * self.args.steps_per_epoch
        self.bar = tqdm(total=total, initial=self.steps, unit="step", leave=False, disable=None)  # on a terminal only

    def write_log(self):
        if not (self.folder / "args.json").exists():
            files.write_text(self.folder / "args.json", json.dumps(self.record, indent=2))
        files.write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def track(self, line):
        """Write the figures of a line for TensorBoard too, with --track. What an earlier start wrote of this step and
        later ones counts no more."""
        if self.args.track == "none":
            return
        if self.writer is None:
            self.writer = summary_writer()(self.folder, purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def step(self, loss, images, **extras):
        """Count a step on `images`. loss and extras: scalar tensors; they stay on their device until the next save."""
        self.steps += 1
        self.images += len(images)
        self.bar.update()
        for name, value in {"loss": loss, **extras}.items():
            self.pending.setdefault(name, []).append(value.detach())
        if self.checkpoint.due():
            self.save()

    def save(self):
        """Write the checkpoint; returns the time its steps ended. Raises InputError at a loss or weight not finite."""
        for name, values in self.pending.items():
            self.values.setdefault(name, []).extend(torch.stack(values).tolist())  # waits for the device
        self.pending, now = {}, time.perf_counter()
        rates = f"--lr {self.args.lr} and --backbone-lr {self.args.backbone_lr}"
        advice = f"{rates}: try lower ones, a smaller --clip-grad or --amp off"
        self.checkpoint.check_finite(self.values.get("loss", []), self.steps, advice)
        times = {"seconds": now - self.started, "seconds_since_evaluation": now - self.clock}
        self.checkpoint.save(**times, **{name: getattr(self, name) for name in PROGRESS})
        return now

    def evaluate(self, epoch, model, **extras):
        """Save, then log the accuracies on the target's test images and the extras, unless this epoch is logged."""
        if epoch < len(self.lines):
            return
        done = self.save()
        speed = self.images / (done - self.clock) if self.images else None
        self.stop.release()
        self.write_line(epoch, model, speed, extras)
        self.values, self.images, self.clock = {}, 0, time.perf_counter()
        self.stop.hold()

    def write_line(self, epoch, model, speed, extras):
        """A line in log.jsonl and on the terminal for what `model` predicts now; returns its accuracies."""
        # an extra that takes time is a function, called here, so that it is not in the steps' time
        extras = {name: value() if callable(value) else value for name, value in extras.items()}
        before = time.perf_counter()
        self.test_logits = predict(model, self.task.target_test.images)
        test_speed = len(self.test_logits) / (time.perf_counter() - before)
        try:
            figures = accuracies(self.test_logits, self.task.target_test.labels, self.task.seen)
        except ValueError as error:
            raise InputError(f"logits of the target's test images: {error}; try lower rates or --amp off") from error
        means = {name: float(np.mean(values)) for name, values in self.values.items()}
        means = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        loss, seconds = means.pop("loss", None), time.perf_counter() - self.started
        line = {"epoch": epoch, "step": self.steps, "loss": loss, **figures, "images_per_second": speed}
        line |= {"test_images_per_second": test_speed, "seconds": seconds, **extras, **means}
        self.lines.append(line)
        self.write_log()
        self.track(line)
        cells = number(loss, 9, 4) + "".join(number(figures[name], 8) for name in ("seen", "unseen", "overall"))
        more = "".join(f"  {name} {v:.4g}" for name, v in (extras | means).items() if isinstance(v, float))
        self.bar.clear()
        print(f"{epoch:5d}{cells}{number(speed, 10, 0)}{number(seconds, 9, 1)}{more.replace('_', ' ')}", flush=True)
        return figures

    def calibrate(self, model):
        """Add --calibrate's bias to the unseen logits; returns it. No checkpoint has it, so it is never added twice."""
        gamma, train = self.args.calibrate, self.task.target_train
        if gamma is None:
            return None
        if gamma == "alg":
            train_logits = predict(model, train.images)
            gamma = alg_gammas(train_logits, train.labels, self.source["train"], self.task.seen)["alg_source"] or 0.0
        with torch.no_grad():
            model.head.bias += gamma * ~self.task.seen.to(model.head.bias.device)
        self.write_line(len(self.lines), model, None, {"gamma": gamma})
        return gamma

    def finish(self, model):
        """Write logits.npz, model.pt and, last, done.json of `model`, which must be the one that was evaluated last."""
        self.stop.release()
        gamma = self.calibrate(model)
        test, train = self.task.target_test, self.task.target_train
        arrays = {"test_logits": self.test_logits, "test_labels": test.labels.numpy()}
        arrays |= {"train_logits": predict(model, train.images), "train_labels": train.labels.numpy()}
        arrays |= {f"source_{part}_logits": self.source[part].numpy() for part in ("test", "train")}
        arrays |= {"seen": self.task.seen.numpy(), "classes": np.array(self.task.classes)}
        files.write_atomic(self.folder / "logits.npz", lambda stream: np.savez(stream, **arrays))
        if self.args.save_model and hasattr(model, "head"):  # not of two models whose logits are averaged
            _, channels, _, side = test.images.shape
            content = {"model": model.state_dict(), "classes": self.task.classes, "seen": self.task.seen.tolist()}
            content |= {"arch": self.args.arch, "image_size": side, "channels": channels}
            files.write_checkpoint(self.folder / "model.pt", content)
        final = accuracies(arrays["test_logits"], arrays["test_labels"], arrays["seen"])
        script, root = self.script.resolve(), Path(__file__).resolve().parent
        script = script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name
        command = shlex.join(["python", script, *sys.argv[1:]])
        done = {"source": self.source["figures"], "final": final, "args": self.record, "command": command}
        done |= {"from_recipe": self.from_recipe, "tested_on_training_images": test is train, "calibration": gamma}
        done["images"] = self.images_of_task
        done["unlabelled_images"] = len(self.task.target_unlabelled.labels) if self.task.target_unlabelled else 0
        done |= {"seconds": time.perf_counter() - self.started, "versions": versions(model)}
        files.write_text(self.folder / "done.json", json.dumps(done, indent=2))
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        print(result_table(done))
