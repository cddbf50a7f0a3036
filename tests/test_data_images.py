"""Odd and damaged files, and the cache of decoded images."""

import errno
import functools
import http.server
import io
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import replicas
import torch
from conftest import ROOT, load_task
from PIL import Image

import data
from data import decode, download, images
from files import InputError

RED, WHITE = (200, 30, 20), (255, 255, 255)


def save(path, mode="RGB", colour=RED, size=(20, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def odd_files(folder):
    """{name: colour that it must be read as}."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "plain.jpg", quality=95)
    save(folder / "UPPER.JPEG", quality=95)
    save(folder / "progressive.jpg", progressive=True, quality=95)
    save(folder / "cmyk.jpg", "CMYK", (0, 217, 230, 55), quality=95)
    save(folder / "gray.jpg", "L", 90)
    save(folder / "gray16.png", "I;16", 90 * 257)
    save(folder / "bits.png", "1", 1)
    save(folder / "rgba.png", "RGBA", (*RED, 0))
    save(folder / "half.png", "RGBA", (*RED, 128))
    save(folder / "la.png", "LA", (90, 0))
    Image.new("RGB", (20, 12), RED).quantize(4).save(folder / "palette.png")
    Image.new("RGB", (20, 12), RED).quantize(4).save(folder / "clear_palette.png", transparency=0)
    save(folder / "clear_rgb.png", transparency=RED)
    save(folder / "lossless.webp", lossless=True)
    save(folder / "windows.bmp")
    save(folder / "a_png_called.jpg", format="PNG")
    save(folder / "one_pixel.png", size=(1, 1))
    save(folder / "thin.png", size=(1, 900))
    save(folder / "with space & ümlaut.png")
    half = tuple(round(c * 128 / 255 + 255 * 127 / 255) for c in RED)
    special = {"gray.jpg": (90,) * 3, "gray16.png": (90,) * 3, "half.png": half}
    special |= dict.fromkeys(("bits.png", "rgba.png", "la.png", "clear_palette.png", "clear_rgb.png"), WHITE)
    return {path.name: special.get(path.name, RED) for path in folder.iterdir()}


def damaged_files(folder):
    """{name: what the error says of it}."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "whole.jpg", size=(200, 200))
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "only_header.jpg").write_bytes(content[:20])
    (folder / "a_page.jpg").write_text("<html>404 not found</html>")
    (folder / "noise.png").write_bytes(bytes(range(256)) * 4)
    save(folder / "whole.png", size=(60, 60))
    png = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "cut.png").write_bytes(png[: len(png) - 30])
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "a_folder.jpg").mkdir()
    return {
        "empty.jpg": "empty file",
        "truncated.jpg": "truncated",
        "only_header.jpg": "",
        "a_page.jpg": "not an image",
        "noise.png": "not an image",
        "cut.png": "",
        "pipe.jpg": "not a regular file",
        "a_folder.jpg": "not a regular file",
    }


def test_odd_images_are_read_right(tmp_path):
    for name, colour in odd_files(tmp_path).items():
        pixels = decode.read_image(tmp_path / name, 8)
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - colour).max() <= 3, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = Image.new("RGB", (8, 8))
    upright.paste((255, 0, 0), (0, 0, 4, 4))
    upright.paste((0, 255, 0), (4, 0, 8, 4))
    T = Image.Transpose  # how the camera stored it: the inverse of what the flag asks for
    stored = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE]
    turn = [*stored, T.ROTATE_270][orientation - 1]
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "x.png", exif=exif(orientation))
    assert np.array_equal(decode.read_image(tmp_path / "x.png", 8), np.asarray(upright))


def jpegs(folder):
    """Ten JPEGs of odd sizes, all detail and no detail; their paths."""
    rng = np.random.default_rng(0)
    sizes = [(24, 18), (17, 31), (40, 40), (33, 16), (16, 33), (100, 99), (300, 7), (901, 1203), (640, 427), (5, 5)]
    for i, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (height // (i + 1) + 1, width // (i + 1) + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return [folder / f"{i}.jpg" for i in range(len(sizes))]


@pytest.mark.parametrize("size", [16, 31])
def test_images_are_resized_as_torchvision_resizes_them(tmp_path, size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    squash = Resize((size, size), InterpolationMode.BICUBIC)
    crop = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])  # CLIP's
    for path in jpegs(tmp_path):
        assert np.array_equal(decode.read_image(path, size), np.asarray(squash(Image.open(path))))
        assert np.array_equal(decode.read_image(path, size, "crop"), np.asarray(crop(Image.open(path))))


