"""What one run achieved: accuracies and calibration from logits, the run folder, and a table of runs.

    python eval.py runs/digits/mnist-optdigits/ht_distill/split0-seed0 --format json

recomputes every figure from the runs' logits.npz; no model and no data set are needed. Accuracies are top-1 in %
over all C candidate classes; where there is no image to average over they are None (null, -), never nan.
"""

import contextlib
import csv
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch
import tyro

# ------------------------------------------------------------------------------------------ metrics


class InputError(ValueError):
    """Something the user can mend. A run shows it as one line and ends with exit code 2."""


def to_numpy(x):
    """A numpy array, or a tensor anywhere and of any dtype, as a numpy array."""
    if isinstance(x, torch.Tensor):
        x = (x.float() if x.dtype is torch.bfloat16 else x).numpy(force=True)
    return np.asarray(x)


def check(logits, labels, seen, where="logits"):
    """logits float [N, C], labels int64 [N], seen bool [C] as numpy arrays.

    Raises InputError, naming `where`, on shapes that do not fit, a label outside 0..C-1, or a mask without a seen or
    without an unseen class. Whether the logits are finite is seen where they are read (check_finite).
    """
    logits, labels, seen = map(to_numpy, (logits, labels, seen))
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or seen.shape != logits.shape[1:] or seen.dtype != bool:
        raise InputError(
            f"{where}: want logits [N, C], labels [N], seen bool [C]; "
            f"got {logits.shape}, {labels.shape}, {seen.dtype} {seen.shape}"
        )
    logits = logits.astype(np.promote_types(logits.dtype, np.float32), copy=False)
    if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < len(seen)):
        raise InputError(f"{where}: labels must be integers from 0 to {len(seen) - 1}")
    if seen.all() or not seen.any():
        raise InputError(f"{where}: the mask must have seen and unseen classes; {seen.sum()} of {len(seen)} are seen")
    return logits, labels.astype(np.int64), seen


