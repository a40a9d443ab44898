"""timm: NONL as loss_fn of timm's training step, around a model without classifier.

pip install timm
python examples/digits_timm.py
python examples/digits_timm.py --model test_resnet --amp

The model is initialised at random; nothing is downloaded. It gives features (num_classes=0), and the loss module has
the prototypes, which the optimiser has to know. Prints the accuracy on held-out digits.
"""

import argparse
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nckernels


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="test_efficientnet")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    images = F.interpolate(images, size=32, mode="bilinear")
    train = DataLoader(TensorDataset(images[:1440], labels[:1440]), 96, shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(images[1440:], labels[1440:]), 128)

    torch.manual_seed(0)
    model = timm.create_model(args.model, in_chans=1, num_classes=0).to(device)
    loss_fn = nckernels.NONLLoss(model.head_hidden_size, 10).to(device)
    optimizer = create_optimizer_v2(nn.ModuleList([model, loss_fn]), opt="adamw", lr=3e-3, weight_decay=0.02)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-4
    )
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for input, target in train:
            input, target = input.to(device), target.to(device)
            with amp:
                output = model(input)
                loss = loss_fn(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(input))
        scheduler.step(epoch + 1)

        model.eval()
        top1 = AverageMeter()
        for input, target in held_out:
            with torch.no_grad(), amp:
                logits = loss_fn(model(input.to(device)))  # without labels it gives logits
            top1.update(accuracy(logits, target.to(device))[0].item(), len(input))
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, accuracy {top1.avg:.1f} %")


if __name__ == "__main__":
    main()
