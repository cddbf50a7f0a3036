"""Images of a list of files, decoded once into a memory-mapped uint8 cache.

    images, good = open_images("office_home-Art", root, files, 224, caches, skip_bad=False)
    images[torch.tensor([3, 1])]        # uint8 [2, 3, 224, 224], channels-last, read from the cache file

A cache file is NAME-SIZE-KEY.npy, uint8 [N, S, S, 3]: what channels-last batches want. KEY is of the files' names,
sizes and times, the image size, how it is made square, and CACHE_VERSION: other files make another cache. Any can be
deleted at any time. The folder is flags.cache_folders'.

The images have the size that evaluation wants. Training crops are taken from these squares, and enlarged by up to 1.4;
the published recipe takes them from the photograph. So what a crop shows is squeezed more: of a 400x300 photograph by
1.07 to 1.67 (5th and 95th percentile), as published by 1.01 to 1.33.
"""

import contextlib
import glob
import hashlib
import mmap
import os
import shutil
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from files import InputError, take_lock, write_text

from .decode import read_image

CACHE_VERSION = 4  # raise it when read_image gives other pixels for the same file, or what is kept changes
CHUNK = 32  # images that a thread decodes at a time


class Images:
    """uint8 images [N, 3, S, S] that stay in the cache file until they are asked for.

    images[index] for an int64 tensor or a slice gives a uint8 tensor, channels-last; len, shape and
    split(n) are those of a tensor; subset(index) are the images of an int64 array, still in the file. sums: a checksum
    for each row of the file, uint32, verified when the image is first read. Raises InputError if it is wrong.
    """

    def __init__(self, pixels, index, key, sums=None):
        self.pixels, self.index, self.key = pixels, index, key
        self.sums = np.zeros(len(pixels), np.uint32) if sums is None else sums  # 0: verified

    def __len__(self):
        return len(self.index)

    @property
    def shape(self):
        return torch.Size((len(self.index), 3, *self.pixels.shape[1:3]))

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            index = index.numpy()
        places = self.index[index]
        batch = np.asarray(self.pixels)[places]
        wanted = self.sums[places]
        for i in np.flatnonzero(wanted):
            if wanted[i] != checksum(batch[i]):
                raise InputError(f"{self.pixels.filename}: image {places[i]} is not as it was written; delete the file")
        self.sums[places] = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # give the mapped pages back: they stay in the system's cache, not in ours
            self.pixels.base.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(batch).movedim(3, 1)

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


def pick(array, index):
    """array[index] for an int64 array; of Images those, still in their file; None of None."""
    if isinstance(array, Images):
        return array.subset(index)
    return None if array is None else array[index]


