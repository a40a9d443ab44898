"""SupCon with small batches and a queue of past features: QueueLoss and FeatureQueue.

python examples/supcon_queue.py

In a batch of 16 of ten classes a sample has one or two positives, and some have none. The queue adds the features of
the last 512 samples as positives and negatives. Trains without and with it, then fits class means to the features.
Prints how many held-out digits they classify and NC1 of the training set, the scatter within classes over that between.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nckernels

DIM, SLOTS = 32, 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    for name in ("without a queue", "with a queue"):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(x[:1440], y[:1440]), args.batch_size, shuffle=True)
        encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIM))
        criterion: nn.Module = nckernels.SupConLoss(temperature=0.1)
        if name == "with a queue":
            criterion = nckernels.QueueLoss(criterion, nckernels.FeatureQueue(SLOTS, DIM))
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        for _ in range(args.epochs):
            for images, labels in loader:
                loss = criterion(encoder(images), labels)  # ends by enqueueing the features
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        means = nckernels.FixedPrototypes(10, DIM).fit(loader, encoder=encoder)
        with torch.no_grad():
            features = encoder(x)
        nc1 = nckernels.metrics.neural_collapse(features[:1440], y[:1440]).nc1
        print(f"{name}: accuracy {means.score(features[1440:], y[1440:]):.3f}, NC1 {nc1:.4f}")


if __name__ == "__main__":
    main()
