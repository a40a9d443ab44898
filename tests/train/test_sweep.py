"""Sweeps: runs and folders, failing runs, and stopped sweeps.

Runs are a stand-in that takes the trainer's command line, notes that it was called, and does what its seed says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from nckernels.train.grid import locked, plan
from nckernels.train.sweep import execute, main

# Seed 7 fails, 8 is killed, 9 waits for SIGTERM and saves; the accuracy is seed / 100.
CHILD = """
import json, os, signal, sys, time
settings = dict(sys.argv[i + 1].split("=", 1) for i, a in enumerate(sys.argv) if a == "--set")
folder, seed = sys.argv[sys.argv.index("--out") + 1], int(settings["run.seed"])
with open(folder + "/calls", "a") as file:
    file.write(json.dumps([sys.argv[1:], time.time()]) + "\\n")
def write(done):
    with open(folder + "/history.json", "w") as file:
        json.dump({"finished": done, "test_accuracy": [0.0, seed / 100]}, file)
def stop(*_):
    write(False)
    print("saved")
    sys.exit(0)
if seed == 7 and not os.path.exists(folder + "/mended"):
    print("first line\\nloss is not finite", file=sys.stderr)
    sys.exit(1)
if seed == 8:
    print("about to end")
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 9 and not os.path.exists(folder + "/history.json"):
    signal.signal(signal.SIGTERM, stop)
    open(folder + "/ready", "w").close()
    time.sleep(60)
write(True)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("child") / "child.py"
    path.write_text(CHILD)
    return sys.executable, "-S", str(path)