def writable(folder):
    """Whether files can be made in the folder, which is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def choose_cache(file, folders):
    """The path of a cache file: where it is, else in the first of the folders that can be written. Where that is not
    the first of all it says so."""
    for folder in folders:
        if (folder / file).exists():
            return folder / file
    folder = next(filter(writable, folders), folders[0])
    if folder != folders[0]:
        print(f"{folders[0]} cannot be written: the decoded images are kept in {folder}")
    return folder / file


def open_images(name, root, files, size, caches, skip_bad=False, fit="squash"):
    """(Images, indices int64 of the files that they are of) for a list of paths below root. fit: as in read_image.

    The cache file, in one of the folders `caches`, is built where there is none. Raises InputError that lists every
    file that cannot be read; with skip_bad they are left out, and listed in NAME-SIZE-KEY.bad.txt beside the cache.
    """
    if not 8 <= size <= 4096:
        raise InputError(f"--image-size {size}: choose 8 to 4096 pixels")
    if not files:
        raise InputError(f"{root}: no image of {name} in it")
    key, missing = list_key(root, files, size, fit)
    if missing and not skip_bad:
        some = "".join(f"  {printable(files[i])}\n" for i in missing[:10])
        more = f"  and {len(missing) - 10} more\n" * (len(missing) > 10)
        raise InputError(
            f"{len(missing)} of {len(files)} images of {name} are missing below {root}:\n{some}{more}"
            "the download or its extraction is incomplete; --skip-bad-images leaves them out"
        )
    path = choose_cache(f"{name}-{size}-{key}.npy", caches)
    if not path.exists():
        build(path, root, files, size, fit)
    pixels = read_array(path, (len(files), size, size, 3), np.uint8, "r")
    sums = read_array(path.with_suffix(".sums.npy"), (len(files),), np.uint32, None)
    good = good_files(sums, path.with_suffix(".bad.txt"), name, root, skip_bad)
    return Images(pixels, good, key, sums), good


def good_files(sums, report, name, root, skip_bad):
    """Indices of the files that could be read: the others have no checksum.

    Raises InputError, with what the file `report` says of them, unless skip_bad leaves them out.
    """
    good = np.flatnonzero(sums)
    bad = f"{len(sums) - len(good)} of {len(sums)} images"
    if len(good) < len(sums) and not skip_bad:
        listed = textwrap.indent(report.read_text("utf-8"), "  ") if report.exists() else ""
        raise InputError(
            f"{bad} of {name} below {root} cannot be read:\n{listed}mend or remove them, or pass --skip-bad-images; "
            f"if they were only out of reach, delete {report.with_name(report.name[:-7] + 'npy')} to read them again"
        )
    if len(good) < len(sums):
        print(f"{name}: {bad} left out, listed in {report}")
    if not len(good):
        raise InputError(f"{root}: none of the {len(sums)} images of {name} can be read, see {report}")
    return good


def list_key(root, files, size, fit):
    """(key of the list, indices of files that are not there). files: paths below root, as str."""
    digest, missing = hashlib.sha256(f"{CACHE_VERSION} {size} {fit}\n".encode()), []
    for i, name in enumerate(files):
        try:
            stat = os.stat(os.path.join(root, name))
            line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except (OSError, ValueError):  # or no name that a file can have
            missing.append(i)
            line = f"{name}\0missing\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()[:16], missing


def read_array(path, shape, kind, mode):
    """np.load, mapped in this mode. Raises InputError, naming the file, if it does not hold such an array."""
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"holds {array.dtype} {array.shape}, not {shape}")
    except Exception as error:  # numpy reads the header with a tokenizer of Python, which has errors of its own
        raise InputError(f"{path}: not a whole file of the cache ({error}); delete it and its .npy") from error
    return array


def checksum(pixels):
    return zlib.crc32(pixels) or 1  # 0 stands for an image that is not there or cannot be read


def printable(text):
    """One line that can be printed, whatever characters a file name has."""
    return repr(text)[1:-1]


def build(path, root, files, size, fit):
    """Decode all files into the cache file `path`. Of two builds at a time the second waits for the first."""
    lock_file = path.with_suffix(".lock")
    kept = f"{path.parent}: the decoded images are kept in this folder, which cannot be written"
    try:
        lock = take_lock(lock_file, f"{glob.escape(path.stem)}.*", wait=True)
    except InputError as error:
        raise InputError(f"{kept} ({error}); pass another with --cache-dir") from error
    try:
        if not path.exists():
            decode_files(path, root, files, size, fit)
    except OSError as error:
        raise InputError(f"{kept} ({error}); pass another with --cache-dir") from error
    finally:
        lock.release()
    with contextlib.suppress(OSError):  # where another build has it open, it may have to stay
        lock_file.unlink(missing_ok=True)


def decode_files(path, root, files, size, fit):
    """Decode all files into `path`. Until it is complete it is called NAME.npy.part, and a next build goes on from it.

    Raises InputError if the disk has too little space.
    """
    part = path.with_suffix(".npy.part")
    pixels = continued(part, (len(files), size, size, 3), np.uint8)
    sums = continued(path.with_suffix(".sums.npy"), (len(files),), np.uint32)
    sums[:] = sums  # take the space on the disk now: a full disk later would be no error in a mapped file, but a crash
    need = np.count_nonzero(sums == 0) * size * size * 3
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise InputError(
            f"{path.parent}: {len(files)} images of {size}x{size} need {need / 1e9:.1f} GB, where {free / 1e9:.1f} GB "
            "are free; make room, or pass another --cache-dir or a smaller --image-size"
        )
    bad = fill(pixels, sums, [os.path.join(root, file) for file in files], fit, path.name.rsplit("-", 2)[0])
    if bad:
        lines = (f"{printable(files[i])}: {printable(why)}\n" for i, why in sorted(bad.items()))
        write_text(path.with_suffix(".bad.txt"), "".join(lines))
    pixels.flush()  # of all that was written to the file, not only by way of the array
    sums.flush()
    del pixels  # no file that is mapped can be renamed on Windows
    os.replace(part, path)


def continued(path, shape, kind):
    """The array that a killed build left in the file `path`, or a new one of zeros there; mapped."""
    try:
        return read_array(path, shape, kind, "r+")
    except InputError:
        return np.lib.format.open_memmap(path, "w+", kind, shape)


def fill(pixels, sums, paths, fit, name):
    """Decode by threads, as Pillow works outside of Python's global lock. Returns {row: why it cannot be read}.

    A row that a killed build left is kept if its checksum is right. Pixels are written, not put into the mapped array:
    so a full disk is an OSError, and memory stays flat.
    """
    bad, size, image_bytes = {}, pixels.shape[1], pixels[0].nbytes

    def decode_chunk(rows):
        with open(pixels.filename, "r+b") as stream:
            for row in rows:
                place = pixels.offset + row * image_bytes
                stream.seek(place)
                if sums[row] and sums[row] == checksum(stream.read(image_bytes)):
                    continue  # a killed build left it
                sums[row] = 0
                try:
                    image = read_image(paths[row], size, fit)
                except ValueError as error:
                    bad[row] = str(error)
                    continue
                stream.seek(place)
                stream.write(image)
                sums[row] = checksum(image)
        return len(rows)

    rows = range(len(paths))
    chunks = [rows[start : start + CHUNK] for start in rows[::CHUNK]]
    bar = tqdm(total=len(paths), desc=f"decoding {name}", unit="image")
    with bar, warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of odd EXIF blocks and large sides; what cannot be read is listed
        for done in pool.map(decode_chunk, chunks):
            bar.update(done)
    return bad