def test_a_strip_is_no_square(tmp_path):
    save(tmp_path / "strip.png", size=(2, 900))
    assert decode.read_image(tmp_path / "strip.png", 8).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="2x900 pixels: too thin"):
        decode.read_image(tmp_path / "strip.png", 8, "crop")


def test_every_damaged_file_is_named_and_can_be_left_out(tmp_path, capsys):
    good, bad = odd_files(tmp_path / "t" / "x"), damaged_files(tmp_path / "t" / "y")
    for name in ("good1.png", "good2.png", "good3.png"):
        save(tmp_path / "t" / "y" / name)
    (tmp_path / "t" / "y" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "t" / "y" / ".hidden.jpg").write_bytes(b"no image")
    replicas.tree(tmp_path / "s", ["x", "y"], 3)
    task = {"dataset": "folder", "source": "s", "target": "t", "seen_classes": "1", "data_root": tmp_path}
    task |= {"image_size": 8, "oracle": True}
    with pytest.raises(InputError, match=r"1 of 31 images of folder-t are missing below .*\n  t/y/dangling.jpg"):
        load_task(**task)
    (tmp_path / "t" / "y" / "dangling.jpg").unlink()
    for _ in range(2):  # decoded once, said every time
        with pytest.raises(InputError) as error:
            load_task(**task)
        lines = {line.partition(":")[0].strip(): line for line in str(error.value).splitlines()}
        for name, why in bad.items():
            assert why in lines[f"t/y/{name}"], name
        assert "8 of 30 images of folder-t" in str(error.value)
        assert not any(name in str(error.value) for name in [*good, "good1.png", "Thumbs.db", ".hidden.jpg"])
    capsys.readouterr()
    found = load_task(**task, skip_bad_images=True)
    assert len(found.target_train.labels) + len(found.target_test.labels) == len(good) + 3
    printed = capsys.readouterr().out
    assert "folder-t: 8 of 30 images left out, listed in " in printed
    report = (tmp_path / ".cache").glob("folder-t-8-*.bad.txt")
    named = [line.partition(": ")[0] for line in next(report).read_text("utf-8").splitlines()]
    assert sorted(named) == sorted(f"t/y/{name}" for name in bad)


@pytest.fixture
def listing(tmp_path):
    replicas.tree(tmp_path / "x", ["a", "b"], 20, "png")
    return tmp_path, [f"x/{c}/{i:05d}.png" for c in "ab" for i in range(20)], tmp_path / ".cache"


def open_list(root, files, cache, size=8, **options):
    return images.open_images("name", root, files, size, [cache], **options)[0]


def test_images_are_like_a_tensor(listing):
    root, files, cache = listing
    found = open_list(root, files, cache)
    whole = torch.stack([torch.tensor(decode.read_image(root / f, 8)).permute(2, 0, 1) for f in files])
    assert len(found) == 40 and found.shape == (40, 3, 8, 8)
    index = torch.tensor([7, 3, 39, 3])
    assert torch.equal(found[index], whole[index])
    assert found[index].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(found.split(16), whole.split(16), strict=True))
    assert torch.equal(found.subset(np.array([4, 2]))[:], whole[[4, 2]])
    batches = data.Split(found, torch.arange(40), {}).batches(8, "cpu", seed=0)
    pixels, labels = batches(3)
    assert torch.equal(pixels, whole[labels].float() / 255)


