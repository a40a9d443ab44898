"""torchvision and timm: their operations compared with ours, transforms of files, networks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import torchvision
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from nckernels.train import augment
from nckernels.train.models import Network, make_network
from nckernels.train.recipe import Augment, Model
from nckernels.train.vision import eval_transform, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ALL = Augment(
    crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5, rotate=20.0, zoom=0.2, shift=0.2
)


def images(count: int = 6, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def pil(size: tuple[int, int] = (40, 30)) -> object:
    return functional.to_pil_image(images(1, 64)[0, :, : size[1], : size[0]])


# Operations


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(name: str, factor: float) -> None:
    ours = getattr(augment, f"adjust_{name}")(images(), torch.full((6, 1, 1, 1), factor))
    theirs = torch.stack([getattr(functional, f"adjust_{name}")(image, factor) for image in images()])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.03, 0.4])
def test_hue_is_torchvisions(turn: float) -> None:
    x = images()
    x[0, :, 0] = 0.5
    ours = augment.adjust_hue(x, torch.full((6, 1, 1, 1), turn))
    torch.testing.assert_close(ours, functional.adjust_hue(x, turn), atol=1e-5, rtol=0)


def test_grey_is_torchvisions() -> None:
    torch.testing.assert_close(augment.grey(images()), functional.rgb_to_grayscale(images()))


@pytest.mark.parametrize("sd", [0.1, 0.8, 2.0])
def test_blur_is_torchvisions(sd: float) -> None:
    ours = augment.blur(images(), torch.full((6,), sd))
    torch.testing.assert_close(ours, functional.gaussian_blur(images(), [13, 13], [sd, sd]))


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 16, 16), (2, 3, 8, 8), (1, 4, 9, 12)])
def test_crops_are_torchvisions(top: int, left: int, height: int, width: int) -> None:
    """Interior pixels only: torchvision repeats the edge of the crop, we interpolate beyond it."""
    x = images()
    w, h = width / 16, height / 16
    theta = torch.tensor([[w, 0, 2 * left / 16 + w - 1], [0, h, 2 * top / 16 + h - 1]]).expand(6, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [6, 3, 16, 16], align_corners=False)
    ours = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    theirs = functional.resized_crop(x, top, left, height, width, [16, 16], antialias=False)
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-4)


def test_crops_are_distributed_as_torchvisions() -> None:
    """Of an image so large that its rounding to pixels does not matter."""
    size, count, settings = 1000, 4000, Augment(crop=(0.2, 1.0))
    u = augment.numbers(torch.Generator().manual_seed(0), count)
    matrix = augment.affine(settings, u, size, size)
    ours = torch.stack([matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2]], 1)
    torch.manual_seed(0)
    crop = torchvision.transforms.RandomResizedCrop.get_params
    blank = torch.zeros(1, size, size)
    top, left, h, w = torch.tensor([crop(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]).T / size
    theirs = torch.stack([w, h, 2 * left + w - 1, 2 * top + h - 1], 1)
    for mine, yours in ((ours, theirs), (ours.square(), theirs.square()), (ours[:, :1] * ours, theirs[:, :1] * theirs)):
        error = (mine.var(0) / count + yours.var(0) / count).sqrt()
        assert ((mine.mean(0) - yours.mean(0)).abs() < 4 * error + 1e-3).all()


# Files


@pytest.mark.parametrize("settings", [ALL, Augment(), Augment(crop=(0.2, 1.0), flip=0.5)])
def test_views_of_files_are_those_of_the_seed(settings: Augment) -> None:
    transform = pickle.loads(pickle.dumps(train_transform(settings, 24, MEAN, STD)))  # as a worker gets it
    outputs = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        outputs.append(transform(pil()))
    assert type(outputs[0]) is Tensor
    assert outputs[0].shape == (3, 24, 24)
    assert outputs[0].dtype == torch.float32
    assert torch.equal(outputs[0], outputs[1])
    assert any(not torch.equal(outputs[0], other) for other in outputs[2:]) == (settings != Augment())


def test_evaluation_takes_the_normalised_centre() -> None:
    image = pil((56, 48))
    out = eval_transform(28, MEAN, STD)(image)
    resized = functional.pil_to_tensor(functional.center_crop(functional.resize(image, [32]), [28, 28]))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    torch.testing.assert_close(out, (resized / 255 - mean) / std)
    assert torch.equal(train_transform(Augment(), 28, MEAN, STD)(image), out)


def test_every_setting_has_its_transform() -> None:
    kinds = {type(t) for t in train_transform(ALL, 24, MEAN, STD).transforms}
    expected = {v2.RandomResizedCrop, v2.RandomAffine, v2.RandomHorizontalFlip, v2.RandomApply, v2.RandomGrayscale}
    assert expected < kinds
    assert not (expected & {type(t) for t in train_transform(Augment(), 24, MEAN, STD).transforms})


# Networks


@pytest.mark.parametrize(
    ("name", "channels", "size", "width"),
    [
        ("timm:resnet18", 3, 64, 512),
        ("timm:resnet18", 1, 64, 512),
        ("timm:vit_tiny_patch16_224", 3, 48, 192),
        ("timm:mobilenetv3_small_050", 3, 64, 1024),
        ("torchvision:resnet18", 3, 64, 512),
        ("torchvision:mobilenet_v3_small", 3, 64, 1024),
        ("torchvision:squeezenet1_1", 3, 64, 512),
        ("torchvision:googlenet", 3, 64, 1024),
        pytest.param("timm:swin_tiny_patch4_window7_224", 3, 224, 768, marks=pytest.mark.slow),
        pytest.param("torchvision:vit_b_16", 3, 64, 768, marks=pytest.mark.slow),
        pytest.param("torchvision:swin_t", 3, 64, 768, marks=pytest.mark.slow),
        pytest.param("torchvision:convnext_tiny", 3, 64, 768, marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", 3, 64, 1024, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of googlenet, whose initialisation is slow
def test_networks_by_name(name: str, channels: int, size: int, width: int) -> None:
    """Pooled activations without the classifier, and a gradient of every parameter."""
    network = make_network(Model(name=name, projection="mlp", dim=8), channels, size)
    assert isinstance(network, Network)
    assert network.training
    assert all(module.training for module in network.modules())
    x = torch.randn(2, channels, size, size)
    assert (network.encoded_dim, network.dim) == (width, 8)
    assert network.encode(x).shape == (2, width)
    network(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    plain = make_network(Model(name=name, projection="none", dim=8), channels, size)
    assert plain.dim == width


@pytest.mark.parametrize(
    ("name", "channels", "size", "message"),
    [
        ("timm:resnet19", 3, 64, r"there is no 'timm:resnet19' \(did you mean 'timm:resnet"),
        ("torchvision:resnet19", 3, 64, r"there is no 'torchvision:resnet19' \(did you mean 'torchvision:resnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", 3, 64, "there is no 'torchvision:fasterrcnn_resnet50_fpn'"),
        ("torchvision:resnet18", 1, 64, "torchvision:resnet18 takes images of 3 channels, these have 1"),
        ("torchvision:alexnet", 3, 8, "torchvision:alexnet cannot be built for images of 3 x 8 x 8"),
        ("torchvision:vit_b_16", 3, 50, "torchvision:vit_b_16 cannot be built for images of 3 x 50 x 50"),
    ],
)
def test_bad_networks_are_named(name: str, channels: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"model.name: {message}"):
        make_network(Model(name=name), channels, size)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_missing_pretrained_weights_are_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded; the message says how to download the weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"model.pretrained: the weights of {name} are not in the cache: .*resnet18"):
        make_network(Model(name=name, pretrained=True), 3, 64)


def test_pretrained_weights_are_loaded_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    saved = torchvision.models.resnet18()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(saved.state_dict(), folder / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setattr(torch.hub, "HASH_REGEX", torch.hub.re.compile("nothing"))
    network = make_network(Model(name="torchvision:resnet18", pretrained=True), 3, 64)
    assert torch.equal(network.encoder.conv1.weight, saved.conv1.weight)
