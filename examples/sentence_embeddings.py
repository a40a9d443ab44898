"""Sentence Transformers: MultipleNegativesRankingLoss, with hard negatives, on nckernels.info_nce_loss.

pip install "sentence-transformers[train]>=6" scipy
python examples/sentence_embeddings.py
python examples/sentence_embeddings.py --model sentence-transformers/all-MiniLM-L6-v2

Learns to find docstrings of NumPy and SciPy by their first sentence; without --model from random word embeddings.
Prints for which share of the held-out functions the right text comes first.
"""

import argparse
import importlib
import inspect
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

import nckernels


class FusedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """The library's loss from queries to documents, the default, without storing their scores."""

    def __init__(self, model: SentenceTransformer, scale: float = 20.0, gather_across_devices: bool = False) -> None:
        super().__init__(model, scale, gather_across_devices=gather_across_devices)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        queries, *documents = embeddings  # the positives, then hard negatives
        group = "world" if self.gather_across_devices else None
        keys = torch.cat(documents)
        return nckernels.info_nce_loss(queries, keys, temperature=self.temperature, process_group=group)


def docstrings() -> Dataset:
    """First sentences, what follows them, and as hard negatives what follows others in the same module."""
    rows, scipy = [], ("linalg", "ndimage", "optimize", "signal", "sparse", "special", "stats")
    for name in ("numpy", *(f"scipy.{part}" for part in scipy)):
        members = inspect.getmembers(importlib.import_module(name), callable)
        parts = [(inspect.getdoc(member) or "").partition("\n\n") for _, member in members]
        pairs = [(first, " ".join(text.split()[:64])) for first, _, text in parts if text and "(" not in first]
        rows += [{"anchor": q, "positive": p, "negative": pairs[i - 1][1]} for i, (q, p) in enumerate(pairs)]
    return Dataset.from_list(rows)


def static_model(texts: list[str]) -> SentenceTransformer:
    """The mean of the embeddings of a text's words, random ones."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=128)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model of Sentence Transformers")
    name = parser.parse_args().model
    torch.manual_seed(0)
    train, held_out = docstrings().train_test_split(200, seed=0).values()
    model = SentenceTransformer(name) if name else static_model([*train["anchor"], *train["positive"]])
    queries, corpus = (dict(enumerate(held_out[column])) for column in ("anchor", "positive"))
    evaluator = InformationRetrievalEvaluator(queries, corpus, {i: {i} for i in queries}, write_csv=False)
    before = evaluator(model)["cosine_accuracy@1"]
    options = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=1 if name else 10, learning_rate=2e-5 if name else 0.02,
        per_device_train_batch_size=64, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(model, options, train, loss=FusedMultipleNegativesRankingLoss(model)).train()
    print(f"texts found: {before:.3f} before, {evaluator(model)['cosine_accuracy@1']:.3f} after")


if __name__ == "__main__":
    main()
