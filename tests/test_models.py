"""The networks: layer tables, parameters, receptive fields, dropout, and M1's last ReLU."""

import re

import pytest
import torch
from conftest import NETWORKS, ROOT
from torch import nn
from torchsummary import summary

import models

COUNTS = {"M1": 6590, "M2": 3944, "M3": 7676, "M4": 7600}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_readme_has_the_table_that_torchsummary_prints(name, capsys):
    summary(NETWORKS[name](), (1, 28, 28), device="cpu")
    printed = capsys.readouterr().out.partition("Trainable params")[0].splitlines()
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"## {name}")[2].partition("\n## ")[0]
    assert section.partition("```\n")[2].partition("```")[0].splitlines() == printed
    assert f"Total params: {COUNTS[name]:,}" in printed


@pytest.mark.parametrize("name", NETWORKS)
def test_comments_give_side_and_receptive_field(name):
    """Araujo et al., 2019, https://distill.pub/2019/computing-receptive-fields/"""
    model, rows, field, jump = NETWORKS[name](), [], 1, 1
    names = {layer: name for name, layer in model.named_modules()}

    def row(layer, inputs, output):
        nonlocal field, jump
        adaptive = isinstance(layer, nn.AdaptiveAvgPool2d)
        sizes = (inputs[0].shape[-1],) * 2 if adaptive else (layer.kernel_size, layer.stride)
        kernel, stride = (size if isinstance(size, int) else size[0] for size in sizes)
        field, jump = field + (kernel - 1) * jump, jump * stride
        rows.append((names[layer], str(output.shape[-1]), str(field)))

    for layer in names:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            layer.register_forward_hook(row)
    model(torch.zeros(1, 1, 28, 28))
    source = (ROOT / "models.py").read_text().partition(f"class MNIST_CNN_{name}")[2].partition("def forward")[0]
    assert re.findall(r"self\.(\w+) = .*# (\d+) \| (\d+)", source) == rows
    assert rows[-1][1:] == ("1", "28")


@pytest.mark.parametrize("seed", range(20))
def test_no_class_of_m1_starts_dead(seed):
    torch.manual_seed(seed)
    logits = models.MNIST_CNN_M1()(torch.randn(64, 1, 28, 28))
    assert (logits > 0).float().mean(0).min() > 0.9


def test_dropout_statistics():
    torch.manual_seed(0)
    layer = models.Dropout(0.2)
    x = torch.ones(64, 8, 26, 26).contiguous(memory_format=torch.channels_last)
    masks = torch.stack([layer(x.clone()) for _ in range(30)])
    assert masks.unique().tolist() == [0, 1.25]
    assert (masks == 0).float().mean().item() == pytest.approx(0.2, abs=0.002)
    # Over steps each place is dropped about 20% of the time, and no two steps share a mask.
    per_place = (masks == 0).float().mean(0)
    assert per_place.std().item() == pytest.approx((0.2 * 0.8 / 30) ** 0.5, rel=0.15)
    assert (masks[0] == masks[1]).float().mean().item() == pytest.approx(0.2**2 + 0.8**2, abs=0.01)


def test_dropout_rests_in_evaluation_and_renews():
    model = models.MNIST_CNN_M4(0.1)
    x = torch.randn(8, 1, 28, 28)
    model(x)
    pool = model.drop1.pool
    model(x)
    assert model.drop1.pool is pool
    models.renew_dropout(model, torch.Generator().manual_seed(1))
    model(x)
    assert not torch.equal(model.drop1.pool, pool)
    activations = torch.randn(4, 8, 26, 26)
    assert torch.equal(model.drop1.eval()(activations.clone()), activations)
