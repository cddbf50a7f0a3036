"""Downloads that go on where they stopped, and archives that are unpacked whole or not at all."""

import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib

from tqdm import tqdm

from files import InputError, make_folder


def fetch(url, path, md5=None):
    """Download url to path unless it is there. What has come so far is PATH.part, where the next try goes on; only a
    file of the size that the server announced, and of this md5 where one is known, gets its name.

    Raises InputError if the server cannot be reached or what came is not what was announced.
    """
    if path.exists():
        return
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:  # the server sends all of it, whatever was asked for
                start = 0
            total = start + response.length if response.length is not None else None
            bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name)
            with open(part, "r+b" if start else "wb") as file, bar:
                file.seek(start)
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is all there is
            raise InputError(f"--download: {url}: {error}; get it by hand and put it at {path}") from error
        total = int(error.headers.get("Content-Range", "*/-1").rpartition("/")[2])
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"--download: {url}: {error}; the same command goes on from what has come, or get it by hand: {path}"
        ) from error
    if total is not None and part.stat().st_size != total:
        more = "the same command goes on" if part.stat().st_size < total else f"delete {part}"
        raise InputError(f"--download: {url}: {part.stat().st_size:,} of {total:,} bytes came; {more}")
    from torchvision.datasets.utils import check_md5  # takes a second to import

    if md5 and not check_md5(part, md5):
        raise InputError(f"--download: {part}: its md5 is not {md5}, so it is damaged; delete it and start again")
    part.replace(path)


def unpack(archive, root, keep=lambda name: True):
    """Unpack a zip or tar archive (those of its files for whose name keep is true) into root, and delete it.

    It is unpacked into a hidden folder and moved when complete, so what stands in root under its own name is whole.
    Raises InputError if the archive is damaged or root holds something of its names.
    """
    hidden = root / f".unpacking-{archive.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        if archive.suffix == ".zip" or zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for name in tqdm(file.namelist(), desc=f"unpacking {archive.name}"):
                    if keep(name):
                        file.extract(name, hidden)  # compares checksums as it goes
        else:
            if not hasattr(tarfile, "data_filter"):  # that keeps members inside the folder
                raise InputError(
                    f"--download: unpacking {archive} safely takes Python 3.10.12, 3.11.4 or a later one; take one of "
                    f"these, or unpack it into {root} by hand and delete it"
                )
            with tarfile.open(archive) as file:
                for member in tqdm(file, desc=f"unpacking {archive.name}"):
                    if keep(member.name):
                        file.extract(member, hidden, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise InputError(f"--download: {archive} could not be unpacked ({error}); delete it if damaged") from error
    for path in sorted(hidden.iterdir()):
        if (root / path.name).exists():
            raise InputError(f"--download: {root / path.name} exists already; move it away, {archive} holds it too")
        path.replace(root / path.name)
    hidden.rmdir()
    archive.unlink()
