"""The programs in examples/, run small, with what they print compared with bounds that a broken loss does not reach.

Those for torchrun alone are in tests/distributed/test_examples.py.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
SECONDS = 180
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NUMBER = r"(-?\d+(?:\.\d+)?)"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a program in this process, as python does, and return what it prints."""

    def run(program: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / program), run_name="__main__")
        return capsys.readouterr().out

    return run


def launch(*command: str) -> str:
    """What a command prints that starts processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers at the places of # in the only line that matches."""
    found = re.findall(f"^{re.escape(pattern).replace(re.escape('#'), NUMBER)}$", text, re.MULTILINE)
    assert len(found) == 1, f"{pattern!r} in\n{text}"
    return [float(number) for number in ([found[0]] if isinstance(found[0], str) else found[0])]


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(rf"^epoch \d+: loss {NUMBER}", text, re.MULTILINE)]


def test_every_program_is_short_and_listed_and_tested() -> None:
    programs = sorted((ROOT / "examples").glob("*.py"))
    listed = (ROOT / "examples/README.md").read_text()
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests").glob("*/test_examples.py")))
    assert programs
    for program in programs:
        assert len(program.read_text().splitlines()) < 80, program.name
        assert f"examples/{program.name}`" in listed, program.name
        assert f'{program.name}"' in tests, program.name


# --- with torch and scikit-learn -----------------------------------------------------------------


def test_plain_pytorch(run: Run) -> None:
    """NONL is as accurate, up to the noise of 357 images, and collapses classes more."""
    text = run("digits_pytorch.py", "--epochs", "10")
    (accuracy, nc1), (baseline, its_nc1) = (
        numbers(f"{name}: accuracy #, NC1 #", text) for name in ("NONL", "cross-entropy")
    )
    assert baseline > 0.85
    assert accuracy > baseline - 0.05
    assert nc1 < its_nc1 / 4


def test_retrieval(run: Run) -> None:
    text = run("retrieval.py", "--epochs", "10")
    assert numbers("accuracy of the nearest class mean: #", text)[0] > 0.85
    (full,), (short,) = (numbers(f"{name}: precision at 5 #", text) for name in ("full search", "shortlist"))
    assert full > 0.85
    assert short > full - 0.03
    share, recall = numbers("share of the database searched: #, neighbours found: #", text)
    assert share < 0.25
    assert recall > 0.9


def test_queue(run: Run) -> None:
    """With few positives in a batch the queue makes classes tighter."""
    text = run("supcon_queue.py", "--epochs", "3")
    accuracy, nc1 = numbers("with a queue: accuracy #, NC1 #", text)
    _, its_nc1 = numbers("without a queue: accuracy #, NC1 #", text)
    assert accuracy > 0.85
    assert nc1 < 0.8 * its_nc1


def test_face_recognition() -> None:
    """On people whom the training has not seen. Of 201 prototypes rank 0 has 101."""
    text = launch(*TORCHRUN, "examples/face_recognition.py", "--identities", "201", "--steps", "60")
    assert numbers("processes: 2, prototypes here: # of 201", text) == [101]
    before, after = numbers("new people found: # before, # after", text)
    assert before < 0.1
    assert after > 0.5


# --- with a framework, in make test-vision -------------------------------------------------------


def test_lightning(run: Run) -> None:
    pytest.importorskip("lightning", reason="needs lightning")
    loss, accuracy = numbers("devices: 1, loss #, accuracy #", run("digits_lightning.py", "--epochs", "4"))
    assert loss < -2  # it starts above 4
    assert accuracy > 0.8


def test_transformers(run: Run) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    text = run("digits_transformers.py", "--epochs", "6")
    assert numbers("accuracy on held-out digits: #", text)[0] > 0.7


def test_transformers_checkpoints(tmp_path: Path) -> None:
    """The prototypes come from a checkpoint that has them, and are drawn at random for a backbone's."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model_class: Any = runpy.run_path(str(ROOT / "examples/digits_transformers.py"))["ViTForPrototypeClassification"]
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=10, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    model = model_class(config)
    model.save_pretrained(tmp_path / "model")
    model.vit.save_pretrained(tmp_path / "backbone")
    again = model_class.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.head.prototypes, model.head.prototypes, rtol=0, atol=0)
    new = model_class.from_pretrained(tmp_path / "backbone", num_labels=10)
    torch.testing.assert_close(new.vit.state_dict(), model.vit.state_dict(), rtol=0, atol=0)
    norms = new.head.prototypes.norm(dim=1)
    assert norms.shape == (10,)
    assert ((norms > 0.4) & (norms < 1.8)).all()


def test_accelerate(run: Run) -> None:
    """Two processes with half of each batch print the losses of one with all of it."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    two = launch(*TORCHRUN, "examples/digits_accelerate.py", "--cpu", "--epochs", "3")
    one = run("digits_accelerate.py", "--epochs", "3")
    assert len(losses(one)) == 3
    assert losses(one) == pytest.approx(losses(two), abs=0.002)
    assert losses(one)[2] < losses(one)[0] - 2
    assert numbers("processes: 1, accuracy #", one)[0] > 0.75
    assert numbers("processes: 2, accuracy #", two)[0] > 0.75


def test_timm(run: Run) -> None:
    pytest.importorskip("timm", reason="needs timm")
    text = run("digits_timm.py", "--epochs", "5")
    assert losses(text)[4] < losses(text)[0] - 4
    assert numbers("epoch 5: loss #, accuracy # %", text)[1] > 75


def test_sentence_embeddings(run: Run) -> None:
    """Of 200 texts the right one comes first for more of the questions than before the training."""
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    before, after = numbers("texts found: # before, # after", run("sentence_embeddings.py"))
    assert before < 0.25
    assert after > before + 0.1


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_sentence_loss(negatives: int) -> None:
    """Value and gradients are those of the library's own loss, whatever the number of hard negatives."""
    losses = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses", reason="needs sentence-transformers"
    )
    fused: Any = runpy.run_path(str(ROOT / "examples/sentence_embeddings.py"))["FusedMultipleNegativesRankingLoss"]
    torch.manual_seed(0)
    embeddings = [torch.randn(17, 24, dtype=torch.float64, requires_grad=True) for _ in range(2 + negatives)]
    for scale in (20.0, 50.0):
        results = []
        for kind in (losses.MultipleNegativesRankingLoss, fused):
            loss = kind(torch.nn.Identity(), scale=scale).compute_loss_from_embeddings(embeddings, None)
            results.append((loss, *torch.autograd.grad(loss, embeddings)))
        torch.testing.assert_close(*results)
