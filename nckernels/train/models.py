"""Networks: an image encoder, and a projection between it and the loss."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .recipe import Model, Projection
from .resnet import Norm, normalisation, resnet18, resnet32
from .typed import nearest

OWN = ("convnet", "resnet18", "resnet32")
"""The networks that need no other library."""

LIBRARIES = ("timm", "torchvision")


def convnet(in_channels: int, width: int, pooled: int, norm: Norm = "batch") -> nn.Sequential:
    """Three blocks of convolution, normalisation and ReLU, then the average over positions; for small images.

    Args:
        in_channels: channels of the images.
        width: channels of the first block; the second has twice as many.
        pooled: channels of the third block, whose averages are the output. They are never negative, and neither are
            their cosines.
        norm: normalisation after every convolution.
    """
    return nn.Sequential(
        _block(in_channels, width, 1, norm),
        _block(width, 2 * width, 2, norm),
        _block(2 * width, pooled, 1, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _block(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        normalisation(norm, out_channels),
        nn.ReLU(inplace=True),
    )


class Network(nn.Module):
    """Encoder and projection.

    Args:
        encoder: images (N, C, H, W) -> pooled activations (N, D).
        encoded_dim: D.
        projection: ``"none"``, ``"linear"`` or ``"mlp"``: linear, ReLU, linear, with D hidden units.
        dim: size d of the features; without a projection it is D.
    """

    def __init__(self, encoder: nn.Module, encoded_dim: int, projection: Projection, dim: int) -> None:
        super().__init__()
        self.encoder, self.encoded_dim = encoder, encoded_dim
        self.dim = encoded_dim if projection == "none" else dim
        self.projection: nn.Module = nn.Identity()
        if projection == "linear":
            self.projection = nn.Linear(encoded_dim, dim)
        elif projection == "mlp":
            self.projection = nn.Sequential(
                nn.Linear(encoded_dim, encoded_dim), nn.ReLU(inplace=True), nn.Linear(encoded_dim, dim)
            )

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> pooled activations (N, D), the input of the projection."""
        encoded: Tensor = self.encoder(images)
        return encoded

    def project(self, encoded: Tensor) -> Tensor:
        """Pooled activations (N, D) -> features (N, d)."""
        features: Tensor = self.projection(encoded)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features (N, d)."""
        return self.project(self.encode(images))


def make_network(model: Model, channels: int, image_size: int) -> Network:
    """The network of a recipe, initialised from torch's global random state; on the CPU.

    A frozen network has no projection: its features are the encoder's output.

    Raises:
        ValueError: for an unknown name, with the nearest known one; for pretrained weights that are not in the cache;
            for a network that cannot take such images.
        ImportError: without the library of the network.
    """
    library, colon, name = model.name.partition(":")
    if colon and library in LIBRARIES:
        encoder, size = _from_library(library, name, model, channels, image_size)
    else:
        if model.pretrained:
            raise ValueError(f"model.pretrained: only timm and torchvision have weights, got {model.name!r}")
        encoder, size = _own(model, channels)
    return Network(encoder, size, "none" if model.freeze else model.projection, model.dim)


def _own(model: Model, channels: int) -> tuple[nn.Module, int]:
    if model.name == "convnet":
        pooled = model.dim if model.projection == "none" else 4 * model.width
        return convnet(channels, model.width, pooled, model.norm), pooled
    if model.name == "resnet18":
        return resnet18(channels, model.norm), 512
    if model.name == "resnet32":
        return resnet32(channels, model.norm), 64
    known = (*OWN, *(f"{library}:NAME" for library in LIBRARIES))
    raise ValueError(f"model.name: expected one of {', '.join(known)}, got {model.name!r}{nearest(model.name, known)}")


def _from_library(library: str, name: str, model: Model, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """An encoder and the size of its output, found by running it on an image of zeros."""
    if model.norm != "batch":
        raise ValueError(f"model.norm: {model.name} has its own normalisation, expected 'batch', got {model.norm!r}")
    module = _import(library)
    make = _of_timm if library == "timm" else _of_torchvision
    try:
        encoder = make(module, name, model, channels, image_size).eval()
        with torch.no_grad():
            encoded = encoder(torch.zeros(1, channels, image_size, image_size))
    except (AssertionError, RuntimeError) as error:  # raised inside the network, mostly because of shapes
        raise ValueError(
            f"model.name: {model.name} cannot be built for images of {channels} x {image_size} x {image_size}: {error}"
        ) from error
    encoder.train()
    if not isinstance(encoded, Tensor) or encoded.dim() != 2:
        raise ValueError(f"model.name: expected a network with one vector per image; {model.name} has another output")
    return encoder, encoded.shape[1]


def _of_timm(timm: Any, name: str, model: Model, channels: int, image_size: int) -> nn.Module:
    if not timm.is_model(name):
        _unknown(f"timm:{name}", (f"timm:{known}" for known in timm.list_models()))
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the tag behind the dot is unknown
        _unknown(f"timm:{name}", (f"timm:{known}" for known in timm.list_models(pretrained=True)))
    if model.pretrained and not _has_weights_of_timm(config):
        raise _no_weights(model, f"timm.create_model({name!r}, pretrained=True) downloads them")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "pretrained": model.pretrained}
    if config is not None and config.fixed_input_size:  # built for one size, which is then an option
        options["img_size"] = image_size
    made: nn.Module = timm.create_model(name, **options)
    return made


def _has_weights_of_timm(config: Any) -> bool:
    if config is None:
        return False
    if not config.hf_hub_id:
        return bool(config.url) and _checkpoint(config.url).is_file()
    from huggingface_hub import try_to_load_from_cache

    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)


def _checkpoint(url: str) -> Path:
    """The path of a weight file in torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _no_weights(model: Model, remedy: str) -> ValueError:
    return ValueError(f"model.pretrained: the weights of {model.name} are not in the cache: {remedy}")


