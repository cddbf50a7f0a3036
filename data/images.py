"""Images of a list of files, decoded once into a memory-mapped uint8 cache.

    images, good = open_images("office_home-Art", root, files, 224, cache, skip_bad=False)
    images[torch.tensor([3, 1])]        # uint8 [2, 3, 224, 224], channels-last, read from the cache file

A cache file is data_root/.cache/NAME-SIZE-KEY.npy, uint8 [N, S, S, 3]: what channels-last batches want, without another
copy. KEY is of the files' names, sizes and times, the image size and CACHE_VERSION, so other files make another cache;
any of them can be deleted at any time. The images are kept at the size that evaluation wants, so there they are exactly
the published recipe's; training crops (70 % of the area at least) are enlarged from them by up to 1.4.
"""

import hashlib
import io
import json
import mmap
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from files import InputError, write_atomic, write_text

from . import decode

CACHE_VERSION = 2  # raise it when read_image gives other pixels for the same file, or what is kept changes
CHUNK = 32  # images that a worker decodes at a time; with another number here, raise CACHE_VERSION
SMALL = 4 * CHUNK  # up to so many are decoded in this process: workers would take longer to start
SAVE_EVERY = 20.0  # seconds between two points from which a build that was killed goes on


class Images:
    """uint8 images [N, 3, S, S] that stay in the cache file until they are asked for.

    images[index] for an int64 tensor, a slice or an int gives a uint8 tensor, channels-last; len, shape and
    split(n) are those of a tensor; subset(index) are the images of an int64 array, still in the file. sums: {row in
    the file: checksum}, against which an image is held when it is first read; another one is an InputError.
    """

    def __init__(self, pixels, index, key, sums=None):
        self.pixels, self.index, self.key, self.sums = pixels, index, key, {} if sums is None else sums

    def __len__(self):
        return len(self.index)

    @property
    def shape(self):
        return torch.Size((len(self.index), 3, *self.pixels.shape[1:3]))

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            index = index.numpy()
        rows = self.index[index]
        batch = np.asarray(self.pixels)[np.atleast_1d(rows)]
        for row, image in zip(np.atleast_1d(rows).tolist(), batch, strict=True):
            wanted = self.sums.get(row)
            if wanted is not None:
                if zlib.crc32(image) != wanted:
                    raise InputError(f"{self.pixels.filename}: image {row} is not as it was written; delete the file")
                self.sums.pop(row, None)  # another thread may have read it too
        if hasattr(mmap, "MADV_DONTNEED"):  # give the mapped pages back: they stay in the system's cache, not in ours
            self.pixels.base.madvise(mmap.MADV_DONTNEED)
        batch = torch.from_numpy(batch).movedim(3, 1)
        return batch if np.ndim(rows) else batch[0]

    def split(self, size):
        """The images in order, `size` at a time; a thread reads the next ones while some are used."""
        with ThreadPoolExecutor(1, "read ahead") as reader:
            coming = reader.submit(self.__getitem__, slice(0, size))
            for start in range(0, len(self), size):
                images = coming.result()
                coming = reader.submit(self.__getitem__, slice(start + size, start + 2 * size))
                yield images

    def subset(self, index):
        return Images(self.pixels, self.index[index], self.key, self.sums)

    def fingerprint(self):
        """Bytes that differ where the images do."""
        return self.key.encode() + self.index.tobytes()


def list_key(root, files, size):
    """(key of the list, indices of files that are not there). files: paths below root, as str."""
    digest, missing = hashlib.sha256(f"{CACHE_VERSION} {size}\n".encode()), []
    for i, name in enumerate(files):
        try:
            stat = os.stat(os.path.join(root, name))
            line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except (OSError, ValueError):  # or no name that a file can have
            missing.append(i)
            line = f"{name}\0missing\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()[:16], missing


def open_images(name, root, files, size, cache, skip_bad=False):
    """(Images, indices int64 of the files that they are of) for a list of paths below root, from the cache file in the
    folder `cache`. It is built first where there is none.

    Raises InputError that lists every file which cannot be read; with skip_bad they are left out and counted. Which
    they are stands in the file NAME-SIZE-KEY.bad.txt beside the cache.
    """
    if not 8 <= size <= 4096:
        raise InputError(f"--image-size {size}: choose 8 to 4096 pixels")
    if not files:
        raise InputError(f"{root}: no image of {name} in it")
    key, missing = list_key(root, files, size)
    path = Path(cache) / f"{name}-{size}-{key}.npy"
    report = path.with_suffix(".bad.txt")
    if missing and not skip_bad:
        some = "\n".join(f"  {printable(files[i])}" for i in missing[:10])
        more = f"\n  and {len(missing) - 10} more" * (len(missing) > 10)
        raise InputError(
            f"{len(missing)} of {len(files)} images of {name} are missing below {root}:\n{some}{more}\n"
            "the download or its extraction is incomplete; --skip-bad-images leaves them out"
        )
    if not path.exists():
        build(path, report, root, files, size)
    lines = report.read_bytes().decode().split("\n")[:-1] if report.exists() else []
    bad = {int(number): (file, why) for number, file, why in (line.split("\t") for line in lines)}
    if bad and not skip_bad:
        listed = "\n".join(f"  {file}: {why}" for file, why in bad.values())
        raise InputError(
            f"{len(bad)} of {len(files)} images of {name} below {root} cannot be read:\n{listed}\n"
            "mend or remove them, or pass --skip-bad-images"
        )
    if bad:
        print(f"{name}: {len(bad)} of {len(files)} images left out, listed in {report}")
    good = np.setdiff1d(np.arange(len(files)), list(bad))
    if not len(good):
        raise InputError(f"{root}: none of the {len(files)} images of {name} can be read, see {report}")
    pixels = read_array(path, (len(files), size, size, 3), np.uint8, mmap_mode="r")
    sums = read_array(path.with_suffix(".sums.npy"), (len(files),), np.uint32)
    return Images(pixels, good, key, dict(enumerate(sums.tolist()))), good


