"""Hugging Face Trainer: a vision transformer whose classification head is a PrototypeClassifier.

pip install "transformers[torch]"
python examples/digits_transformers.py

The model is initialised at random from a configuration; nothing is downloaded. With ``labels`` the model returns the
loss, which is what Trainer expects. Prints the accuracy on held-out digits.
"""

import argparse
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import nckernels


class ViTForPrototypeClassification(ViTPreTrainedModel):
    """ViTForImageClassification with prototypes in place of the linear layer, NONL in place of cross-entropy."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nckernels.PrototypeClassifier(config.hidden_size, config.num_labels, loss="nonl")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Called by from_pretrained for what a checkpoint lacks: of a backbone's, the prototypes."""
        super()._init_weights(module)
        if isinstance(module, nckernels.NONLLoss):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        # No **kwargs: they tell Trainer that the loss is a sum over num_items_in_batch. It is the mean of the batch.
        features = self.vit(pixel_values).last_hidden_state[:, 0]
        loss = None if labels is None else self.head(features, labels)
        return ImageClassifierOutput(loss=loss, logits=self.head(features))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    samples = [{"pixel_values": x, "labels": y} for x, y in zip(images, digits.target.tolist(), strict=True)]
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, per_device_eval_batch_size=512,
            learning_rate=3e-3, warmup_steps=20, eval_strategy="epoch", save_strategy="no", report_to="none",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        model = ViTForPrototypeClassification(config)
        trainer = Trainer(
            model, args, train_dataset=samples[:1440], eval_dataset=samples[1440:], compute_metrics=accuracy
        )
        trainer.train()
        print(f"accuracy on held-out digits: {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
