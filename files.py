"""Files that survive: what is written is whole or not there, however the process ends.

Atomic writes, locks, the request to stop, and the checkpoint of a training that goes on where it was.
"""

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import filelock
import torch


class InputError(ValueError):
    """A mistake that the user can mend. A program prints it without a traceback and ends with exit code 2."""


def fail(error):
    """Say what was wrong, and end with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def write_atomic(path, write):
    """Fill `path` by write(binary stream). The file holds its old content or all of the new, even after a crash.
    Raises InputError, naming the file, where the system cannot write (no space left, no permission)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path}: cannot be written ({why}); no file was changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if hasattr(os, "O_DIRECTORY"):  # the new name survives a crash only if the folder is synced too
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_text(path, text):
    write_atomic(path, lambda stream: stream.write(text.encode()))


def write_checkpoint(path, content):
    """Write what torch.save makes of `content`; by way of memory, as torch does not say why a full disk fails it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda stream: stream.write(buffer.getbuffer()))


def read_checkpoint(path, flag="checkpoint"):
    """Read what torch.save wrote to `path`, as data only, to the CPU. Verify its checksums, which torch does not.
    Raises InputError, naming the flag and the file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if program := re.search(r"GLOBAL (\S+) was not an allowed|(TorchScript)", str(error)):
            why = f"not a readable checkpoint, as it holds objects of a program ({program[1] or program[2]})"
            how = "save the weights alone where it was made: torch.save(model.state_dict(), FILE)"
            raise InputError(f"{flag} {path}: {why}; {how}") from error
        raise InputError(f"{flag} {path}: not a readable checkpoint ({first_line(error)})") from error


def bare_state(saved):
    """The state dict in the dict that a program saved: alone or under "state_dict" or "model". Its names lose a
    "module." or "model." that all of them have."""
    for name in ("state_dict", "model"):
        if isinstance(saved.get(name), dict):
            saved = saved[name]
    for prefix in ("module.", "model."):
        if all(str(key).startswith(prefix) for key in saved):
            saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return saved


def load_state(model, state, where):
    """model.load_state_dict. Raises InputError that lists keys missing, unexpected, of another shape or not finite."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    its = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()} if isinstance(state, dict) else {}
    problems = {
        "missing": [key for key in own if key not in its],
        "unexpected": [key for key in its if key not in own],
        "of another shape": [f"{key} {its[key]}, not {own[key]}" for key in own if its.get(key, own[key]) != own[key]],
        "not finite": [key for key in its if torch.is_tensor(state[key]) and not state[key].isfinite().all()],
    }
    problems = {kind: list(map(str, keys)) for kind, keys in problems.items() if keys}
    if problems:
        listed = [f"{kind}: {', '.join(keys[:6])}{' ...' * (len(keys) > 6)}" for kind, keys in problems.items()]
        raise InputError(f"{where}: does not fit the model; {'; '.join(listed)}")
    whole = model.state_dict()  # with the versions of its modules, which some need
    whole.update(state)
    model.load_state_dict(whole)


def read_json(path):
    """Read the dict that a run wrote to `path`. Raises InputError, naming the file."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("not what a run writes")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable ({error}); delete the run's folder or pass --overwrite") from error
    return content


