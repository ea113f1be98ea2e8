"""Pictures of digits: how they are prepared, what `--predict` answers, receptive fields."""

import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import draw_digits
from figures import NETWORKS, receptive_fields
from PIL import Image, ImageOps

import models


def draw(path, mode="L", dark_on_light=False, size=(300, 200), at=(40, 30), side=120, **save):
    """Save a picture of a seven-segment three and return its path."""
    digit = Image.fromarray(draw_digits(4, 5)[0][3].numpy()).point(lambda value: 255 if value > 127 else 0)
    page = Image.new("L", size)
    page.paste(digit.resize((side, side)), at)
    if mode == "RGBA":  # drawn on nothing
        color = Image.new("L", size, 0 if dark_on_light else 255)
        page = Image.merge("RGBA", (color, color, color, page))
    else:
        page = ImageOps.invert(page) if dark_on_light else page
        page = (
            page.convert("I").point(lambda value: value * 256).convert("I;16")
            if mode == "I;16"
            else page.convert(mode)
        )
    page.save(path, **save)
    return path


def distance(one, other):
    """Mean difference in grey levels, a shift by one pixel (the rounded centre of mass) apart."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    one, other = one.double(), other.double()
    return min((one.roll(shift, (2, 3)) - other).abs().mean() for shift in shifts)


def test_prepared_as_mnist_was(tmp_path):
    digit = models.prepare_digit(draw(tmp_path / "a.png"))
    assert digit.shape == (1, 1, 28, 28) and digit.dtype == torch.uint8 and digit.max() > 250
    rows, columns = (digit[0, 0].amax(dim).nonzero().flatten() for dim in (1, 0))
    assert rows[-1] - rows[0] == 19 and 10 <= columns[-1] - columns[0] < 19
    mass, place = digit[0, 0].double(), torch.arange(28)
    assert (mass.sum(1) * place).sum() / mass.sum() == pytest.approx(14, abs=0.5)
    assert (mass.sum(0) * place).sum() / mass.sum() == pytest.approx(14, abs=0.5)


@pytest.mark.parametrize("dark_on_light", [False, True])
@pytest.mark.parametrize(
    "mode, suffix", [("L", "bmp"), ("RGB", "jpg"), ("P", "gif"), ("1", "png"), ("RGBA", "png")]
)
def test_any_format_and_polarity_gives_the_same_digit(tmp_path, mode, suffix, dark_on_light):
    plain = models.prepare_digit(draw(tmp_path / "plain.png"))
    other = draw(tmp_path / f"other.{suffix}", mode, dark_on_light, at=(150, 60))
    assert distance(models.prepare_digit(other), plain) < 6


def test_deep_pictures_shadows_and_turned_photographs(tmp_path):
    plain = models.prepare_digit(draw(tmp_path / "plain.png"))
    deep = models.prepare_digit(draw(tmp_path / "deep.png", "I;16"))
    assert distance(deep, plain) < 3
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.open(tmp_path / "plain.png").rotate(180)
    picture.save(tmp_path / "turned.png", exif=exif)
    assert distance(models.prepare_digit(tmp_path / "turned.png"), plain) < 3
    paper = ImageOps.invert(Image.open(tmp_path / "plain.png")).point(lambda value: 30 + value // 2)
    shadow = Image.linear_gradient("L").resize(paper.size).point(lambda value: value // 3)
    Image.blend(paper, shadow, 0.4).save(tmp_path / "shadow.png")
    assert distance(models.prepare_digit(tmp_path / "shadow.png"), plain) < 8


@pytest.mark.parametrize("width", [1, 4, 12])
def test_a_thin_one_is_no_matter(tmp_path, width):
    page = Image.new("L", (400, 400))
    page.paste(255, (200, 40, 200 + width, 360))
    page.save(tmp_path / "one.png")
    digit = models.prepare_digit(tmp_path / "one.png")[0, 0]
    rows = digit.amax(1).nonzero()
    assert digit.max() == 255 and rows[-1] - rows[0] == 19 and digit.amax(0).count_nonzero() <= 2


def test_the_edge_of_the_page_is_no_ink(tmp_path):
    plain = models.prepare_digit(draw(tmp_path / "plain.png"))
    page = Image.open(tmp_path / "plain.png")
    page.paste(200, (0, 0, 300, 6))
    page.save(tmp_path / "edge.png")
    assert distance(models.prepare_digit(tmp_path / "edge.png"), plain) < 3


def bomb(path, side):
    """Write a PNG that says it is `side` pixels wide and high, and return its path."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_what_is_no_digit_is_refused(tmp_path):
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    (tmp_path / "text.png").write_text("not a picture")
    draw(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    bomb(tmp_path / "bomb.png", 60_000)
    for name, word in (
        ("blank", "blank"),
        ("text", "not a picture"),
        ("cut", "not a picture"),
        ("bomb", "too many"),
        ("none", "no such file"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.png: .*{word}"):
            models.prepare_digit(tmp_path / f"{name}.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(ValueError, match="blank"):
        models.prepare_digit(tmp_path / "dot.png")


def test_a_picture_that_may_not_be_read(monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match="secret.png: no permission"):
        models.prepare_digit("secret.png")


def test_predict_answers_every_file(run_script, tmp_path):
    three, two = draw(tmp_path / "three.png"), draw(tmp_path / r"$\again$.jpg", "RGB", True)
    done = run_script("train_M2.py", "--predict", str(three))
    assert done.returncode == 2 and "python train_M2.py" in done.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"")
    done = run_script("train_M2.py", "--predict", str(three))
    assert done.returncode == 2 and "--resume" in done.stderr
    torch.manual_seed(0)
    model = models.MNIST_CNN_M2()
    torch.save(model.state_dict(), tmp_path / "out" / "model.pt")
    (tmp_path / "bad.png").write_text("")
    done = run_script("train_M2.py", "--predict", str(three), str(tmp_path / "bad.png"), str(two))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "bad.png" in done.stderr
    lines = [line for line in done.stdout.splitlines() if "sure" in line]
    [(digit, confidence, second)] = models.predict(model.eval(), models.prepare_digit(three))
    assert lines[0] == f"{three}: {digit}, {100 * confidence:.1f}% sure, then {second}"
    assert len(lines) == 2 and (tmp_path / "out" / "images" / "M2_predictions.png").exists()
    assert run_script("train_M2.py", "--predict", str(three)).returncode == 0
    refused = run_script("train_M4.py", "--predict", str(three))
    assert refused.returncode == 2 and "MNIST_CNN_M4" in refused.stderr


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_fields_are_what_the_comments_say(name):
    source = (
        Path(models.__file__).read_text().partition(f"class MNIST_CNN_{name}")[2].partition("def forward")[0]
    )
    comments = re.findall(r"self\.(\w+) = .*# (\d+) \| (\d+)", source)
    computed = [(row[0], str(row[4]), str(row[5])) for row in receptive_fields(NETWORKS[name]())]
    assert comments == computed and computed[-1][1:] == ("1", "28")