def _of_torchvision(torchvision: Any, name: str, model: Model, channels: int, image_size: int) -> nn.Module:
    models = torchvision.models
    known = models.list_models(module=models)  # classifiers only
    if name not in known:
        _unknown(f"torchvision:{name}", (f"torchvision:{other}" for other in known))
    if channels != 3:
        raise ValueError(f"model.name: torchvision:{name} takes images of 3 channels, these have {channels}")
    weights = models.get_model_weights(name).DEFAULT if model.pretrained else None
    if weights is not None and not _checkpoint(weights.url).is_file():
        raise _no_weights(model, f"put {weights.url} at {_checkpoint(weights.url)}")
    options: dict[str, Any] = {"image_size": image_size} if name.startswith("vit_") else {}
    encoder: nn.Module = models.get_model(name, weights=weights, **options)
    for auxiliary in ("AuxLogits", "aux1", "aux2"):  # auxiliary classifiers, active in training mode only
        if hasattr(encoder, auxiliary):
            setattr(encoder, auxiliary, None)
    if hasattr(encoder, "aux_logits"):
        setattr(encoder, "aux_logits", False)  # noqa: B010  (for mypy it is a module)
    _remove_classifier(encoder, name)
    return encoder


def _remove_classifier(encoder: nn.Module, name: str) -> None:
    """Replace the last layer, whose outputs are the classes, by an identity."""
    for attribute in ("fc", "classifier", "head", "heads"):
        part = getattr(encoder, attribute, None)
        if isinstance(part, nn.Linear):
            setattr(encoder, attribute, nn.Identity())
            return
        layers = list(part.named_children()) if isinstance(part, nn.Sequential) else []
        for key, layer in reversed(layers):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                setattr(part, key, nn.Identity())
                return
    raise ValueError(f"model.name: torchvision:{name} has no classifier that could be removed")


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"model.name: {library}:... needs {library}: pip install {library}") from error


def _unknown(name: str, known: Iterable[str]) -> NoReturn:
    raise ValueError(f"model.name: there is no {name!r}{nearest(name, known)}")