def pieces(rows):
    """The rows in parts that fit a processor's cache: going through a large array so is many times as fast."""
    return np.array_split(rows, len(rows) // 256 + 1)


def check_finite(logits, where, first_row=0):
    """Raises InputError, naming `where` and the row, on a value of logits [N, C] that is not finite."""
    if not np.isfinite(logits).all():
        row = first_row + int((~np.isfinite(logits).all(1)).argmax())
        raise InputError(f"{where}: row {row} has nan or inf")


def best_by_group(logits, seen, where):
    """The class and the logit, both [N], of the highest logit among the seen classes and of that among the unseen; of
    equal ones the lower index. seen: bool [C]. Raises InputError as check_finite does."""
    groups, best, row = [np.flatnonzero(seen), np.flatnonzero(~seen)], [], 0
    for part in pieces(logits):
        check_finite(part, where, row)
        best.append([classes[np.take(part, classes, 1).argmax(1)] for classes in groups])
        row += len(part)
    best = [np.concatenate(of_group) for of_group in zip(*best, strict=True)]
    return [(index, logits[np.arange(len(logits)), index]) for index in best]


def mean_percent(right):
    return 100 * float(np.mean(right)) if len(right) else None


def accuracies(logits, labels, seen, where="logits", gamma=0.0):
    """All accuracies of logits [N, C] (numpy or torch) for labels [N] and the mask seen [C], in % or None.

    gamma is added to the logits of the unseen classes before anything is compared.
    overall, seen, unseen: images of all / seen / unseen classes, over all C candidates (a tie goes to the lower
    index). seen_among_seen, unseen_among_unseen: the same images, candidates of their own group only.
    harmonic_mean: of seen and unseen. class_mean: mean over the classes that have images of their accuracy.
    ausuc: see ausuc; from 0 to 1. Raises InputError as check does, naming `where`.
    """
    logits, labels, seen = check(logits, labels, seen, where)
    is_seen, best_of_group = seen[labels], best_by_group(logits, seen, where)
    predicted = (logits + gamma * ~seen if gamma else logits).argmax(1)
    correct = predicted == labels
    groups = {"overall": slice(None), "seen": is_seen, "unseen": ~is_seen}
    result = {name: mean_percent(correct[group]) for name, group in groups.items()}
    for name, (best, _) in zip(("seen", "unseen"), best_of_group, strict=True):
        result[f"{name}_among_{name}"] = mean_percent((best == labels)[groups[name]])
    a, b = result["seen"], result["unseen"]
    result["harmonic_mean"] = None if a is None or b is None else 2 * a * b / (a + b) if a + b else 0.0
    images = np.bincount(labels, minlength=len(seen))
    share = np.bincount(labels[correct], minlength=len(seen)) / images.clip(1)
    result["class_mean"] = mean_percent(share[images > 0])
    result["ausuc"] = ausuc(logits, labels, seen, where)
    return result


def flip_points(logits, labels, seen, where="logits"):
    """Of every image, each [N]: the bias on the unseen classes' logits above which it is taken for one of them, whether
    its class is seen, and whether it is right where it is taken for one of its own group."""
    logits, labels, seen = check(logits, labels, seen, where)
    is_seen = seen[labels]
    (seen_class, seen_best), (unseen_class, unseen_best) = best_by_group(logits, seen, where)
    right = np.where(is_seen, seen_class, unseen_class) == labels
    return seen_best.astype(np.float64) - unseen_best, is_seen, right


def curve(flips, is_seen, right, where="logits"):
    """See seen_unseen_curve; from what flip_points returns."""
    if is_seen.all() or not is_seen.any():
        raise InputError(f"{where}: {is_seen.sum()} of {len(flips)} images are of seen classes: there is no curve")
    flips, step = np.unique(flips, return_inverse=True)
    lost = np.bincount(step[is_seen & right], minlength=len(flips))
    won = np.bincount(step[~is_seen & right], minlength=len(flips))
    beyond = np.maximum(1, np.abs(flips[[0, -1]])) * (-1, 1) + flips[[0, -1]]
    gamma = np.concatenate([beyond[:1], flips[:-1] + np.diff(flips) / 2, beyond[1:]])
    if 0 not in flips:
        gamma[np.searchsorted(flips, 0)] = 0
    kept, found = np.concatenate([[lost.sum()], lost.sum() - lost.cumsum()]), np.concatenate([[0], won.cumsum()])
    return gamma, 100 * kept / is_seen.sum(), 100 * found / (~is_seen).sum()


def seen_unseen_curve(logits, labels, seen, where="logits"):
    """What a bias gamma on the unseen classes' logits trades: (gamma, seen accuracy, unseen accuracy), each [K + 1].

    The K values at which a prediction flips from a seen to an unseen class are found by sorting, O(N C + N log N), and
    there is one point between each two of them and one beyond either end; equal flips are one step. gamma is 0 for the
    point that 0 belongs to (where 0 is itself a flip, for none), else the middle of its range. Accuracies in %, over
    all C candidates. Raises InputError as check does, and where seen or unseen classes have no image.
    """
    return curve(*flip_points(logits, labels, seen, where), where)


def ausuc(logits, labels, seen, where="logits"):
    """Area under the seen-unseen curve (Chao et al. 2016, arXiv 1605.04253), from 0 to 1, by the trapezoid rule, which
    is exact: what no bias can change. None where seen or unseen classes have no image."""
    is_seen = to_numpy(seen)[to_numpy(labels)]
    if is_seen.all() or not is_seen.any():
        return None
    _, seen_accuracy, unseen_accuracy = seen_unseen_curve(logits, labels, seen, where)
    return float(-np.trapezoid(unseen_accuracy, seen_accuracy)) / 1e4


# ------------------------------------------------------------------------------------------ calibration


def logit_gap(logits, labels, seen, of_group, where):
    """Mean over images of the mean (of_group np.mean) or highest (np.max) logit of the seen classes but the image's
    own, less that of the unseen. None without images, or with a single seen class. Raises as alg_gamma does."""
    logits, labels, seen = check(logits, labels, seen, where)
    check_finite(logits, where)
    if not seen[labels].all():
        row = int((~seen[labels]).argmax())
        raise InputError(f"{where}: row {row} is of an unseen class; ALG takes seen ones only")
    if not len(labels) or seen.sum() < 2:
        return None
    others = logits[seen & (np.arange(len(seen)) != labels[:, None])].reshape(len(labels), -1).astype(np.float64)
    return float((of_group(others, 1) - of_group(logits[:, ~seen].astype(np.float64), 1)).mean())


def alg_gamma(train_logits, train_labels, seen, where="train_logits"):
    """ALG, average logit gap (arXiv 2409.16223): the bias that closes the mean gap between the logits of the seen
    classes, the image's own left out, and those of the unseen, on target TRAINING images (the published code takes
    the images that it scores). None without images, or with a single seen class, which leaves nothing to average.
    Raises InputError as check does, and on a label of an unseen class.
    """
    return logit_gap(train_logits, train_labels, seen, np.mean, where)


def alg_source_gamma(train_logits, source_logits, train_labels, seen, where="train_logits"):
    """ALG against the source model, ours: the bias that brings the gap back to what the source model's logits, float
    [N, C] of the same target training images, have. The gap is between the highest logits, as it is these that a
    prediction compares; and no bias of the source model's is mended, as it knew no difference between seen and unseen
    classes: which of them look alike differs from one choice of seen classes to the next. Else as alg_gamma.
    """
    if np.shape(train_logits) != np.shape(source_logits):
        raise InputError(f"{where}: {np.shape(train_logits)}, and the source model's {np.shape(source_logits)}")
    gap = logit_gap(train_logits, train_labels, seen, np.max, where)
    source_gap = logit_gap(source_logits, train_labels, seen, np.max, f"source_{where}")
    return None if gap is None else gap - source_gap


def best_bias(flips, is_seen, right, where="logits"):
    """See best_gamma; from what flip_points returns."""
    gamma, seen_accuracy, unseen_accuracy = curve(flips, is_seen, right, where)
    overall = seen_accuracy * is_seen.sum() + unseen_accuracy * (~is_seen).sum()
    best = np.flatnonzero(overall >= overall.max() - 1e-6)
    return float(gamma[best[np.abs(gamma[best]).argmin()]])


def best_gamma(logits, labels, seen, where="logits"):
    """The bias with the best overall accuracy, of equally good ones the nearest to 0: on test images an oracle. Raises
    as seen_unseen_curve does."""
    return best_bias(*flip_points(logits, labels, seen, where), where)


def pcv_gamma(splits):
    """PCV, pseudo cross-validation (arXiv 2409.16223): (gamma, its spread) from pseudo splits, in each of which other
    seen classes play the unseen. splits: (logits, labels, seen) of the held-out training images of each.

    gamma is the best for the images of all splits together, the spread from the least to the largest of the splits'
    own. One gamma for all instead of the mean of their own is ours: one split's hangs on few images.
    """
    points = [flip_points(*split, f"pseudo split {i}") for i, split in enumerate(splits)]
    own = [best_bias(*point) for point in points]
    together = (np.concatenate(arrays) for arrays in zip(*points, strict=True))
    return best_bias(*together), max(own) - min(own)


@torch.inference_mode()
def predict(model, images, return_features=False, batch_size=None):
    """float32 logits [N, C] of a Classifier in eval mode for uint8 images [N, c, H, W], as a numpy array; with
    return_features also the float32 features [N, D]. Leaves every module in the mode it was in. batch_size None is 512,
    on a CPU as many as stay in its cache, from 4 to 64, the fewer the larger they are."""
    was_training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    batch_size = batch_size or (min(64, max(4, 600_000 // images.shape[1:].numel())) if device.type == "cpu" else 512)
    model.eval()
    parts = [model(x.to(device, memory_format=torch.channels_last), return_features) for x in images.split(batch_size)]
    for module, training in was_training.items():
        module.training = training
    if not return_features:
        return torch.cat(parts).cpu().numpy()
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))


# ------------------------------------------------------------------------------------------ files that survive


def write_atomic(path, write):
    """Fill `path` by write(binary stream): it holds what it held before or all of the new, even after a crash.
    Raises InputError, naming the file, where that is not possible (no space left, no permission)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk only when the folder is
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); what it held is still there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    write_atomic(path, lambda stream: stream.write(text.encode()))


def write_checkpoint(path, content):
    """torch.save to memory, then to the file: on a full disk torch itself fails without saying why."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda stream: stream.write(buffer.getbuffer()))


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def read_checkpoint(path, flag="checkpoint"):
    """What torch.save wrote to `path`, loaded as data only, on the CPU, its checksums verified, which torch does not
    do. Raises InputError, naming the flag and file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{flag} {path}: not a readable checkpoint ({first_line(error)})") from error


def read_json(path):
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable ({error}); delete the run's folder or pass --overwrite") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what a run writes; delete the run's folder or pass --overwrite")
    return content


def take_lock(path, owned, wait=False):
    """A lock on a file, which the system frees when the process ends, however it does; None if another process has it
    and wait is False. What an owner that died left half written of the files `owned`, a pattern, is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = filelock.FileLock(path)
    try:
        result.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        return None
    for temporary in path.parent.glob(f".{owned}.tmp"):
        temporary.unlink(missing_ok=True)
    return result


# Of this process: minutes between checkpoints, whether a step may be under way, the signal that asked it to stop.
SAVING = {"minutes": 5.0, "in_step": False, "signal": 0}


def on_signal(number, frame):
    """Ctrl-C and SIGTERM: stop when the step is done and saved; at once where there is none, or when asked again."""
    again, SAVING["signal"] = SAVING["signal"], number
    if again or not SAVING["in_step"]:
        raise SystemExit(128 + number)


class Checkpoint:
    """The file from which a training goes on. It belongs to an owner, a dict: everything that determines the training.

    checkpoint = Checkpoint(path, owner)       # content: what the file holds, or None where there is none
    checkpoint.resume(model=model, ...)        # puts all parts where the file left them
    if checkpoint.due():                       # every SAVING["minutes"] and on a signal
        checkpoint.save(step=step)             # ends the program after a signal
    Raises InputError, naming the file, where it is damaged, another owner's or does not fit the parts.
    """

    def __init__(self, path, owner, anew=False):
        self.path, self.owner, self.parts, self.content = path, owner, {}, None
        if path.exists() and not anew:
            try:
                self.content = read_checkpoint(path)
            except InputError as error:
                self.refuse(f"not readable ({first_line(error.__cause__)})")
            if not (isinstance(self.content, dict) and isinstance(self.content.get("owner"), dict)):
                self.refuse("not the checkpoint of an unfinished training")
            if other := differences(self.content["owner"], owner):
                self.refuse(f"of a training with {other}")

    def refuse(self, why):
        raise InputError(
            f"checkpoint {self.path}: {why}; delete it, or in a run's folder pass --overwrite, to start anew"
        )

    def resume(self, **parts):
        """parts: whatever has a state_dict, model among them, and dicts of lists of tensors."""
        self.parts, self.saved, SAVING["in_step"] = parts, time.perf_counter(), True
        if self.content is None:
            return
        device = next(parts["model"].parameters()).device
        try:
            for name, part in parts.items():
                state = self.content["parts"][name]
                if isinstance(part, dict):
                    part.update({key: [tensor.to(device) for tensor in value] for key, value in state.items()})
                else:
                    part.load_state_dict(state)
            for name, state in self.content["generators"].items():
                if name == "cpu":
                    torch.set_rng_state(state)
                elif name == device.type:
                    getattr(torch, name).set_rng_state(state, *[device] * (name == "cuda"))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self.refuse(f"does not fit the model or the optimizer ({first_line(error)})")

    def due(self):
        return SAVING["signal"] or time.perf_counter() - self.saved >= 60 * SAVING["minutes"]

    def finite(self):
        """Whether all that the model and the optimizer hold is; waits for the device."""
        tensors = [*self.parts["model"].state_dict().values()]
        tensors += [value for state in self.parts["optimizer"].state.values() for value in state.values()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors if torch.is_tensor(tensor)]).all())

    def save(self, **more):
        states = {name: part if isinstance(part, dict) else part.state_dict() for name, part in self.parts.items()}
        device, generators = next(self.parts["model"].parameters()).device, {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            generators[device.type] = getattr(torch, device.type).get_rng_state(*[device] * (device.type == "cuda"))
        write_checkpoint(self.path, {"owner": self.owner, "parts": states, "generators": generators, **more})
        self.saved = time.perf_counter()
        if SAVING["signal"]:
            interruptible()


def interruptible():
    """From here to the next step Ctrl-C and SIGTERM end the program at once, one that came before does so now."""
    SAVING["in_step"] = False
    if SAVING["signal"]:
        raise SystemExit(128 + SAVING["signal"])


def check_progress(checkpoint, losses, steps, lr, backbone_lr):
    """Raises InputError if one of the losses, floats of the steps up to `steps`, or a weight is not finite."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None or not checkpoint.finite():
        step = steps if bad is None else steps - len(losses) + bad + 1
        what = "a weight" if bad is None else f"the loss, {losses[bad]},"
        raise InputError(
            f"step {step}: {what} is not finite, with --lr {lr} and --backbone-lr {backbone_lr}: "
            "try lower ones, a smaller --clip-grad or --amp off"
        )


# ------------------------------------------------------------------------------------------ the run folder


BUSY = 3  # exit code of a run whose folder another process has
NOT_COMPARED = ("device", "overwrite", "runs_dir", "data_root", "download", "resident")
NOT_COMPARED += ("save_model", "checkpoint_every")
PROGRESS = ("lines", "steps", "images", "values", "origin", "source", "source_train_accuracy")  # of a Run
HEADER = "epoch     loss    seen  unseen overall  images/s  seconds"
MOST, LEAST = torch.finfo(torch.float32).max, sys.float_info.min  # finite, and more than 0
LIMITS = dict.fromkeys(("seed", "split_seed", "source_seed", "pseudo_split", "probe_steps"), (0, 2**63 - 1))
LIMITS |= dict.fromkeys(("epochs", "steps_per_epoch", "batch_size", "copies", "tau"), (1, 2**63 - 1))
LIMITS |= dict.fromkeys(("lr", "backbone_lr", "weight_decay", "checkpoint_every"), (0, MOST))
LIMITS |= dict.fromkeys(("distill_weight", "rank_weight", "ft_lr_scale", "alpha"), (0, MOST))
LIMITS |= {"a": (0, 1), "left_out": (0, 1), "memory": (0, 1), "late_lr": (LEAST, MOST), "clip_grad": (LEAST, math.inf)}


def check_flags(args):
    """Raises InputError on a flag's value outside LIMITS; nan is outside, None is left to the data set's recipe."""
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (0, 0))
        if name in LIMITS and value is not None and not low <= value <= high:
            least = "more than 0" if low == LEAST else f"{low} or more"
            most = "finite" if high >= MOST else f"at most {high}"
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {least if value < low else most}")
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise InputError(f"--name {args.name}: must be the name of a folder, not a path")


def differences(old, new):
    """What two runs' arguments differ in, for people; "" if in nothing that changes the result."""
    same = set(NOT_COMPARED) - ({"data_root"} if new.get("dataset") == "folder" else set())  # there it is the data
    names = [name for name in new | old if name not in same and new.get(name) != old.get(name)]
    return ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in names)


