"""Pictures of digits: how they are prepared, and what `--predict` answers."""

import contextlib
import os
import random
import sys

import pytest
import torch
from conftest import draw_digits, refused
from PIL import Image, ImageDraw, ImageOps

import models
import utils

SIDES = ("left", "top", "right", "bottom")


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
    """Mean difference in gray levels."""
    return (one.double() - other.double()).abs().mean()


def test_prepared_digits_are_straightened(tmp_path):
    digit = utils.prepare_digit(draw(tmp_path / "plain.png"))
    assert digit.shape == (1, 1, 28, 28) and digit.dtype == torch.uint8 and digit.max() > 240
    page = Image.open(tmp_path / "plain.png")
    page.transform(page.size, Image.Transform.AFFINE, (1, 0.3, -30, 0, 1, 0)).save(tmp_path / "slanted.png")
    assert distance(utils.prepare_digit(tmp_path / "slanted.png"), digit) < 3


def test_straightened_digits_are_upright_centered_and_alike_in_size():
    digits = 255 * (draw_digits(10, 3)[0] > 127).byte()
    slanted = torch.stack([row.roll((20 - y) // 4, -1) for y, row in enumerate(digits.unbind(2))], 2).roll(1, 2)
    line = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    line[..., 4:24, 9] = 255
    y, x = torch.meshgrid(*[torch.arange(28) - 13.5] * 2, indexing="ij")
    widths = []
    for ink in utils.straighten(torch.cat([slanted, line]))[:, 0].double():
        down, across, height, lean, width = ((ink * p).sum() / ink.sum() for p in (y, x, y * y, y * x, x * x))
        assert max(abs(down), abs(across)) < 0.1 and abs(lean) < 0.6 and abs(height.sqrt() - utils.HEIGHT) < 0.1
        widths.append(width.sqrt())
    # A 1 stays narrower than a 0, and a line of one pixel narrow.
    assert 1.5 < widths[1] < 2 and 3.5 < widths[0] < 4.2 and widths[-1] < 2


@pytest.mark.parametrize("dark_on_light", [False, True])
@pytest.mark.parametrize("mode, suffix", [("L", "bmp"), ("RGB", "jpg"), ("P", "gif"), ("1", "png"), ("RGBA", "png")])
def test_any_format_and_polarity_gives_the_same_digit(tmp_path, mode, suffix, dark_on_light):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    other = draw(tmp_path / f"other.{suffix}", mode, dark_on_light, at=(150, 60))
    assert distance(utils.prepare_digit(other), plain) < 6


def test_deep_pictures_shadows_and_turned_photographs(tmp_path):
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
    assert distance(utils.prepare_digit(tmp_path / "shadow.png"), plain) < 11


MARGINS = [(60, 60, 60, 60), (0, 60, 60, 60), (0, 0, 60, 60), (0, 0, 0, 60), (60, 0, 60, 0)]  # of a desk
MARGINS += [(2, 2, 2, 2), (20, 20, 20, 20), (0, 20, 0, 0)]  # frames and a title bar


@pytest.mark.parametrize("desk, paper, pen", [(60, 225, 30), (250, 180, 30), (20, 120, 250)])
@pytest.mark.parametrize("margins", MARGINS)
def test_a_sheet_on_a_desk_a_frame_a_title_bar(tmp_path, margins, desk, paper, pen):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    sheet = Image.open(tmp_path / "plain.png").point(lambda value: paper + (pen - paper) * value // 255)
    ImageOps.expand(sheet, margins, desk).save(tmp_path / "desk.png")
    assert distance(utils.prepare_digit(tmp_path / "desk.png"), plain) < 6


SHEETS = [((100, 40), (300, 40), (343, 260), (57, 260))]  # seen in perspective
SHEETS += [((60, 100), (290, 45), (345, 215), (115, 270)), ((200, 0), (350, 150), (200, 300), (50, 150))]  # turned


@pytest.mark.parametrize("corners", SHEETS)
def test_a_sheet_may_lie_at_any_angle(tmp_path, corners):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    desk, ink = Image.new("L", (400, 300), 60), Image.open(tmp_path / "plain.png").crop((40, 30, 160, 150))
    ImageDraw.Draw(desk).polygon(corners, 220)
    desk.paste(30, (140, 90), ink)
    ImageOps.expand(desk, 40, 60).save(tmp_path / "desk.png")
    assert distance(utils.prepare_digit(tmp_path / "desk.png"), plain) < 6


@pytest.mark.parametrize("sides", ["left", "top right bottom", "left top right bottom"])
def test_a_digit_without_a_margin(tmp_path, sides):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    page = Image.open(tmp_path / "plain.png")
    ink = page.getbbox()
    edges = [ink[i] if side in sides else whole for i, (side, whole) in enumerate(zip(SIDES, (0, 0, *page.size)))]
    for turned in (page, ImageOps.invert(page)):
        turned.crop(edges).save(tmp_path / "cut.png")
        assert distance(utils.prepare_digit(tmp_path / "cut.png"), plain) < 4


def test_a_small_digit(tmp_path):
    plain = utils.prepare_digit(draw(tmp_path / "plain.png"))
    small = utils.prepare_digit(draw(tmp_path / "small.png", size=(1000, 800), at=(700, 500), side=60))
    assert distance(small, plain) < 6


def test_a_stroke_apart_belongs_to_its_digit_and_another_digit_does_not(tmp_path):
    page = Image.new("L", (300, 300), 230)
    pen = ImageDraw.Draw(page)
    pen.line((90, 60, 190, 60), 20, 12)  # the top of a five
    whole = page.copy()
    for picture, gap in ((whole, 0), (page, 20)):
        pen = ImageDraw.Draw(picture)
        pen.line((95, 60 + gap, 90, 140), 20, 12)
        pen.arc((60, 130, 190, 250), 210, 150, 20, 12)
        picture.save(tmp_path / f"{gap}.png")
    assert distance(utils.prepare_digit(tmp_path / "20.png"), utils.prepare_digit(tmp_path / "0.png")) < 8
    pen.line((240, 60, 240, 250), 20, 12)
    page.save(tmp_path / "two.png")
    with pytest.raises(ValueError, match="more than one digit"):
        utils.prepare_digit(tmp_path / "two.png")


def test_a_speck_in_the_loop_of_a_zero_is_no_digit(tmp_path):
    page = Image.new("L", (300, 300), 250)
    for name in ("plain", "speck"):
        ImageDraw.Draw(page).ellipse((90, 50, 210, 250), outline=20, width=16)
        page.save(tmp_path / f"{name}.png")
        ImageDraw.Draw(page).ellipse((147, 147, 152, 152), fill=190)
    assert distance(*(utils.prepare_digit(tmp_path / f"{name}.png") for name in ("plain", "speck"))) < 3


ZEROS = [("ellipse", 40, {"width": 30}), ("rounded_rectangle", 70, {"radius": 30, "width": 12})]


@pytest.mark.parametrize("shape, left, style", ZEROS)
def test_the_inside_of_a_thick_zero_is_no_page_and_a_narrow_one_is_no_frame(tmp_path, shape, left, style):
    page = Image.new("L", (200, 200))
    getattr(ImageDraw.Draw(page), shape)((left, 30, 200 - left, 170), outline=255, **style)
    page.save(tmp_path / "zero.png")
    middle = utils.prepare_digit(tmp_path / "zero.png")[0, 0, 14]
    assert middle[14] == 0 and middle.max() > 200


def test_an_eight_of_seven_segments_is_no_frame(tmp_path):
    page = Image.new("L", (200, 200))
    for top in (30, 100):
        ImageDraw.Draw(page).rectangle((60, top, 140, top + 80), outline=255, width=9)
    page.save(tmp_path / "eight.png")
    column = utils.prepare_digit(tmp_path / "eight.png")[0, 0, :, 14]
    assert ((column[1:] > 127) > (column[:-1] > 127)).sum() == 3  # three bars, one below the other


def test_any_small_picture_is_read_or_refused(tmp_path):
    chance = random.Random(0)
    for _ in range(60):
        width, height, low = chance.randint(1, 12), chance.randint(1, 12), chance.randint(0, 250)
        pixels = bytes(chance.choices((low, 250), (1, 2), k=width * height))
        Image.frombytes("L", (width, height), pixels).save(tmp_path / "small.png")
        with contextlib.suppress(ValueError):
            assert utils.prepare_digit(tmp_path / "small.png").shape == (1, 1, 28, 28)


def test_what_is_no_digit_is_refused(tmp_path, monkeypatch):
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "cut.png").write_bytes(draw(tmp_path / "whole.png").read_bytes()[:200])
    page = Image.new("L", (200, 200), 240)
    for name, shape, style in (("frame", "rectangle", {"outline": 0, "width": 9}), ("blob", "ellipse", {"fill": 0})):
        picture = page.copy()
        getattr(ImageDraw.Draw(picture), shape)((30, 30, 170, 160), **style)
        picture.save(tmp_path / f"{name}.png")
    ImageDraw.Draw(page).rectangle((80, 30, 140, 160), outline=0, width=9)
    page.save(tmp_path / "tall.png")
    page.rotate(25, fillcolor=240).save(tmp_path / "tilted.png")
    Image.effect_noise((200, 200), 100).save(tmp_path / "noise.png")
    words = {"blank.png": "no digit", "dot.png": "no digit", "photo.heic": "JPEG or PNG", "cut.png": "JPEG or PNG"}
    words |= {"tall.png": "frame", "tilted.png": "frame", "frame.png": "frame", "blob.png": "blob"}
    words |= {"noise.png": "digit", "none.png": "No such file"}
    for name, word in words.items():
        with pytest.raises(ValueError, match=word):
            utils.prepare_digit(tmp_path / name)
    # Of whole.png's 60,000 pixels: Pillow warns above this many, and refuses twice as many.
    for most in (50_000, 20_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match="60000 pixels"):
            utils.prepare_digit(tmp_path / "whole.png")


def test_predict_answers_every_file(run_script, tmp_path):
    three, two = draw(tmp_path / "three.png"), draw(tmp_path / "$_^$.jpg", "RGB", True)
    refused(run_script("train_M2.py", "--predict", str(three)), "model.pt: train first")
    (tmp_path / "out").mkdir()
    torch.manual_seed(0)
    model = models.MNIST_CNN_M2()
    torch.save(model.state_dict(), tmp_path / "out" / "model.pt")
    (tmp_path / "bad.png").write_text("")
    done = run_script("train_M2.py", "--predict", str(three), str(tmp_path / "bad.png"), str(two), pictures=True)
    refused(done, "bad.png: not readable")
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
    names = [b"a.png", b"b.png", b"\xff.png" if sys.platform == "linux" else b"c.png"]
    for name in names:
        os.rename(draw(folder / "x.png"), os.path.join(os.fsencode(folder), name))
    (folder / "notes.txt").write_text("no picture")
    for name in ("a[1].jpg", "a1.jpg"):
        draw(folder / name)
    for paths, count in ((folder, 5), (folder / "*.png", 3), (tmp_path / "f*", 5), (folder / "a[1].jpg", 1)):
        done = run_script("train_M1.py", "--predict", str(paths), pictures=True)
        assert done.returncode == 0 and done.stdout.count("sure") == count and words in done.stdout, done.stderr
    assert "a[1].jpg: " in done.stdout and done.stderr == ""
    refused(run_script("train_M1.py", "--predict", str(tmp_path / "out")), "out: no picture in this folder")
