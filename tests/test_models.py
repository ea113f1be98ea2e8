"""The networks: layer tables, parameters, receptive fields, dropout, and M1's last ReLU."""

import inspect
import re

import pytest
import torch
from conftest import NETWORKS, ROOT, draw_digits
from torch import nn
from torchsummary import summary

import models
import utils

COUNTS = {"M1": 6590, "M2": 3944, "M3": 7676, "M4": 7600}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_readme_has_the_table_that_torchsummary_prints(name, capsys):
    summary(NETWORKS[name](), (1, 28, 28), device="cpu")
    printed = capsys.readouterr().out.partition("Trainable params")[0]
    assert f"Total params: {COUNTS[name]:,}\n" in printed
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition(f"## {name}:")[2]
    table = section.partition("```\n")[2].partition("```")[0]
    assert table.splitlines() == printed.splitlines()


@pytest.mark.parametrize("name", NETWORKS)
def test_comments_give_side_and_receptive_field(name):
    """Araujo et al., 2019, https://distill.pub/2019/computing-receptive-fields/"""
    features = torch.zeros(1, 1, 28, 28)
    rows, field, jump = [], 1, 1
    for layer in NETWORKS[name]().layers:
        side = features.shape[-1]
        features = layer(features)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            kernel = stride = side
        elif hasattr(layer, "kernel_size"):
            # A number for pools, a pair of equal ones for convolutions.
            kernel = torch.tensor(layer.kernel_size).max()
            stride = torch.tensor(layer.stride).max()
        else:
            continue
        field += (kernel - 1) * jump
        jump *= stride
        rows.append((type(layer).__name__, f"{features.shape[-1]} | {field}"))
    source = inspect.getsource(NETWORKS[name])
    assert re.findall(r"nn\.(\w+)\(.*# (\d+ \| \d+)", source) == rows
    assert rows[-1][1] == "1 | 28"


@pytest.mark.parametrize("seed", range(20))
def test_no_class_of_m1_starts_dead(seed):
    torch.manual_seed(seed)
    images = draw_digits(60, seed)[0] / 255
    logits = models.MNIST_CNN_M1()(utils.normalize(images))
    assert (logits > 0).float().mean(0).min() > 0.9


def test_dropout_drops_each_place_as_often_as_it_should():
    torch.manual_seed(0)
    layer = models.Dropout(0.2)
    activations = torch.ones(64, 8, 26, 26)
    masks = torch.stack([layer(activations) for _ in range(30)])
    assert masks.unique().tolist() == [0, 1.25]
    dropped = (masks == 0).float()
    assert dropped.mean().item() == pytest.approx(0.2, abs=0.002)
    # Over the steps, too, each place is dropped as often; a mask seen twice would show here.
    spread = (0.2 * 0.8 / 30) ** 0.5
    assert dropped.mean(0).std().item() == pytest.approx(spread, rel=0.15)


def test_dropout_leaves_its_input_and_the_order_in_memory_and_rests_in_evaluation():
    layer = models.Dropout(0.2)
    activations = torch.randn(4, 8, 26, 26).to(memory_format=torch.channels_last)
    before = activations.clone()
    dropped = layer(activations)
    assert torch.equal(activations, before) and not torch.equal(dropped, before)
    assert dropped.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.eval()(activations), before)


def test_dropout_draws_new_masks_after_train_and_the_same_from_the_same_seed():
    model = nn.Sequential(models.Dropout(0.5))

    def draw(count):
        torch.manual_seed(0)
        activations = torch.ones(count)
        return torch.stack([model.train()(activations) for _ in range(20)])

    assert torch.equal(draw(1000), draw(1000))
    # Three activations leave no room for another cut of the same pool.
    assert len(draw(3).unique(dim=0)) > 3
