"""Plain PyTorch: F.cross_entropy replaced by NONL, one line of the training loop.

python examples/digits_pytorch.py

Trains the same network with both losses on handwritten digits. Prints the accuracy on held-out digits and NC1 of the
training set, the scatter within classes over that between them. With NONL NC1 is many times smaller.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nckernels


def train(loss_name: str, loader: DataLoader, epochs: int) -> tuple[nn.Module, nn.Linear]:
    """A network without its last layer, and that layer."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    head = nn.Linear(32, 10, bias=False)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader:
            features = body(x)
            if loss_name == "cross-entropy":
                loss = F.cross_entropy(head(features), y)
            else:
                loss = nckernels.nonl_loss(features, head.weight, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return body, head


def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """The logits of NONL: a sample belongs to the prototype that is nearest in angle."""
    return F.normalize(features) @ F.normalize(prototypes).T


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1440], y[:1440]), batch_size=128, shuffle=True)
    for loss_name in ("cross-entropy", "NONL"):
        body, head = train(loss_name, loader, epochs)
        with torch.no_grad():
            features = body(x)
            logits = head(features) if loss_name == "cross-entropy" else cosines(features, head.weight)
        accuracy = (logits[1440:].argmax(1) == y[1440:]).float().mean()
        nc1 = nckernels.metrics.neural_collapse(features[:1440], y[:1440], head.weight.detach()).nc1
        print(f"{loss_name}: accuracy {accuracy:.3f}, NC1 {nc1:.4f}")


if __name__ == "__main__":
    main()
