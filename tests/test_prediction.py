"""Pictures of digits: how they are prepared, and what `--predict` answers."""

import os
import struct
import zlib

import pytest
import torch
from conftest import draw_digits, refused
from PIL import Image, ImageOps

import models
import utils


def draw(path, mode="L", dark_on_light=False, size=(300, 200), at=(40, 30), side=120, **save):
    """Save a picture of a seven-segment three and return its path."""
    digit = Image.fromarray(draw_digits(4, 5)[0][3, 0].numpy()).point(lambda value: 255 if value > 127 else 0)
    page = Image.new("L", size)
    page.paste(digit.resize((side, side)), at)
    if mode == "RGBA":  # drawn on nothing
        color = Image.new("L", size, 0 if dark_on_light else 255)
        page = Image.merge("RGBA", (color, color, color, page))
    elif mode == "I;16":
        page = page.convert("I").point(lambda value: value * 256).convert("I;16")
    else:
        page = (ImageOps.invert(page) if dark_on_light else page).convert(mode)
    page.save(path, **save)
    return path


def distance(one, other):
    """Mean difference in gray levels, a shift by one pixel (the rounded center of mass) apart."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    one, other = one.double(), other.double()
    return min((one.roll(shift, (2, 3)) - other).abs().mean() for shift in shifts)


def test_prepared_as_mnist_was(tmp_path):
    digit = utils.prepare_digit(draw(tmp_path / "a.png"))
    assert digit.shape == (1, 1, 28, 28) and digit.dtype == torch.uint8 and digit.max() > 250
    rows, columns = (digit[0, 0].amax(dim).nonzero().flatten() for dim in (1, 0))
    assert rows[-1] - rows[0] == 19 and 10 <= columns[-1] - columns[0] < 19
    mass, place = digit[0, 0].double(), torch.arange(28)
    assert (mass.sum(1) * place).sum() / mass.sum() == pytest.approx(14, abs=0.5)
    assert (mass.sum(0) * place).sum() / mass.sum() == pytest.approx(14, abs=0.5)


@pytest.mark.parametrize("dark_on_light", [False, True])
@pytest.mark.parametrize("mode, suffix", [("L", "bmp"), ("RGB", "jpg"), ("P", "gif"), ("1", "png"), ("RGBA", "png")])
def test_any_format_and_polarity_gives_the_same_digit(tmp_path, mode, suffix, dark_on_light):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    other = draw(tmp_path / f"other.{suffix}", mode, dark_on_light, at=(150, 60))
    assert distance(utils.prepare_digit(other), plain) < 6


def test_deep_pictures_shadows_edges_and_turned_photographs(tmp_path):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    assert distance(utils.prepare_digit(draw(tmp_path / "deep.png", "I;16")), plain) < 3
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.open(tmp_path / "plain.png").rotate(180)
    picture.save(tmp_path / "turned.png", exif=exif)
    assert distance(utils.prepare_digit(tmp_path / "turned.png"), plain) < 3
    paper = ImageOps.invert(Image.open(tmp_path / "plain.png")).point(lambda value: 30 + value // 2)
    shadow = Image.linear_gradient("L").resize(paper.size).point(lambda value: value // 3)
    Image.blend(paper, shadow, 0.4).save(tmp_path / "shadow.png")
    assert distance(utils.prepare_digit(tmp_path / "shadow.png"), plain) < 8
    page = Image.open(tmp_path / "plain.png")
    page.paste(200, (0, 0, 300, 6))
    page.save(tmp_path / "edge.png")
    assert distance(utils.prepare_digit(tmp_path / "edge.png"), plain) < 3


@pytest.mark.parametrize("width", [1, 4, 12])
def test_a_thin_one_is_no_matter(tmp_path, width):
    page = Image.new("L", (400, 400))
    page.paste(255, (200, 40, 200 + width, 360))
    page.save(tmp_path / "one.png")
    digit = utils.prepare_digit(tmp_path / "one.png")[0, 0]
    rows = digit.amax(1).nonzero()
    assert digit.max() == 255 and rows[-1] - rows[0] == 19 and digit.amax(0).count_nonzero() <= 2


def bomb(path, side):
    """Write a PNG that says it is `side` pixels wide and high, and return its path."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(content)
    return path


def test_what_is_no_digit_is_refused(tmp_path):
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(draw(tmp_path / "whole.png").read_bytes()[:200])
    limit = Image.MAX_IMAGE_PIXELS
    bomb(tmp_path / "large.png", 10_000)
    bomb(tmp_path / "bomb.png", 60_000)
    words = {"blank": "blank", "dot": "blank", "text": "JPEG", "cut": "JPEG", "large": "pixels", "bomb": "pixels"}
    for name, word in (words | {"none": "No such file"}).items():
        with pytest.raises(ValueError, match=rf"{name}.png: .*{word}"):
            utils.prepare_digit(tmp_path / f"{name}.png")
    assert Image.MAX_IMAGE_PIXELS == limit is not None


def test_predict_answers_every_file(run_script, tmp_path):
    three, two = draw(tmp_path / "three.png"), draw(tmp_path / r"$\again$.jpg", "RGB", True)
    refused(run_script("train_M2.py", "--predict", str(three)), "model.pt: train first")
    (tmp_path / "out").mkdir()
    torch.manual_seed(0)
    model = models.MNIST_CNN_M2()
    torch.save(model.state_dict(), tmp_path / "out" / "model.pt")
    (tmp_path / "bad.png").write_text("")
    done = run_script("train_M2.py", "--predict", str(three), str(tmp_path / "bad.png"), str(two), pictures=True)
    refused(done, "bad.png")
    lines = [line for line in done.stdout.splitlines() if "sure" in line]
    logits = model.eval()(utils.normalize(utils.prepare_digit(three) / 255))
    (confidence, _), (digit, second) = (values.tolist() for values in logits.softmax(1)[0].topk(2))
    assert lines[0] == f"{three}: {digit}, {100 * confidence:.1f}% sure, then {second}"
    assert len(lines) == 2 and (tmp_path / "out" / "images" / "M2_predictions.png").exists()
    assert run_script("train_M2.py", "--predict", str(three)).returncode == 0
    refused(run_script("train_M4.py", "--predict", str(three)), "MNIST_CNN_M4")


def test_predict_takes_folders_patterns_and_names_that_are_no_text(run_script, tmp_path):
    folder, words = tmp_path / "folder", "read with"
    (tmp_path / "out").mkdir()
    torch.save(models.MNIST_CNN_M1().state_dict(), tmp_path / "out" / "model.pt")
    folder.mkdir()
    names = [b"a.png", b"b.png", b"\xff.png" if os.name == "posix" else b"c.png"]
    for name in names:
        os.rename(draw(folder / "x.png"), os.path.join(os.fsencode(folder), name))
    (folder / "notes.txt").write_text("no picture")
    for name in ("a[1].jpg", "a1.jpg"):
        draw(folder / name)
    for paths, count in ((folder, 5), (folder / "*.png", 3), (folder / "a[1].jpg", 1)):
        done = run_script("train_M1.py", "--predict", str(paths), pictures=True)
        assert done.returncode == 0 and done.stdout.count("sure") == count and words in done.stdout, done.stderr
    assert "a[1].jpg: " in done.stdout and done.stderr == ""
