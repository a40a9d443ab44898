"""``python -m nckernels train`` and the other commands' names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import nckernels.train
from nckernels import __main__ as commands
from nckernels.train import History, cli

from .runs import environment, file, recipe


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "run"
    words = [
        str(file(tmp_path)),
        "--set",
        'loss.name="ntce"',
        "--set",
        "schedule.epochs=1",
        "--out",
        str(out),
        "--quiet",
    ]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("ntce on digits: 9 steps in ")
    assert f"written: {out / 'history.json'}, {out / 'checkpoint.pt'}" in printed.out
    assert printed.err == ""
    history = History.load(out)
    assert history.recipe == recipe(loss__name="ntce", schedule__epochs=1, name=words[0])
    assert all(name in printed.out for name in history.metrics)


def test_non_negative_features_are_compared_with_the_relu_optimum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(file(tmp_path)), "--set", "model.projection=none", "--quiet"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "offset")
    assert float(line.split()[2]) == pytest.approx(0.5)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints the plan of the run and trains nothing."""
    plan = SimpleNamespace(describe=lambda wanted: f"{wanted.loss.name} for {wanted.schedule.epochs} epochs")
    monkeypatch.setitem(sys.modules, "nckernels.train.plan", plan)
    monkeypatch.setattr(nckernels.train, "plan", plan, raising=False)
    out = tmp_path / "run"
    words = [str(file(tmp_path)), "--set", "schedule.epochs=1", "--out", str(out)]
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "nonl for 1 epochs\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "schedule.epoch=1"], "unknown key schedule.epoch (did you mean 'schedule.epochs'?)"),
        (["--set", "schedule.epochs=0"], "schedule.epochs: expected at least 1"),
        (["--set", "run.batch_size=5000"], "run.batch_size: expected at most 576"),
        (["--set", "epochs"], "--set: expected KEY=VALUE, got 'epochs'"),
        (["--set", "run.device=quantum"], "run.device: 'quantum' cannot be used here; expected auto, cpu, cuda or"),
        (["--device", "quantum"], "run.device: 'quantum' cannot be used here; expected auto, cpu, cuda or cuda:1"),
        (["--device", "meta"], "run.device: 'meta' cannot be used here: its tensors have no values"),
        (["--device", "meta", "--dry-run"], "run.device: 'meta' cannot be used here: its tensors have no values"),
        (["--device", "xpu:9"], "run.device: 'xpu:9' cannot be used here; PyTorch finds cpu"),
        (["--resume", "auto"], "--resume needs --out"),
        (["--resume", "sometimes"], "argument --resume: invalid choice: 'sometimes'"),
    ],
)
def test_bad_arguments(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(file(tmp_path)), *words, "--quiet"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training says what there is in one line; a dry run describes a run elsewhere."""
    words = [str(file(tmp_path)), "--device", "cuda:1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("run.device: 'cuda:1' cannot be used here; PyTorch finds cpu only\n")
    assert cli.main([*words, "--dry-run"]) == 0
    assert 'device = "cuda:1"' in capsys.readouterr().out


def test_a_failed_training_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = str(file(tmp_path))
    with pytest.raises(SystemExit) as stop:
        cli.main([toml, "--set", "loss.name=ce", "--set", "optimizer.lr=1e30", "--quiet"])
    assert stop.value.code == 1
    assert "training diverged in step" in capsys.readouterr().err
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main([toml, "--out", str(tmp_path / "taken"), "--quiet"])
    assert stop.value.code == 1
    assert f"{tmp_path / 'taken'}: File exists" in capsys.readouterr().err


def test_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["cifar100/nonl", "--out", "my runs/1", "--set", "loss.temperature=0.2", "--set", 'loss.name="ce"']
    arguments = cli.make_parser().parse_args(words)
    settings = "--set loss.temperature=0.2 --set 'loss.name=\"ce\"'"
    rest = f"-m nckernels train cifar100/nonl --out 'my runs/1' --resume auto {settings}"
    assert cli.resume_line(arguments) == f"python {rest}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cli.resume_line(arguments) == f"torchrun --nproc-per-node=4 {rest}"


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (module, text) in commands.COMMANDS.items():
        assert f"  {name:<12} {text}\n" in printed
        assert importlib.util.find_spec(module) is not None, module
    assert commands.main(["trian"]) == 2
    assert commands.main([]) == 0


@pytest.mark.parametrize(("command", "missing", "extra"), [("train", "tqdm", "train"), ("lab", "matplotlib", "lab")])
def test_a_command_without_its_extra_says_what_to_install(command: str, missing: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from nckernels import __main__; "
    code += f"sys.exit(__main__.main([{command!r}, '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr == f'python -m nckernels: error: {command} needs {missing}: pip install "nckernels[{extra}]"\n'


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--help"]], ids=" ".join)
def test_a_reader_that_stops_reading(words: list[str]) -> None:
    """Nothing is printed as ``| head`` ends."""
    read, write = os.pipe()
    os.close(read)
    command, buffered = [sys.executable, "-m", "nckernels", *words], {**environment(), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_and_info_load_no_trainer() -> None:
    code = (
        "import sys; from nckernels import __main__; __main__.main(['--help']); "
        "sys.exit(any(m.startswith('nckernels.train') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment()).returncode == 0
