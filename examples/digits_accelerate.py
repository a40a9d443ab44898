"""Accelerate: NONL with the samples of all processes, on whatever `accelerate launch` finds.

pip install accelerate
accelerate launch examples/digits_accelerate.py
torchrun --nproc-per-node 2 examples/digits_accelerate.py --cpu

Training calls the prepared model with labels and gets the loss, so that gradients of the prototypes are averaged too.
With the samples of all processes in the loss, any number of processes prints the same losses.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nckernels


class Net(nn.Module):
    """Logits, or with labels the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = nckernels.PrototypeClassifier(32, 10, loss="nonl", process_group="world")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(x), y)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    args = parser.parse_args()

    # A batch of the loader is that of all processes; each gets its share.
    batches = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, dataloader_config=batches)
    set_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1440], y[:1440]), 128, shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(x[1440:], y[1440:]), 128)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, train, held_out = accelerator.prepare(model, optimizer, train, held_out)

    for epoch in range(args.epochs):
        model.train()
        losses = []
        for images, labels in train:
            loss = model(images, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        # The average over the processes is the loss of the whole batch.
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.3f}")

    model.eval()
    right = []
    for images, labels in held_out:
        with torch.no_grad():
            predicted = model(images).argmax(1)
        right.append(accelerator.gather_for_metrics(predicted == labels))
    accuracy = torch.cat(right).float().mean()
    accelerator.print(f"processes: {accelerator.num_processes}, accuracy {accuracy:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
