"""Batches, augmentation, schedule, average, and what an evaluation does."""

import pytest
import torch
from conftest import draw_digits
from torch import nn

import models
import utils

NONE = {"rotation": 0, "shear": 0, "scale": 0, "shift": 0}
CENTERED = torch.arange(28) - 13.5


def augmented(shape, **limit):
    """Return 200 copies of a (28, 28) shape, (200, 28, 28), each augmented within one limit."""
    torch.manual_seed(0)
    out = utils.augment(shape.expand(200, 1, 28, 28), **(NONE | limit))
    assert out.shape == (200, 1, 28, 28) and out.min() >= 0 and out.max() <= 1.0001
    return out[:, 0]


def box(top, bottom, left, right):
    shape = torch.zeros(28, 28)
    shape[top:bottom, left:right] = 1
    return shape


def centers(images):
    """Return the centers of ink of (N, 28, 28) as x and y from the middle, in pixels."""
    total = images.sum((1, 2))
    x = (images.sum(1) * CENTERED).sum(1) / total
    y = (images.sum(2) * CENTERED).sum(1) / total
    return x, y


def assert_fills(values, limit):
    """Assert that the values lie within the limit, either way, and use the range of it evenly."""
    assert values.abs().max() < 1.02 * limit
    assert values.min() < -0.9 * limit and values.max() > 0.9 * limit
    assert values.abs().mean() == pytest.approx(limit / 2, rel=0.15)


def test_batches_take_each_image_once_in_a_new_order_and_drop_the_incomplete_one():
    labels = torch.arange(47)
    images = labels.byte().view(47, 1, 1, 1)
    data = utils.Data(images, labels, images, labels, 8)
    orders = []
    for epoch in (1, 2):
        seen = []
        for images, labels in data.batches(epoch):
            assert images.shape == (8, 1, 1, 1) and images.dtype == torch.float32
            assert torch.allclose(images[:, 0, 0, 0] * 255, labels.float())
            seen += labels.tolist()
        assert len(seen) == len(set(seen)) == 40 == 8 * data.batches_per_epoch
        orders.append(seen)
    assert orders[0] != orders[1]


def test_rotation_keeps_the_distance_from_the_middle():
    x, y = centers(augmented(box(4, 7, 13, 15), rotation=30))
    assert torch.allclose(torch.hypot(x, y), torch.full((200,), 8.5), atol=0.2)
    assert_fills(torch.atan2(x, -y).rad2deg(), 30)


def test_shear_moves_a_row_in_proportion_to_its_height():
    lines = augmented(box(0, 28, 13, 15), shear=20)
    middles = (lines * CENTERED).sum(2) / lines.sum(2)
    slopes = (middles[:, 20] - middles[:, 8]) / 12
    assert torch.allclose(middles[:, 14], 0.5 * slopes, atol=0.05)
    assert_fills(slopes.atan().rad2deg(), 20)


def test_scale_changes_the_size_and_not_the_place():
    squares = augmented(box(9, 19, 9, 19), scale=0.3)
    assert max(part.abs().max() for part in centers(squares)) < 0.01
    sides = squares.sum((1, 2)).sqrt()
    assert_fills(sides / 10 - 1, 0.3)


def test_shift_moves_either_way():
    x, y = centers(augmented(box(12, 16, 12, 16), shift=0.25))
    assert_fills(x, 7)
    assert_fills(y, 7)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.2


def test_one_cycle_goes_up_and_down_and_may_be_stepped_after_the_last_batch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = utils.one_cycle(optimizer, 0.02, 24, 0.25)
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.02 / 25)
    assert rates[5] == max(rates) == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.02 / 25 / 1e4)
    utils.one_cycle(optimizer, 0.02, 1, 0.2).step()


def test_average_is_that_of_weights_and_statistics():
    model = models.MNIST_CNN_M4()
    average = utils.weight_average(model, 0.25)
    expected = {}
    for step in range(5):
        for tensor in model.state_dict().values():
            tensor.add_(1)
        average.update_parameters(model)
        decay = min(0.25, (1 + step) / (10 + step)) if step else 0
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected.get(key, 0) + (1 - decay) * value
    averages = average.module.state_dict()
    assert any("running_var" in key for key in expected)
    for key, value in expected.items():
        assert torch.allclose(averages[key], value, atol=1e-6), key


def test_evaluation_is_exact_and_without_dropout():
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4(0.5)
    images, labels = draw_digits(237, 1)
    data = utils.Data(images, labels, images, labels, 8)
    loss, accuracy, logits = utils.evaluate(model, data)
    whole = model.eval()(utils.normalize(images / 255)).detach()
    assert torch.allclose(logits, whole, atol=1e-5)
    assert loss == pytest.approx(nn.functional.cross_entropy(whole, labels).item())
    right = whole.argmax(1) == labels
    assert accuracy == pytest.approx(100 * right.double().mean().item())