def fingerprint(model, task):
    """A digest of the weights and of the target's labels and seen classes, for what args.json names by a path only."""
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), task.seen, task.target_train.labels, task.target_test.labels):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def agree(old, new):
    """Whether figures are the same up to rounding; a dict may lack what an earlier version did not compute."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(agree(old[name], new[name]) for name in old.keys() & new.keys())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(agree, old, new))
    return old == new or (isinstance(old, float) and isinstance(new, float) and abs(old - new) < 1e-6)


class Run:
    """The folder runs/<dataset>/<source>-<target>/<method>/split<k>-seed<s>[-source<n>]/ and what is written into it.

    with Run(__file__, args) as run:        # an InputError inside is shown as one line, exit code 2
        args = run.open(task)               # writes nothing yet; a finished run is shown again and ends here
        run.evaluate(0, model)              # one line in log.jsonl and on the terminal
        run.resume(model=model, ...)        # from the checkpoint of an earlier start; run.epoch and run.steps say where
        run.step(loss, images)              # counts a training step without waiting for the device
        run.finish(model)                   # logits.npz, model.pt and, last, done.json

    Exit codes: 3, another process has the folder; 130 and 143, Ctrl-C and SIGTERM: the same command goes on.
    """

    def __init__(self, script, args):
        self.args, self.started, self.lock, self.handlers = args, time.perf_counter(), None, {}
        self.method = args.name or Path(script).stem + ("-oracle" if args.oracle else "")
        self.lines, self.epoch, self.steps, self.images, self.values, self.pending = [], 1, 0, 0, {}, {}
        self.origin, self.features = None, None

    def __enter__(self):
        if not gc.get_freeze_count():
            gc.freeze()  # no collection, the one at exit neither, goes through what the imports made
        SAVING.update(minutes=self.args.checkpoint_every, in_step=False, signal=0)
        for number in (signal.SIGINT, signal.SIGTERM):
            # nohup, or a shell's &, has said that the signal shall be ignored
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, on_signal)
        try:
            check_flags(self.args)
        except InputError as error:
            self.__exit__(InputError, error, None)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        asked, SAVING["signal"], SAVING["in_step"] = SAVING["signal"], 0, False
        if self.lock is not None:
            self.leave()
        if isinstance(error, torch.OutOfMemoryError):
            error = InputError(
                f"--batch-size {self.args.batch_size} (512 where nothing is trained): --device {self.args.device} is "
                f"out of memory; pass a smaller one, and --overwrite ({first_line(error)})"
            )
        if isinstance(error, InputError | OSError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if kind is SystemExit and asked:
            command = "the same command" + ", without --overwrite," * (self.args.overwrite and bool(self.lines))
            print(f"stopped by {signal.Signals(asked).name}; {command} goes on", file=sys.stderr)

    def leave(self):
        """Give the folder free, and take it away if nothing was written into it."""
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if [path.name for path in self.folder.iterdir()] == [".lock"]:
                (self.folder / ".lock").unlink()
                for folder in (self.folder, *list(self.folder.parents)[:3]):
                    folder.rmdir()
        self.lock.release()

    def open(self, task):
        """The args, with the task's recipe in place of every None. Raises InputError if the folder holds a run with
        other arguments; if it holds a finished run with these, prints its result and ends the program, as it does
        with exit code 3 if another process works in it."""
        defaults = {"source": task.source, "target": task.target, "seen_classes": task.seen_classes, **task.recipe}
        blank = {name: value for name, value in defaults.items() if getattr(self.args, name) is None}
        args = self.args = dataclasses.replace(self.args, **blank)
        where = f"{args.dataset}/{args.source}-{args.target}/{self.method}/split{args.split_seed}-seed{args.seed}"
        where += f"-source{args.source_seed}" if args.source_seed else ""
        where += "" if args.pseudo_split is None else f"-pseudo{args.pseudo_split}"
        self.task, self.folder = task, Path(args.runs_dir) / where
        self.record = {"method": self.method, **dataclasses.asdict(args)}
        if os.path.isfile(args.seen_classes):
            self.record["seen_classes"] = ",".join(
                name for name, is_seen in zip(task.classes, task.seen, strict=False) if is_seen
            )
        self.show_if_finished()
        self.lock = take_lock(self.folder / ".lock", owned="*")
        if self.lock is None:
            print(f"another process is at work in {self.folder}; wait for it, or pass --name", file=sys.stderr)
            raise SystemExit(BUSY)
        self.show_if_finished()  # by now, perhaps
        self.checkpoint = Checkpoint(self.folder / "checkpoint.pt", self.record, anew=args.overwrite)
        if saved := self.checkpoint.content:
            try:
                vars(self).update({name: saved[name] for name in PROGRESS})
                self.epoch, self.started = len(self.lines), self.started - saved["seconds"]
            except (KeyError, TypeError) as error:
                self.checkpoint.refuse(f"incomplete ({type(error).__name__}: {error})")
        return args

    def show_if_finished(self):
        """Ends the program if the folder holds a finished run with the same arguments. Raises InputError if it holds
        one with others, or figures that its logits do not give."""
        if self.args.overwrite or not any((self.folder / name).exists() for name in ("args.json", "done.json")):
            return
        if other := differences(read_json(self.folder / "args.json"), self.record):
            raise InputError(f"{self.folder} holds a run with {other}; pass --overwrite, --name or --runs-dir")
        if (self.folder / "done.json").exists():
            try:
                done, run = read_json(self.folder / "done.json"), read_run(self.folder)
            except InputError as error:
                raise InputError(f"{error}; --overwrite runs it again") from error
            if not agree([done.get("source"), done.get("final")], [run["source"], run["final"]]):
                raise InputError(f"{self.folder}: logits.npz does not give what done.json has; pass --overwrite")
            with contextlib.suppress(OSError):  # if it was killed between its last two steps
                (self.folder / "checkpoint.pt").unlink()
            print(f"already finished (--overwrite runs it again): {self.folder}\n{result_table(run)}")
            raise SystemExit(0)

    def resume(self, **parts):
        """Put the parts, all that a step changes, where the checkpoint of an earlier start left them, if there is one.
        From here on Ctrl-C and SIGTERM wait for the end of a step and for its checkpoint."""
        self.checkpoint.resume(**parts)
        self.clock = time.perf_counter()
        if self.checkpoint.content:
            self.clock -= self.checkpoint.content["seconds_since_evaluation"]
            self.checkpoint.content = None
            self.write_log()
            print(f"{self.folder} goes on after step {self.steps}\n{HEADER}")

    def write_log(self):
        if not (self.folder / "args.json").exists():
            write_text(self.folder / "args.json", json.dumps(self.record, indent=2))
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def step(self, loss, images, **extras):
        """Count a training step. The loss, and extras (scalar tensors) whose means evaluate puts into the log, stay on
        their device until then or until a checkpoint is due."""
        self.steps, self.images = self.steps + 1, self.images + len(images)
        for name, value in {"loss": loss, **extras}.items():
            self.pending.setdefault(name, []).append(value.detach())
        if self.checkpoint.due():
            self.save()

    def save(self):
        """Write the checkpoint; returns when its steps were done. Raises InputError at a loss or weight not finite."""
        for name, values in self.pending.items():
            self.values.setdefault(name, []).extend(torch.stack(values).tolist())  # waits for the device
        self.pending, now = {}, time.perf_counter()
        check_progress(self.checkpoint, self.values.get("loss", []), self.steps, self.args.lr, self.args.backbone_lr)
        progress = {name: getattr(self, name) for name in PROGRESS}
        self.checkpoint.save(**progress, seconds=now - self.started, seconds_since_evaluation=now - self.clock)
        return now

    def evaluate(self, epoch, model, keep_features=False, **extras):
        """Accuracies on the target's test images, with extras (numbers or lists) beside them in log.jsonl. Epoch 0 is
        the source model and starts the folder, in place of what was there; with keep_features its features of the
        target's training images, float32 [N, D], are left in self.features. Does nothing if a checkpoint has it."""
        if epoch == 0:
            before, self.origin = self.origin, fingerprint(model, self.task)
            if self.lines and before != self.origin:
                self.checkpoint.refuse("of a run from another source model or with other classes or images")
        if epoch < len(self.lines):
            return
        done = self.save() if epoch else None
        speed = self.images / (done - self.clock) if self.images else None
        interruptible()
        before = time.perf_counter()
        test_logits = self.test_logits = predict(model, self.task.target_test.images)
        test_speed = len(test_logits) / (time.perf_counter() - before)
        figures = accuracies(test_logits, self.task.target_test.labels, self.task.seen)
        means = {name: mean if math.isfinite(mean := float(np.mean(v))) else None for name, v in self.values.items()}
        if epoch == 0:
            train_logits = predict(model, self.task.target_train.images, return_features=keep_features)
            if keep_features:
                train_logits, self.features = train_logits
            self.source = {"test": torch.from_numpy(test_logits), "train": torch.from_numpy(train_logits)}
            self.source["figures"] = figures
            correct = train_logits.argmax(1) == self.task.target_train.labels.numpy()
            self.source_train_accuracy = extras["train"] = mean_percent(correct)
            for name in ("done.json", "logits.npz", "model.pt", "checkpoint.pt", "args.json"):
                (self.folder / name).unlink(missing_ok=True)
            print(f"{self.folder}\n{HEADER}")
        seconds, loss = time.perf_counter() - self.started, means.pop("loss", None)
        line = {"epoch": epoch, "step": self.steps, "loss": loss, **figures, "images_per_second": speed}
        self.lines.append(line | {"test_images_per_second": test_speed, "seconds": seconds, **extras, **means})
        self.write_log()
        cells = number(loss, 9, 4) + "".join(number(figures[k], 8) for k in ("seen", "unseen", "overall"))
        more = "".join(f"  {k} {v:.4g}" for k, v in (extras | means).items() if isinstance(v, float))
        print(f"{epoch:5d}{cells}{number(speed, 10, 0)}{number(seconds, 9, 1)}{more}", flush=True)
        self.values, self.images, self.clock, SAVING["in_step"] = {}, 0, time.perf_counter(), epoch > 0

    def finish(self, model):
        """Save what `model`, the one evaluated last, is and predicts. With done.json, the last file, it is finished."""
        interruptible()
        arrays = {
            "test_logits": self.test_logits,
            "test_labels": self.task.target_test.labels.numpy(),
            "train_logits": predict(model, self.task.target_train.images),
            "train_labels": self.task.target_train.labels.numpy(),
            "source_test_logits": self.source["test"].numpy(),
            "source_train_logits": self.source["train"].numpy(),
            "seen": self.task.seen.numpy(),
            "classes": np.array(self.task.classes),
        }
        write_atomic(self.folder / "logits.npz", lambda stream: np.savez(stream, **arrays))
        if self.args.save_model:
            content = {"model": model.state_dict(), "classes": self.task.classes, "arch": self.args.arch}
            write_checkpoint(self.folder / "model.pt", content)
        final = accuracies(arrays["test_logits"], arrays["test_labels"], arrays["seen"])
        command = shlex.join(["python", f"methods/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        done = {"source": self.source["figures"], "final": final, "args": self.record, "command": command}
        done |= {"seconds": time.perf_counter() - self.started, "versions": versions(self.args.device, model)}
        write_text(self.folder / "done.json", json.dumps(done, indent=2))
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        print(result_table(done))


def versions(device, model):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else None
    amp = next((str(module.amp) for module in model.modules() if getattr(module, "amp", None)), None)
    packages = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {**packages, "machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu, "amp": amp}


# ------------------------------------------------------------------------------------------ tables


def number(value, width=0, digits=2):
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def table(rows, style="md"):
    """Rows (dicts with the same keys) as a Markdown table with two decimals, or as CSV or JSON in full precision."""
    if style == "json":
        return json.dumps(rows, indent=2)
    if style == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([rows[0].keys(), *(row.values() for row in rows)])
        return stream.getvalue().rstrip()
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [[v if isinstance(v, str) else number(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def result_table(done):
    return table([{"model": name, **done[key]} for name, key in (("source (epoch 0)", "source"), ("result", "final"))])


ARRAYS = ("test_logits", "source_test_logits", "test_labels", "train_logits", "source_train_logits", "train_labels")
ARRAYS += ("seen", "classes")
CALIBRATED = ("alg", "alg_source", "pcv", "oracle_gamma")  # biases on the unseen classes' logits


def read_arrays(path, names=ARRAYS, what="the complete logits.npz of a run"):
    """The arrays of these names of an npz file, in their order. Raises InputError: the file is not `what`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not {what} ({type(error).__name__}: {error})") from error


def read_test_arrays(folder):
    """Logits [N, C], labels [N] and the seen mask [C] of the test images of the run in `folder`."""
    return read_arrays(Path(folder) / "logits.npz", ("test_logits", "test_labels", "seen"))


def pseudo_splits(folder):
    """For pcv_gamma: every finished pseudo split of the run in `folder`, made by the run's own command and
    --pseudo-split k. No image of a truly unseen class has a part in it."""
    return [read_test_arrays(path.parent) for path in sorted(folder.parent.glob(f"{folder.name}-pseudo*/done.json"))]


def read_run(path):
    """{"run", "classes", "source", "final", *CALIBRATED} of a run folder or its logits.npz.

    Those of CALIBRATED are None or the accuracies with the bias of that name, and "gamma"; pcv also has "gamma_spread",
    from the least to the largest of its pseudo splits. Raises InputError, naming the file.
    """
    path = Path(path) / "logits.npz" if Path(path).is_dir() else Path(path)
    logits, source, labels, train_logits, source_train, train_labels, seen, classes = read_arrays(path)
    run = {"run": str(path.parent), "classes": classes.tolist()}
    run["source"] = accuracies(source, labels, seen, f"{path}, source_test_logits")
    run["final"] = accuracies(logits, labels, seen, f"{path}, test_logits")
    own = check(train_logits, train_labels, seen, f"{path}, train_logits")[2][train_labels]  # all but an oracle's extra
    gammas = dict.fromkeys(CALIBRATED)
    gammas["alg"] = alg_gamma(train_logits[own], train_labels[own], seen)
    gammas["alg_source"] = alg_source_gamma(train_logits[own], source_train[own], train_labels[own], seen)
    if splits := pseudo_splits(path.parent):
        gammas["pcv"], spread = pcv_gamma(splits)
    if run["final"]["ausuc"] is not None:
        gammas["oracle_gamma"] = best_gamma(logits, labels, seen)
    for name, gamma in gammas.items():
        run[name] = None if gamma is None else {"gamma": gamma, **accuracies(logits, labels, seen, gamma=gamma)}
    if splits:
        run["pcv"]["gamma_spread"] = spread
    return run


def row(run):
    """A line of the table for what read_run returns."""
    cells = {"run": run["run"], "source_overall": run["source"]["overall"], **run["final"]}
    for name in CALIBRATED:
        figures = run[name] or {}
        cells |= {f"{name}_overall": figures.get("overall"), f"{name}_bias": figures.get("gamma")}
    return cells | {"pcv_bias_spread": (run["pcv"] or {}).get("gamma_spread")}


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, format: Literal["md", "csv", "json"] = "md"):
    """Print a table with a row for every run, recomputed from its logits.npz.

    Args:
        runs: run folders, or folders with runs somewhere below them, or logits.npz files
        format: md rounds to two decimals; csv and json give full precision
    """
    try:
        paths = [p for run in runs for p in (sorted(run.rglob("logits.npz")) if run.is_dir() else [run]) or [run]]
        results = [read_run(path) for path in paths]
        for other in results[1:]:
            if other["classes"] != results[0]["classes"]:
                raise InputError(
                    f"{other['run']} and {results[0]['run']} are over different classes "
                    f"({len(other['classes'])} and {len(results[0]['classes'])}): print them one at a time"
                )
        print(table(results if format == "json" else [row(result) for result in results], format))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    tyro.cli(main)
