"""Lightning: a PrototypeClassifier as the last layer of a LightningModule, NONL as its loss.

pip install lightning torchmetrics
python examples/digits_lightning.py
python examples/digits_lightning.py --devices 2 --precision bf16-mixed

With several devices the loss contrasts the samples of all of them. Prints the accuracy on held-out digits.
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import nckernels


class DigitClassifier(L.LightningModule):
    """Logits when it is called, the loss in a training step."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = nckernels.PrototypeClassifier(32, 10, loss="nonl", process_group="world")
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        x, y = batch
        loss = self.head(self.body(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()

    L.seed_everything(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1440], y[:1440]), 128 // args.devices, shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(x[1440:], y[1440:]), 128)
    trainer = L.Trainer(
        max_epochs=args.epochs, devices=args.devices, precision=args.precision, logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(DigitClassifier(), train, held_out)
    if trainer.is_global_zero:
        loss, accuracy = (trainer.callback_metrics[name] for name in ("train_loss", "val_accuracy"))
        print(f"devices: {args.devices}, loss {loss:.3f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
