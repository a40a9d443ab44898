"""Networks of this package; those of timm and torchvision are in test_vision.py."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nckernels.train.models import OWN, make_network
from nckernels.train.recipe import Model
from nckernels.train.resnet import PaddedShortcut, resnet18, resnet32


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 3, 32, 32)])
@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
@pytest.mark.parametrize("name", ["convnet", "resnet32"])
def test_features(name: str, projection: str, shape: tuple[int, ...]) -> None:
    """Without a projection they are pooled activations and never negative; only convnet's size can be chosen."""
    torch.manual_seed(0)
    network = make_network(Model(name=name, projection=projection, dim=24), shape[1], shape[2]).eval()
    x = torch.randn(shape)
    out, encoded = network(x), network.encode(x)
    assert out.shape == (5, network.dim)
    assert encoded.shape == (5, network.encoded_dim)
    assert encoded.min() >= 0
    assert torch.equal(network.project(encoded), out)
    assert network.dim == (network.encoded_dim if projection == "none" else 24)
    assert network.encoded_dim == (24 if (name, projection) == ("convnet", "none") else 64)
    assert (out.min() < 0) == (projection != "none")


def test_projections_are_linear_or_have_one_hidden_layer() -> None:
    linear, mlp = (make_network(Model(projection=p, dim=7, width=3), 1, 8).projection for p in ("linear", "mlp"))
    assert isinstance(linear, nn.Linear)
    x = torch.randn(4, 12)
    expected = F.linear(F.relu(F.linear(x, mlp[0].weight, mlp[0].bias)), mlp[2].weight, mlp[2].bias)
    assert torch.equal(mlp(x), expected)
    assert mlp[0].weight.shape == (12, 12)


def test_width_of_convnet() -> None:
    network = make_network(Model(width=5), 3, 32)
    assert [block[0].out_channels for block in network.encoder[:3]] == [5, 10, 20]
    assert network.encoded_dim == 20


@pytest.mark.parametrize("name", OWN)
def test_the_seed_fixes_the_weights(name: str) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(next(make_network(Model(name=name), 3, 32).parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_resnets_have_the_parameters_of_the_paper_and_its_strides() -> None:
    """He et al. 2016, Table 6: 0.46 million for 32 layers, with a classifier of 10 classes."""
    small, large = resnet32(3), resnet18(3)
    layers = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 31
    assert sum(p.numel() for p in small.parameters()) + 650 == 464_154
    assert sum(p.numel() for p in large.parameters()) + 5130 == 11_173_962
    x = torch.randn(1, 3, 32, 32)
    for network, width, size in ((small, 64, 8), (large, 512, 4)):
        assert network[:-2](x).shape == (1, width, size, size)
        assert network[0].stride == (1, 1)
        assert network(x).shape == (1, width)


def test_a_padded_shortcut_has_zeros_around() -> None:
    x = torch.randn(2, 3, 5, 5)
    out = PaddedShortcut(3, 2)(x)
    assert out.shape == (2, 6, 3, 3)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert out[:, [0, 4, 5]].abs().sum() == 0


@pytest.mark.parametrize("name", OWN)
def test_group_norm_does_not_mix_samples(name: str) -> None:
    torch.manual_seed(0)
    network = make_network(Model(name=name, norm="group"), 3, 16).train()
    x = torch.randn(4, 3, 16, 16)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)
    batch = make_network(Model(name=name), 3, 16).train()
    assert not torch.allclose(batch(x)[:1], batch(x[:1]), atol=1e-3)


def test_networks_learn_on_gradients_of_all_their_parameters() -> None:
    """DistributedDataParallel waits for every one of them."""
    for name in OWN:
        network = make_network(Model(name=name, projection="mlp", dim=6), 3, 8)
        network(torch.randn(4, 3, 8, 8)).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet23"}, r"model.name: expected one of convnet, .* got 'resnet23' \(did you mean 'resnet"),
        ({"name": "torchvison:resnet50"}, r"model.name: .* \(did you mean 'torchvision:NAME'\?\)"),
        ({"name": "resnet18", "pretrained": True}, "model.pretrained: only timm and torchvision .* 'resnet18'"),
        ({"name": "timm:resnet50", "norm": "group"}, "model.norm: timm:resnet50 has its own normalisation"),
    ],
)
def test_bad_models_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_network(Model(**changes), 3, 32)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"model.name: {library}:... needs {library}: pip install {library}"):
        make_network(Model(name=f"{library}:resnet50"), 3, 32)


def test_a_missing_torchvision_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from nckernels.train import vision

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        vision.eval_transform(32, (0.5,) * 3, (0.5,) * 3)
