"""Pictures of digits: how they are prepared, and what `--predict` answers."""

import contextlib
import csv
import random
import sys
from pathlib import Path

import figures
import pytest
import torch
from conftest import NETWORKS, draw_digits, refused
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import utils


def number(digit=3):
    """Return a picture of a seven-segment digit, white on black."""
    ink = 255 * (draw_digits(10, 5)[0][digit, 0] > 127).byte()
    page = Image.new("L", (300, 200))
    page.paste(Image.fromarray(ink.numpy()).resize((120, 120)), (40, 30))
    return page


def slanted():
    page = number()
    return page.transform(page.size, Image.Transform.AFFINE, (1, 0.3, -30, 0, 1, 0))


@pytest.fixture
def read(tmp_path):
    """Save a picture, and return the digit that is read from it."""

    def save_and_read(picture, suffix="png", straightened=True, **options):
        path = tmp_path / f"picture.{suffix}"
        picture.save(path, **options)
        return utils.prepare_digit(path, straightened)

    return save_and_read


@pytest.fixture
def error(read):
    """Return by how many gray levels a picture is read otherwise than another, or a plain three."""

    def difference(picture, suffix="png", other=None, **options):
        one = read(picture, suffix, **options).double()
        return (one - read(other or number())).abs().mean()

    return difference


@pytest.mark.parametrize("page", [number(), slanted()])
def test_a_plain_digit_is_20_pixels_long_and_centered_by_its_ink(read, page):
    digit = read(page, straightened=False)
    places = digit[0, 0].nonzero().double()
    assert (places.amax(0) - places.amin(0)).max() == 19
    ink = digit[digit > 0].double()
    center = ink @ places / ink.sum()
    assert (center - 14).abs().max() < 0.51  # as in MNIST


def test_a_slanted_digit_stays_slanted_or_is_straightened(error):
    assert error(slanted()) < 3
    assert error(slanted(), straightened=False) > 10


@pytest.mark.parametrize("dark_on_light", [False, True])
@pytest.mark.parametrize("mode, suffix", [("L", "bmp"), ("RGB", "jpg"), ("P", "gif"), ("1", "png")])
def test_any_format_and_polarity_gives_the_same_digit(error, mode, suffix, dark_on_light):
    page = number()
    if dark_on_light:
        page = ImageOps.invert(page)
    assert error(page.convert(mode), suffix) < 6


@pytest.mark.parametrize("pen", ["black", "white"])
def test_a_digit_drawn_on_nothing(error, pen):
    picture = Image.new("RGB", (300, 200), pen)
    picture.putalpha(number())
    assert error(picture) < 6


def test_deep_pictures_shadows_and_turned_photographs(error):
    deep = number().convert("I").point(lambda value: value * 16)  # 12 bits of 16
    assert error(deep.convert("I;16")) < 3
    assert error(number().convert("F"), "tif") < 3
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert error(number().rotate(180), exif=exif) < 3
    shadow = Image.linear_gradient("L").resize((300, 200))
    assert error(Image.blend(ImageOps.invert(number()), shadow, 0.3)) < 11


MARGINS = [60, (0, 60, 60, 60), (0, 0, 60, 60), (0, 0, 0, 60), (60, 0)]  # of a desk
MARGINS += [2, 20, (0, 20, 0, 0)]  # frames and a title bar