def calls(folder: Path) -> list[list[str]]:
    path = folder / "calls"
    return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--rows", "nonl,nolm"], "no row 'nolm' (did you mean 'nonl'?)"),
        (["digits", "--rows", "nonl,nonl"], "rows: 'nonl' occurs twice"),
        (["digits/nonl", "--rows", "ce"], "--rows: digits/nonl already names a row"),
        (["digits", "--seeds", "1,1"], "seeds: 1 occurs twice"),
        (["digits", "--seeds", "one"], "--seeds: expected whole numbers"),
        (["digits", "--grid", "loss.temperature"], "--grid: expected KEY=V1,V2"),
        (["digits", "--grid", "loss.temprature=1,2"], "did you mean 'loss.temperature'?"),
        (["digits", "--grid", "loss.temperature=0.1,-1"], "loss.temperature: expected a positive number"),
        (["digits", "--grid", "model.dim=2,2"], "grid model.dim: 2 occurs twice"),
        (["digits", "--grid", "model.dim=2,4", "--set", "model.dim=8"], "model.dim: it is in --set and in the grid"),
        (["digits", "--grid", "run.seed=2,4"], "run.seed: use --seeds"),
        (["digits", "--set", "run.seed=2"], "run.seed: use --seeds"),
        (["digits", "--jobs", "0"], "--jobs: expected at least 1"),
        (["digits"], "--out is missing"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_dry_run_lists_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["digits", "--rows", "nonl", "--seeds", "0,1", "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "2 runs of digits" in printed
    assert "nonl_seed=1: python -m nckernels train digits/nonl --set run.seed=1" in printed


def test_runs_get_the_trainers_arguments_and_are_summed_up(
    tmp_path: Path, child: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan("digits", ["model.dim=32"], ["nonl", "ce"], [10, 20, 60])
    assert execute(sweep, tmp_path, command=child, jobs=2, quiet=True) == 0
    folder = tmp_path / "nonl_seed=20"
    assert calls(folder) == [
        [
            "digits/nonl",
            "--set",
            "model.dim=32",
            "--set",
            "run.seed=20",
            "--out",
            str(folder),
            "--resume",
            "auto",
            "--quiet",
        ]
    ]
    printed = capsys.readouterr().out
    # mean 30, deviation sqrt((400 + 100 + 900) / 2) = 26.46
    assert "nonl  3     30.00 ± 26.46" in printed
    assert "6 of 6 runs finished, 0 failed" in printed


def test_finished_runs_are_not_run_again_and_others_are(tmp_path: Path, child: tuple[str, ...]) -> None:
    sweep = plan("digits", rows=["nonl"], seeds=[1, 2, 3])
    assert execute(sweep, tmp_path, command=child, quiet=True) == 0
    (tmp_path / "nonl_seed=2" / "history.json").write_text('{"finished": false}')
    (tmp_path / "nonl_seed=3" / "history.json").write_text('{"finished": tr')  # cut off
    assert execute(sweep, tmp_path, command=child, quiet=True) == 0
    assert [len(calls(tmp_path / f"nonl_seed={seed}")) for seed in (1, 2, 3)] == [1, 2, 2]


def test_runs_that_fail_are_listed_and_the_others_go_on(
    tmp_path: Path, child: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan("digits", rows=["nonl"], seeds=[7, 8, 1])
    assert execute(sweep, tmp_path, command=child, quiet=True) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 runs finished, 2 failed" in printed
    assert "nonl_seed=7: exit status 1\n    first line\n    loss is not finite" in printed
    assert "nonl_seed=8: killed by SIGKILL\n    about to end" in printed
    assert "nonl  1     1.00" in printed
    assert "loss is not finite" in (tmp_path / "nonl_seed=7" / "output.txt").read_text()

    (tmp_path / "nonl_seed=7" / "mended").touch()
    assert execute(sweep, tmp_path, command=child, quiet=True) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 runs finished, 1 failed" in printed
    assert "not finite" not in printed  # the last attempt's output only


def test_a_run_that_ends_too_early_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = plan("digits", rows=["nonl"])
    assert execute(sweep, tmp_path, command=(sys.executable, "-S", "-c", "print('saved')"), quiet=True) == 1
    assert "nonl: exited before the training was finished\n    saved" in capsys.readouterr().out


def test_runs_go_on_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other to begin."""
    waits = (
        "import os, sys, time\n"
        "folder = sys.argv[sys.argv.index('--out') + 1]\n"
        "open(folder + '/here', 'w').close()\n"
        "top, end = os.path.dirname(folder), time.time() + 20\n"
        "while sum(os.path.exists(f'{top}/{d}/here') for d in os.listdir(top)) < 2:\n"
        "    time.sleep(0.01)\n"
        "    assert time.time() < end\n"
        "open(folder + '/history.json', 'w').write('{\"finished\": true}')\n"
    )
    sweep = plan("digits", rows=["nonl"], seeds=[1, 2])
    assert execute(sweep, tmp_path, command=(sys.executable, "-S", "-c", waits), jobs=2, quiet=True) == 0


def test_a_second_process_in_the_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path), pytest.raises(SystemExit) as exit_:
        main(["digits", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"{tmp_path}: another process is running this sweep" in capsys.readouterr().err
    assert not (tmp_path / "sweep.json").exists()


def test_a_folder_holds_one_sweep(
    tmp_path: Path, child: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nckernels.train.sweep.execute", lambda *_, **__: 0)
    out = tmp_path / "out"
    mine = tmp_path / "mine.toml"
    mine.write_text('[loss]\nname = "nonl"\n')
    first = [str(mine), "--seeds", "1,2", "--out", str(out)]
    assert main(first) == 0
    assert json.loads((out / "sweep.json").read_text())["seeds"] == [1, 2]
    assert main(first) == 0
    for change, message in (
        (["--seeds", "1,3"], "differs in seeds ([1, 2] there, [1, 3] here)"),
        (["--grid", "model.dim=2,3"], 'differs in grid ({} there, {"model.dim": [2, 3]} here)'),
        (["--set", "model.dim=2"], 'differs in settings ([] there, ["model.dim=2"] here)'),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*first, *change])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    mine.write_text('[loss]\nname = "ntce"\n')
    with pytest.raises(SystemExit):
        main(first)
    assert "differs in loss.name ('nonl' there, 'ntce' here)" in capsys.readouterr().err
    (out / "sweep.json").write_text("{")
    with pytest.raises(SystemExit):
        main(first)
    assert "sweep.json cannot be read" in capsys.readouterr().err


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def check_stopped(folder: Path, printed: str, child: tuple[str, ...]) -> None:
    """Seed 9 has saved, seed 1 was not started, and the same command resumes the sweep."""
    assert "0 of 2 runs finished, 0 failed" in printed
    assert "stopped; the same command resumes" in printed
    assert (folder / "nonl_seed=9" / "output.txt").read_text().endswith("saved\n")
    assert not (folder / "nonl_seed=1").exists()
    assert execute(plan("digits", rows=["nonl"], seeds=[9, 1]), folder, command=child, quiet=True) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_on_to_the_runs(
    number: signal.Signals, tmp_path: Path, child: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread")
    before = signal.getsignal(number)

    def interrupt() -> None:
        wait_for(tmp_path / "nonl_seed=9" / "ready")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = execute(plan("digits", rows=["nonl"], seeds=[9, 1]), tmp_path, command=child, quiet=True)
    thread.join()
    assert status == 0
    assert signal.getsignal(number) == before
    check_stopped(tmp_path, capsys.readouterr().out, child)