@pytest.mark.parametrize("change", ["time", "name", "size", "version", "image size", "fit"])
def test_the_cache_is_built_once_and_again_after_a_change(listing, change, monkeypatch):
    root, files, cache = listing
    open_list(root, files, cache)
    monkeypatch.setattr(images, "build", lambda *a: pytest.fail("built again"))
    size, fit = 8, "squash"
    open_list(root, files, cache)
    if change == "time":
        os.utime(root / files[3], (1, 1))
    elif change == "name":
        (root / files[3]).rename(root / "x/a/other.png")
        files[3] = "x/a/other.png"
    elif change == "size":
        stat = (root / files[3]).stat()
        (root / files[3]).write_bytes((root / files[3]).read_bytes() + b"\0")
        os.utime(root / files[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "version":
        monkeypatch.setattr(images, "CACHE_VERSION", 99)
    elif change == "image size":
        size = 9
    else:
        fit = "crop"
    with pytest.raises(pytest.fail.Exception, match="built again"):
        open_list(root, files, cache, size, fit=fit)


def read_all(root, files):
    return torch.stack([torch.tensor(decode.read_image(root / file, 8)).permute(2, 0, 1) for file in files])


def test_threads_decode_the_same_as_this_one(listing, monkeypatch):
    root, files, cache = listing
    whole = read_all(root, files[:4] + files[5:])
    (root / files[4]).write_bytes(b"")
    strange = "x/a/tab\tline\nend\r\x85\udcff.png"  # any name that a file can have
    (root / strange).write_bytes(b"")
    files.append(strange)
    monkeypatch.setattr(images, "CHUNK", 3)
    found = open_list(root, files, cache, skip_bad=True)
    assert len(found) == 39 and torch.equal(found[:], whole)
    report = next(cache.glob("*.bad.txt")).read_text("utf-8")
    assert report == "x/a/00004.png: empty file\nx/a/tab\\tline\\nend\\r\\x85\\udcff.png: empty file\n"
    assert torch.equal(open_list(root, files, cache, skip_bad=True)[:], whole)


def test_a_killed_build_is_continued_and_never_used(listing, monkeypatch):
    """A process that is killed in the middle, for good; then the rest is decoded, and what it finished is not."""
    root, files, cache = listing
    program = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from data import images
images.CHUNK, read_image = 4, images.read_image
def dying(path, size, fit):
    if Path(path) == Path({str(root)!r}) / {files[16]!r}:
        while np.count_nonzero(np.load(next(Path({str(cache)!r}).glob("*.sums.npy")))) < 16:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if str(path) > str(Path({str(root)!r}) / {files[16]!r}):
        time.sleep(60)
    return read_image(path, size, fit)
images.read_image = dying
images.open_images("name", {str(root)!r}, {files!r}, 8, [Path({str(cache)!r})])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=50)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = sorted(path.name.partition(".")[2] for path in cache.iterdir())
    assert names == ["lock", "npy.part", "sums.npy"], "nothing that could be taken for a cache"
    whole = read_all(root, files)
    part = next(cache.glob("*.part"))
    with open(part, "r+b") as stream:  # and as if pixels of image 2 had not come to the disk
        stream.seek(-(40 - 2) * 8 * 8 * 3, os.SEEK_END)
        stream.write(bytes(100))
    decoded, read_image = [], decode.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *kind: decoded.append(path) or read_image(path, *kind))
    found = open_list(root, files, cache)
    assert sorted(decoded) == [str(root / file) for file in [files[2], *files[16:]]]
    assert torch.equal(found[:], whole)
    assert sorted(path.name.partition(".")[2] for path in cache.iterdir()) == ["npy", "sums.npy"]


def test_two_builds_at_a_time(listing, monkeypatch):
    root, files, cache = listing
    read_image, decoded, found = decode.read_image, [], []
    whole = read_all(root, files)

    def slow(path, size, fit):
        decoded.append(path)
        time.sleep(0.02)
        return read_image(path, size, fit)

    monkeypatch.setattr(images, "read_image", slow)
    build = functools.partial(open_list, root, files, cache)
    threads = [threading.Thread(target=lambda: found.append(build())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decoded) == [str(root / file) for file in files], "each once"
    assert len(found) == 2 and all(torch.equal(one[:], whole) for one in found)


def test_a_cache_that_cannot_be_kept_is_an_error(listing, monkeypatch):
    root, files, _ = listing
    (root / "file").write_text("")
    with pytest.raises(InputError, match=r"file/.cache: the decoded images are kept in this folder, which cannot"):
        open_list(root, files, root / "file" / ".cache")
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"40 images of 64x64 need 0.0 GB.*smaller --image-size"):
        open_list(root, files, root / "full", 64)
    with pytest.raises(InputError, match="--image-size 4"):
        open_list(root, files, root / "full", 4)


def test_a_cache_that_cannot_be_beside_its_images_is_in_another_folder(listing, capsys, tmp_path):
    root, files, _ = listing
    (root / "file").write_text("")
    folders = [root / "file" / ".cache", tmp_path / "runs" / ".cache"]
    for _ in range(2):  # built, and found again
        found, _ = images.open_images("name", root, files, 8, folders)
        assert torch.equal(found[:], read_all(root, files)) and len(list(folders[1].glob("*.sums.npy"))) == 1
    said = capsys.readouterr().out
    assert said == f"{folders[0]} cannot be written: the decoded images are kept in {folders[1]}\n", "once"
    again = images.open_images("name", root, files, 8, folders[::-1])[0]
    assert again.key == found.key and not (root / "file").is_dir()