@pytest.mark.parametrize("desk, paper, pen", [(60, 225, 30), (250, 180, 30), (20, 120, 250)])
@pytest.mark.parametrize("margins", MARGINS)
def test_a_sheet_on_a_desk_a_frame_a_title_bar(error, margins, desk, paper, pen):
    sheet = number().point(lambda value: paper + (pen - paper) * value // 255)
    assert error(ImageOps.expand(sheet, margins, desk)) < 6


PERSPECTIVE = [100, 40, 300, 40, 343, 260, 57, 260]
TURNED = [60, 100, 290, 45, 345, 215, 115, 270]
ON_A_CORNER = [200, 0, 350, 150, 200, 300, 50, 150]


@pytest.mark.parametrize("margin", [40, 150])
@pytest.mark.parametrize("corners", [PERSPECTIVE, TURNED, ON_A_CORNER])
def test_a_sheet_may_lie_at_any_angle(error, corners, margin):
    desk = Image.new("L", (400, 300), 60)
    ImageDraw.Draw(desk).polygon(corners, 220)
    desk.paste(30, (100, 60), number())
    assert error(ImageOps.expand(desk, margin, 60)) < 6


@pytest.mark.parametrize("sides", [[0], [1, 2, 3], [0, 1, 2, 3]])
def test_a_digit_without_a_margin(error, sides):
    page = slanted()
    edges = [0, 0, *page.size]
    for side in sides:
        edges[side] = page.getbbox()[side]
    cut = page.crop(edges)
    assert error(cut, other=page) < 4
    assert error(ImageOps.invert(cut), other=page) < 4


def test_a_thin_digit_at_one_border(error):
    page = Image.new("L", (200, 300))
    ImageDraw.Draw(page).line((50, 60, 150, 60, 100, 230), 255, 5)
    assert error(page.crop((50, 0, 200, 300)), other=page) < 4


LINES = ["ruled paper", "cell of a form", "faint", "soft shadow", "hard shadow"]


@pytest.mark.parametrize("seed", [0, 10])  # in 1 a line leaves a notch in a stroke
@pytest.mark.parametrize("kind", LINES)
def test_a_digit_on_lines_in_a_shadow_or_faint(error, kind, seed):
    digit = number().rotate(20)  # no stroke is parallel to a line
    page = figures.draw_picture(kind, digit, None, random.Random(seed))
    assert error(page, other=digit) < 10


@pytest.mark.parametrize("pen", [1, 9])
def test_a_small_digit(error, pen):
    digit = number().filter(ImageFilter.MaxFilter(pen))
    assert error(ImageOps.expand(digit.resize((150, 100)), 400), other=digit) < 6


def test_a_stroke_apart_belongs_to_its_digit_and_another_digit_does_not(read, error):
    page = number(5)
    pen = ImageDraw.Draw(page)
    pen.rectangle((40, 57, 160, 65), 0)  # its top is apart
    assert error(page, other=number(5)) < 8
    pen.rectangle((138, 50, 148, 130), 255)  # near, but as high as the digit
    with pytest.raises(ValueError, match="more than one digit"):
        read(page)
    pen.rectangle((240, 50, 250, 130), 255)
    both = read(page.resize((28, 19)), straightened=False)  # so small, all is one digit
    assert both[..., :10].max() > 200 and both[..., 20:].max() > 200


def drawn(shape, *box, **style):
    """Return a picture of an ellipse, a rectangle or the like, dark on light."""
    page = Image.new("L", (200, 200), 240)
    getattr(ImageDraw.Draw(page), shape)(box, outline=0, **style)
    return page


THICK = drawn("ellipse", 40, 30, 160, 170, width=30)
NARROW = drawn("rounded_rectangle", 70, 30, 130, 170, radius=30, width=12)


def test_a_speck_in_the_loop_of_a_zero_is_no_digit(error):
    speck = THICK.copy()
    ImageDraw.Draw(speck).ellipse((97, 97, 102, 102), 190)
    assert error(speck, other=THICK) < 3


@pytest.mark.parametrize("zero", [THICK, NARROW])
def test_the_inside_of_a_thick_zero_is_no_page_and_a_narrow_one_is_no_frame(read, zero):
    middle = read(zero)[0, 0, 14]
    assert middle[14] == 0
    assert middle.max() > 200


def test_an_eight_of_seven_segments_is_no_frame(read):
    is_ink = read(number(8))[0, 0, :, 14] > 127
    assert (is_ink[1:] > is_ink[:-1]).sum() == 3  # three bars, one below the other


def test_any_small_picture_is_read_or_refused(read):
    torch.manual_seed(0)
    for _ in range(40):
        height, width, contrast = torch.randint(1, 13, (3,)).tolist()
        pixels = 20 * contrast * torch.randint(2, (height, width))
        picture = Image.fromarray(pixels.byte().numpy())
        with contextlib.suppress(ValueError):
            assert read(picture).shape == (1, 1, 28, 28)


TALL = drawn("rectangle", 80, 30, 140, 160, width=9)
NO_DIGITS = [
    ("no digit", Image.new("L", (50, 50), 200)),
    ("no digit", Image.new("L", (1, 1))),
    ("no digit", drawn("rectangle", 30, 30, 170, 160, width=9)),
    ("no digit", TALL),
    ("no digit", TALL.rotate(25, fillcolor=240)),
    ("no digit", drawn("ellipse", 30, 30, 170, 160, fill=0)),
    ("no digit", figures.draw_picture("no stroke", number(), None, random.Random(0))),
    ("no digit", figures.draw_picture("no digit", number(), None, random.Random(28))),  # noise
]


@pytest.mark.parametrize("word, picture", NO_DIGITS)
def test_what_is_no_digit_is_refused(read, word, picture):
    with pytest.raises(ValueError, match=word):
        read(picture)


def test_what_is_no_picture_is_refused(read, tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    with pytest.raises(ValueError, match="No such file"):
        utils.prepare_digit(path, True)
    number().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="JPEG or PNG"):
        utils.prepare_digit(path, True)
    # Pillow itself warns above this many of its 60,000 pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(ValueError, match="60000 pixels"):
        read(number())


@pytest.mark.parametrize("name", NETWORKS)
def test_predict_prepares_pictures_as_the_training_images_were(run_script, tmp_path, name):
    script, file = f"train_{name}.py", tmp_path / "slanted.png"
    slanted().save(file)
    run_script(script, "--epochs", "1", "--batch-size", "10")
    said = run_script(script, "--predict", str(file)).stdout
    model = NETWORKS[name]().eval()
    model.load_state_dict(torch.load(tmp_path / "out" / "model.pt"))
    for straightened in (False, True):
        digit = utils.prepare_digit(file, straightened)
        confidence, order = model(utils.normalize(digit / 255)).softmax(1)[0].topk(2)
        line = f"{file}: {order[0]}, {100 * confidence[0]:.1f}% sure, then {order[1]}\n"
        assert (line in said) == (straightened == (name == "M4"))


@pytest.fixture
def predict(run_script):
    """Run `--predict` with an M2 of one epoch, or what has become of it."""
    run_script("train_M2.py", "--epochs", "1", "--limit", "128")

    def run(*paths, **options):
        return run_script("train_M2.py", "--predict", *map(str, paths), **options)

    return run


def test_predict_answers_every_picture_in_files_folders_and_patterns(predict, tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "notes.pdf").write_text("no picture")
    no_text = "\udcff.png" if sys.platform == "linux" else "c.png"
    for name in ("$_^$.png", no_text, "below/a[1].webp", "a1.jpg"):
        number().save(folder / name)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\0\0\0\x18ftypheic")
    done = predict(bad, folder, pictures=True)
    refused(done, "bad.png: ", "save it as JPEG or PNG")
    (table,) = tmp_path.rglob("M2_predictions.csv")
    first, *rest = csv.DictReader(table.read_text().splitlines())
    assert "JPEG" in first["refused"]
    assert len(rest) == 4
    assert all(
        f"{row['file']}: {row['digit']}, {row['confidence']}%" in done.stdout for row in rest
    )
    paths = {folder / "*.png": 2, tmp_path / "f*": 4, folder / "below" / "a[1].webp": 1}
    for path, count in paths.items():
        done = predict(path)
        assert done.returncode == 0
        assert done.stdout.count("sure") == count
    assert "a[1].webp: " in done.stdout
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(predict(empty), "empty: no readable picture")


def test_without_a_run_of_ones_own_m4_reads_with_the_published_model(run_script, tmp_path):
    file = tmp_path / "five.png"
    number(5).save(file)
    # The default folder, and where the pictures go by default.
    options = ("--predict", str(file), "--output-dir", "runs/M4", "--images-dir", "runs/M4")
    done = run_script("train_M4.py", *options, pictures=True)
    assert done.returncode == 0
    assert f"there is no {Path('runs/M4/model.pt')} yet" in done.stdout
    assert f"{file}: 5, " in done.stdout
    own = tmp_path / "runs" / "M4"
    assert {path.name for path in own.iterdir()} == {"M4_predictions.csv", "M4_predictions.png"}
    refused(run_script("train_M3.py", *options), "train first")
    refused(run_script("train_M4.py", *options, "--output-dir", "elsewhere"), "train first")
    (own / "seed-1").mkdir()
    (own / "seed-1" / "model.pt").touch()
    refused(run_script("train_M4.py", *options), "name the --output-dir of a finished run")
    (own / "model.pt").touch()
    refused(run_script("train_M4.py", *options), f"{Path('runs/M4/model.pt')} cannot be used")


def test_predict_refuses_what_is_no_model_of_this_version(predict, tmp_path):
    file, model = tmp_path / "three.png", tmp_path / "out" / "model.pt"
    number().save(file)
    metrics = model.with_name("metrics.json")
    for damaged in ("", "[]", "{}"):
        metrics.write_text(damaged)
        refused(predict(file), "metrics.json")
    metrics.write_text('{"config": {"straighten": false}}')
    torch.save({"conv1.weight": torch.zeros(8, 1, 3, 3)}, model)
    refused(predict(file), "MNIST_CNN_M2", "made by this version", "train again")
