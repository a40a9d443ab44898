"""Retrieval of nearest neighbours, with class means to say where to look: FixedPrototypes over SupCon features.

python examples/retrieval.py

FixedPrototypes takes one pass over the database. It then classifies a query, and it ranks the classes: only images of
the nearest ones are compared with the query, a fifth of the database. Prints how many held-out digits are classified
right, how many of their five neighbours are the same digit, and how many neighbours of the full search are found.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nckernels

DIM, NEIGHBOURS = 32, 5


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """An encoder of images (N, 64) to features (N, 32)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIM))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = nckernels.supcon_loss(encoder(x[rows]), y[rows], temperature=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--shortlist", type=int, default=2, help="classes that are searched")
    args = parser.parse_args()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    encoder = train(x[:1440], y[:1440], args.epochs)
    with torch.no_grad():
        database, queries = F.normalize(encoder(x[:1440])), F.normalize(encoder(x[1440:]))
    labels, answers = y[:1440], y[1440:]

    classes = nckernels.FixedPrototypes(10, DIM).fit(database, labels)  # more images later: classes.partial_fit(...)
    shortlist = classes(queries).topk(args.shortlist).indices  # (queries, shortlist)
    searched = (labels == shortlist[:, :, None]).any(1)  # (queries, database)

    similarity = queries @ database.T
    exact = similarity.topk(NEIGHBOURS).indices
    short = similarity.masked_fill(~searched, -torch.inf).topk(NEIGHBOURS).indices
    recall = (short[:, :, None] == exact[:, None]).any(1).float().mean()
    print(f"accuracy of the nearest class mean: {classes.score(queries, answers):.3f}")
    for name, found in (("full search", exact), ("shortlist", short)):
        print(f"{name}: precision at {NEIGHBOURS} {(labels[found] == answers[:, None]).float().mean():.3f}")
    print(f"share of the database searched: {searched.float().mean():.2f}, neighbours found: {recall:.3f}")


if __name__ == "__main__":
    main()