class FullDisk(io.FileIO):
    """A file that takes no byte beyond the first half of its own size."""

    def write(self, content):
        if self.tell() > os.fstat(self.fileno()).st_size / 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_a_disk_that_fills_up_is_an_error_and_the_build_goes_on(listing, monkeypatch):
    root, files, cache = listing
    monkeypatch.setattr(images, "CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(images, "open", FullDisk, raising=False)
        with pytest.raises(InputError, match=r"this folder, which cannot be written .*No space left"):
            open_list(root, files, cache)
    names = sorted(path.name.partition(".")[2] for path in cache.iterdir())
    assert names == ["lock", "npy.part", "sums.npy"], "nothing that could be taken for a cache"
    decoded, read_image = [], decode.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *kind: decoded.append(path) or read_image(path, *kind))
    assert torch.equal(open_list(root, files, cache)[:], read_all(root, files))
    assert set(decoded) == {str(root / file) for file in files[len(files) - len(decoded) :]}
    assert 20 <= len(decoded) < 40


# ------------------------------------------------------------------------------------------ downloads


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files, whole or from a byte on; breaks off after `limit` bytes."""

    limit, asked = None, ()

    def do_GET(self):
        path = pathlib.Path(self.translate_path(self.path))
        if not path.exists():
            return self.send_error(404)
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        type(self).asked = (*self.asked, start)
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    monkeypatch.setattr(Ranges, "limit", None)
    monkeypatch.setattr(Ranges, "asked", ())
    handler = functools.partial(Ranges, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", tmp_path / "www"
        running.shutdown()


def test_a_download_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    url, www = server
    content = bytes(range(256)) * 40
    (www / "x.bin").write_bytes(content)
    monkeypatch.setattr(Ranges, "limit", 3000)
    with pytest.raises(InputError, match=r"3,000 of 10,240 bytes came; the same command goes on"):
        download.fetch(f"{url}x.bin", tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()
    monkeypatch.setattr(Ranges, "limit", None)
    download.fetch(f"{url}x.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == content and Ranges.asked == (0, 3000)
    (tmp_path / "y.bin.part").write_bytes(content)  # all came, but the process died before it could say so
    (www / "y.bin").write_bytes(content)
    download.fetch(f"{url}y.bin", tmp_path / "y.bin")
    assert (tmp_path / "y.bin").read_bytes() == content
    with pytest.raises(InputError, match=r"its md5 is not 0000"):
        download.fetch(f"{url}x.bin", tmp_path / "z.bin", md5="0000")
    assert not (tmp_path / "z.bin").exists()
    with pytest.raises(InputError, match=r"--download: .*nowhere.bin.*404"):
        download.fetch(f"{url}nowhere.bin", tmp_path / "nowhere.bin")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_unpacked_whole_or_not_at_all(tmp_path, kind, monkeypatch):
    replicas.tree(tmp_path / "from" / "set", ["a", "b"], 3)
    path, root = tmp_path / f"x.{kind}", tmp_path
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for image in (tmp_path / "from").rglob("*.jpg"):
                file.write(image, image.relative_to(tmp_path / "from"))
    else:
        with tarfile.open(path, "w:gz") as file:
            file.add(tmp_path / "from" / "set", "set")
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"x.tar.gz safely takes Python 3.10.12"):
            patch.delattr(tarfile, "data_filter", raising=False)
            download.unpack(path, root)
        if not hasattr(tarfile, "data_filter"):
            pytest.skip("this Python cannot unpack a tar archive safely")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"could not be unpacked"):
        download.unpack(path, root)
    assert not (root / "set").exists() and not list(root.glob(".unpacking*"))
    path.write_bytes(content)
    download.unpack(path, root, keep=lambda name: "/a/" in name)
    assert sorted(p.name for p in (root / "set" / "a").iterdir()) == [f"{i:05d}.jpg" for i in range(3)]
    assert not (root / "set" / "b").exists() and not path.exists()


def test_domainnet_is_fetched_and_unpacked(server, tmp_path, monkeypatch):
    url, www = server
    replicas.domainnet(www)
    base = www / "domainnet"
    (base / "txt").mkdir()
    for path in base.glob("*.txt"):
        path.rename(base / "txt" / path.name)
    (www / "groundtruth").mkdir()
    for domain, place in (("real", "real.zip"), ("clipart", "groundtruth/clipart.zip")):
        with zipfile.ZipFile(www / place, "w") as file:
            for image in (base / domain).rglob("*.jpg"):
                file.write(image, image.relative_to(base))
    monkeypatch.setattr(data.domainnet, "BASE", url)
    task = load_task("domainnet", "real", "clipart", data_root=tmp_path / "new", image_size=8, download=True)
    assert task.classes == replicas.DOMAINNET and len(task.target_test.labels) == 15
    asked = Ranges.asked
    load_task("domainnet", "real", "clipart", data_root=tmp_path / "new", image_size=8, download=True)
    assert Ranges.asked == asked, "what is there is not fetched again"


def test_flowers_are_fetched_each_file_to_its_place(server, tmp_path, monkeypatch):
    url, www = server
    replicas.vtab(www)
    base = www / "vtab" / "flowers-102"
    with tarfile.open(www / "102flowers.tgz", "w:gz") as file:
        file.add(base / "jpg", "jpg")
    for name in ("imagelabels.mat", "setid.mat"):
        (base / name).rename(www / name)
    here = [
        (f"{url}{address.rpartition('/')[2]}", None, place) for address, _, place in data.vtab.ARCHIVES["flowers102"]
    ]
    monkeypatch.setitem(data.vtab.ARCHIVES, "flowers102", here)
    new = tmp_path / "new"
    task = load_task("vtab", "clip", "flowers102", "50", data_root=new, image_size=8, download=True)
    assert len(task.target_test.labels) == 204
    assert sorted(path.name for path in (new / "vtab/flowers-102").iterdir()) == ["imagelabels.mat", "jpg", "setid.mat"]
    asked = Ranges.asked
    data.vtab.download("flowers102", new / "vtab")
    assert Ranges.asked == asked, "what is there is not fetched again"


def test_of_inaturalist_the_fungi_alone_are_unpacked(server, tmp_path, monkeypatch):
    url, www = server
    replicas.inat_fungi(www)
    for folder, name in (("2021_train_mini", "train_mini"), ("val", "val")):
        with tarfile.open(www / f"{name}.tar.gz", "w:gz") as file:
            file.add(www / "inat_fungi" / folder, name)
    here = {domain: (name, None) for domain, (name, _) in data.inat_fungi.ARCHIVES.items()}
    monkeypatch.setattr(data.inat_fungi, "URL", url)
    monkeypatch.setattr(data.inat_fungi, "ARCHIVES", here)
    assert len(load_task("inat_fungi", data_root=tmp_path / "new", image_size=8, download=True).classes) == 4
    names = [path.name for path in (tmp_path / "new" / "inat_fungi" / "train_mini").iterdir()]
    assert len(names) == 4 and all("_Fungi_" in name for name in names)


def test_caltech_is_an_archive_in_an_archive(server, tmp_path, monkeypatch):
    (url, www), inner = server, "101_ObjectCategories"
    replicas.tree(www / inner, ["accordion", "wild_cat"], 2)
    with tarfile.open(www / f"{inner}.tar.gz", "w:gz") as file:
        file.add(www / inner, inner)
    with zipfile.ZipFile(www / "caltech-101.zip", "w") as file:
        file.write(www / f"{inner}.tar.gz", f"caltech-101/{inner}.tar.gz")
    monkeypatch.setitem(data.vtab.ARCHIVES, "caltech101", [(f"{url}caltech-101.zip", None, "caltech101/caltech-101")])
    data.vtab.download("caltech101", tmp_path / "vtab")
    assert len(list((tmp_path / "vtab" / "caltech101" / inner).rglob("*.jpg"))) == 4
    with pytest.raises(InputError, match="resisc45 has no stable address"):
        data.vtab.download("resisc45", tmp_path / "vtab")


def test_a_damaged_exif_block_turns_nothing(tmp_path):
    for name, block in (("jpg", b"Exif\0\0no header"), ("png", b"neither")):
        save(tmp_path / f"x.{name}", exif=block)
        assert np.abs(decode.read_image(tmp_path / f"x.{name}", 8).astype(int) - RED).max() < 9