def make_folder(path):
    """Make a folder and those above it, where they are not there. Raises InputError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror})") from error


def take_lock(path, owned, wait=False):
    """Lock the file `path`, or return None where another process has the lock and wait is False. The system frees the
    lock when the process ends, however it ends. Removes the temporary files that a dead owner left of files whose names
    match the glob pattern `owned`. Raises InputError where no lock can be made."""
    make_folder(path.parent)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        return None
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise InputError(f"{path}: cannot be locked ({getattr(error, 'strerror', error)})") from error
    for temporary in path.parent.glob(f".{owned}.tmp"):
        temporary.unlink(missing_ok=True)
    return lock


def differences(old, new):
    """The differences of two dicts of flags as text, "name old (now new), ..."; "" if there are none. None and False
    count as a missing flag, since an older run lacks the flags that came after it."""
    old, new = ({k: v for k, v in flags.items() if v is not None and v is not False} for flags in (old, new))
    names = [name for name in new | old if new.get(name) != old.get(name)]
    return ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in names)


class Stop:
    """Ctrl-C and SIGTERM, held back until the step that is under way is done and saved.

    minutes: between two checkpoints. signal: the number of the signal that came, or 0. in_step: whether a step may be
    under way. A second signal, and one outside of steps, ends the program at once with exit code 128 + its number.
    """

    def __init__(self, minutes=5.0):
        self.minutes, self.signal, self.in_step, self.handlers = minutes, 0, False, {}

    def listen(self):
        """Handle both signals, except one that is ignored already: SIGINT is, where a shell script used &."""
        main = threading.current_thread() is threading.main_thread()  # no other thread may
        for number in (signal.SIGINT, signal.SIGTERM):
            if main and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)

    def give_back(self):
        """Restore the handlers that were there before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        again, self.signal = self.signal, number
        if again or not self.in_step:
            raise SystemExit(128 + number)

    def hold(self):
        """From here on a signal waits for the end of a step."""
        self.in_step = True

    def release(self):
        """From here to the next hold a signal ends the program at once; one that is waiting does so now."""
        self.in_step = False
        if self.signal:
            raise SystemExit(128 + self.signal)


class Checkpoint:
    """The file from which a training goes on. It belongs to an owner, a dict: everything that determines the training.

    checkpoint = Checkpoint(path, owner, stop)  # content: what the file holds, or None where there is none
    checkpoint.resume(model=model, ...)         # puts all parts where the file left them
    if checkpoint.due():                        # every stop.minutes, and on a signal
        checkpoint.save(step=step)              # ends the program after a signal
    Raises InputError, naming the file, where it is damaged, another owner's or does not fit the parts.
    """

    def __init__(self, path, owner, stop, anew=False):
        self.path, self.owner, self.stop, self.parts, self.content = path, owner, stop, {}, None
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
        raise InputError(f"checkpoint {self.path}: {why}; delete it to start anew (a run's: or pass --overwrite)")

    def resume(self, **parts):
        """Restore the parts (model, optimizer, more with a state_dict, dicts of lists of tensors) and random states."""
        self.parts, self.saved = parts, time.perf_counter()
        self.stop.hold()
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
            states = self.content["generators"]
            torch.set_rng_state(states["cpu"])
            if device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"], device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self.refuse(f"does not fit the model or the optimizer ({first_line(error)})")

    def due(self):
        return self.stop.signal or time.perf_counter() - self.saved >= 60 * self.stop.minutes

    def check_finite(self, losses, steps, advice):
        """Raises InputError, with the advice, if a weight, a value of the optimizer's state or a loss is not finite.
        losses: floats of the last len(losses) steps. steps: the number of the last one."""
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        tensors = [*self.parts["model"].state_dict().values()]
        tensors += [value for state in self.parts["optimizer"].state.values() for value in state.values()]
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors if torch.is_tensor(tensor)]).all()
        if bad is None and finite:
            return
        step = steps if bad is None else steps - len(losses) + bad + 1
        what = "a weight" if bad is None else f"the loss, {losses[bad]},"
        raise InputError(f"step {step}: {what} is not finite, with {advice}")

    def save(self, **more):
        """Write all parts, the random states and `more`. Ends the program if a signal has asked for it."""
        states = {name: part if isinstance(part, dict) else part.state_dict() for name, part in self.parts.items()}
        device, generators = next(self.parts["model"].parameters()).device, {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(device)
        write_checkpoint(self.path, {"owner": self.owner, "parts": states, "generators": generators, **more})
        self.saved = time.perf_counter()
        if self.stop.signal:
            self.stop.release()