def read_array(path, shape, kind, **how):
    """np.load. Raises InputError, naming the file, if it does not hold such an array."""
    try:
        array = np.load(path, allow_pickle=False, **how)
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"holds {array.dtype} {array.shape}, not {shape}")
    except Exception as error:  # numpy reads the header with a tokenizer of Python, which has errors of its own
        raise InputError(f"{path}: not a whole file of the cache ({error}); delete it and its .npy") from error
    return array


def printable(name):
    """A file name that can be printed and kept in one line, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\t", "\\t")


# ------------------------------------------------------------------------------------------ building


def build(path, report, root, files, size):
    """Decode all files into `path`, with a process per core, and say in `report` which could not be read.

    What is being written is called NAME.npy.part; beside it, NAME.npy.part.txt says which chunks are safely on the
    disk, so a build that was killed goes on from there. Only a complete file gets its name. Of two builds of the same
    file at a time the second waits for the first.
    """
    import fcntl  # of Unix alone, and only photographs need it

    part, saved = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.txt")
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    chunks = range(0, len(files), CHUNK)
    total = header.tell() + len(files) * size * size * 3
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise InputError(
            f"--data-root {path.parent.parent}: the decoded images are kept in its folder .cache, which cannot be "
            f"written ({error}); make it writable, or pass a folder of links to the data sets"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return
        done = read_saved(saved) if os.fstat(file.fileno()).st_size == total else {}
        if not done:
            saved.unlink(missing_ok=True)
            file.write(header.getvalue())
            file.truncate(total)
        todo = [start for start in chunks if start not in done]
        free, need = shutil.disk_usage(path.parent).free, len(todo) * CHUNK * size * size * 3
        if need > free:
            raise InputError(
                f"--data-root {path.parent.parent}: {len(files)} images of {size}x{size} need {need / 1e9:.1f} GB in "
                f"{path.parent}, where {free / 1e9:.1f} GB are free; make room, or pass a smaller --image-size"
            )
        jobs = [
            {"paths": [os.path.join(root, name) for name in files[start : start + CHUNK]], "size": size}
            | {"offset": header.tell() + start * size * size * 3, "start": start}
            for start in todo
        ]
        fresh, clock = {}, time.monotonic()
        before, name = len(files) - sum(len(job["paths"]) for job in jobs), path.name.rsplit("-", 2)[0]
        with tqdm(total=len(files), initial=before, desc=f"decoding {name}", unit="image") as bar:
            for job, answer in decoded(part, jobs):
                fresh[job["start"]] = answer
                bar.update(len(job["paths"]))
                if time.monotonic() > clock + SAVE_EVERY:
                    os.fsync(file.fileno())  # first the pixels, then the line that says they are there
                    with open(saved, "a") as stream:
                        stream.write(json.dumps(fresh) + "\n")
                    done |= fresh
                    fresh, clock = {}, time.monotonic()
        os.fsync(file.fileno())
        bad, sums = {}, np.zeros(len(files), np.uint32)
        for start, answer in (done | fresh).items():
            bad |= {start + int(i): why for i, why in answer["bad"].items()}
            sums[start : start + len(answer["sums"])] = answer["sums"]
        write_atomic(path.with_suffix(".sums.npy"), lambda stream: np.save(stream, sums))
        if bad:
            rows = (f"{i}\t{printable(files[i])}\t{printable(bad[i])}\n" for i in sorted(bad))
            write_text(report, "".join(rows))
        os.replace(part, path)
        saved.unlink(missing_ok=True)


def read_saved(saved):
    """{start of a chunk that is done: what decode_chunk said of it} of a build that was killed."""
    done = {}
    for line in saved.read_text().splitlines() if saved.exists() else ():
        try:
            chunks = json.loads(line)
        except ValueError:  # the last line of a build that was killed may be cut
            break
        done |= {int(start): answer for start, answer in chunks.items()}
    return done


def decoded(part, jobs):
    """Yields (job, what decode_chunk says) as the jobs get done, in any order, by a process per core."""
    if sum(len(job["paths"]) for job in jobs) <= SMALL:
        with open(part, "r+b") as output:
            for job in jobs:
                try:
                    answer = decode.decode_chunk(job["paths"], job["size"], output, job["offset"])
                except OSError as error:
                    raise InputError(f"{part}: cannot be written ({error})") from error
                yield job, answer
        return
    waiting, results = queue.SimpleQueue(), queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", decode.__file__, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(min(cores, len(jobs)))
    ]

    def feed(worker):
        job = None
        try:
            while True:
                job = waiting.get_nowait()
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
                results.put((job, json.loads(worker.stdout.readline())))
        except queue.Empty:
            pass
        except (OSError, ValueError):  # it died, of a broken library or for want of memory
            results.put((job, {"error": f"exit code {worker.wait()}"}))

    threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in jobs:
            job, answer = results.get()
            if "error" in answer:
                names = f"{job['paths'][0]} to {job['paths'][-1]}"
                raise InputError(
                    f"decoding stopped ({answer['error']}) at one of the {len(job['paths'])} files {names}"
                )
            yield job, answer
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
