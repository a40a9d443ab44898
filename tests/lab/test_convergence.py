"""[NCD] Table 7 of histories: shares by hand, files, and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nckernels.metrics import RunHistory, convergence_iteration, convergence_table, first_reach, optimum
from nckernels.metrics.cli import main
from nckernels.metrics.convergence import TABLE_7, TABLE_7_METRICS

STEPS = [0, 10, 20, 30, 40]


def run(loss: str, inter: list[float], weight: list[float], steps: list[int] = STEPS) -> RunHistory:
    return RunHistory(loss, loss, 10, 64, steps, {"inter_erank": inter, "weight_alignment": weight})


CE = run("ce", [3, 5, 6, 7, 7], [2, 1, 0.9, 0.8, 0.8])
NONL = run("nonl", [3, 7.5, 8.7, 8.9, 9], [2, 0.5, 0.2, 0.09, 0.01])
METRICS = ("inter_erank", "weight_alignment")


def test_shares_by_hand() -> None:
    table = convergence_table([CE, NONL], metrics=METRICS, smoothing=0)
    assert table.baseline == "ce"
    # Near: 0.05 * 9 = 0.45 for the rank, 0.05 * 2 = 0.1 for the alignment.
    assert table.collapse["nonl"] == {"inter_erank": 0.5, "weight_alignment": 0.75}
    assert table.collapse["ce"] == {"inter_erank": math.inf, "weight_alignment": math.inf}
    assert table.match["nonl"] == {"inter_erank": 0.25, "weight_alignment": 0.25}
    assert table.match["ce"] == {"inter_erank": 0.75, "weight_alignment": 0.5}  # settled: within 0.45, 0.1 of its end

    # Smoothed by half the rank goes 3, 5.25, 6.975, 7.94, 8.47, the alignment 2, 1.25, 0.725, 0.41, 0.21.
    smoothed = convergence_table([CE, NONL], metrics=METRICS)
    assert smoothed.collapse["nonl"] == {"inter_erank": math.inf, "weight_alignment": math.inf}
    assert smoothed.match["nonl"] == {"inter_erank": 0.75, "weight_alignment": 0.5}
    assert convergence_table([NONL], metrics=METRICS, tolerance=0.11).collapse["nonl"] == {
        "inter_erank": 1.0,
        "weight_alignment": 1.0,
    }


def test_part_one_divides_by_own_and_part_two_by_baseline_iterations() -> None:
    """Shares in part (II) may exceed 1, because they are of the baseline's iterations."""
    long = replace(NONL, steps=[0, 50, 100, 150, 200])
    table = convergence_table([long], baseline=CE, metrics=METRICS, smoothing=0)
    assert table.collapse == {"nonl": {"inter_erank": 0.5, "weight_alignment": 0.75}}
    assert table.match["nonl"] == {"inter_erank": 1.25, "weight_alignment": 1.25}
    assert list(table.match) == ["nonl", "ce"]


def test_reference_of_relu_features() -> None:
    """ReLU features have another optimal alignment, which counts as collapse with features="relu"."""
    aim = optimum(10, features="relu").weight_alignment
    relu = run("nonl", [9] * 5, [1, 0.5, aim + 0.09, aim + 0.02, aim])
    for features, share in (("relu", 0.5), ("signed", math.inf)):
        table = convergence_table([relu], features=features, metrics=METRICS, smoothing=0)  # type: ignore[arg-type]
        assert table.collapse["nonl"]["weight_alignment"] == share


def test_undefined_values_are_nan() -> None:
    nan = math.nan
    series = {"nc1": [9.0, 5, 2, 1, 0.5], "mir": [nan] * 5, "offset": [0.5, 0.2, 0.04, nan, 0.01]}
    one = RunHistory("a", "ntce", 10, 64, STEPS, series)
    ce = RunHistory("b", "ce", 10, 64, STEPS, {"nc1": [9.0, 8, 7, 6, 2], "mir": [0.9] * 5, "offset": [0.5] * 4 + [nan]})
    table = convergence_table([one, ce], metrics=tuple(series), smoothing=0)
    assert math.isnan(table.collapse["a"]["nc1"])  # no range
    assert table.match["a"]["nc1"] == 0.5  # but an optimum
    assert math.isnan(table.collapse["a"]["mir"])
    assert table.collapse["a"]["offset"] == 1.0  # left with the NaN, back at the end
    assert math.isnan(table.match["a"]["offset"])  # the baseline ends undefined


def test_choice_of_the_baseline() -> None:
    assert convergence_table([NONL], metrics=METRICS).baseline is None
    assert convergence_table([NONL], metrics=METRICS).match == {}
    assert convergence_table([CE, replace(CE, name="other"), NONL], metrics=METRICS).baseline is None
    assert convergence_table([CE, NONL], baseline=NONL, metrics=METRICS).baseline == "nonl"


def test_table_as_text() -> None:
    table = convergence_table([CE, NONL], metrics=METRICS, smoothing=0)
    assert (
        table.text()
        == """\
| (I) within 5% of collapse after | inter_erank | weight_alignment |
| ------------------------------- | ----------: | ---------------: |
| ce                              |       never |            never |
| nonl                            |       50.0% |            75.0% |
| [NCD], CIFAR-100                |       47.2% |             7.4% |

| (II) like the final ce after | inter_erank | weight_alignment |
| ---------------------------- | ----------: | ---------------: |
| ce, settled                  |       75.0% |            50.0% |
| nonl                         |       25.0% |            25.0% |
| [NCD], CIFAR-100             |        6.0% |             1.8% |"""
    )
    assert "(II)" not in convergence_table([NONL], metrics=METRICS).text()


def test_published_part_two_is_not_a_share_of_all_iterations() -> None:
    """As the docstring derives from Table 7: a weaker goal cannot be reached later than a stronger one."""
    column = TABLE_7_METRICS.index("weights_erank")
    bounds = {loss: first[column] / second[column] for loss, (first, second) in TABLE_7.items()}
    assert min(bounds.values()) == bounds["ntce"] == pytest.approx(0.763, abs=1e-3)


def test_table_errors() -> None:
    with pytest.raises(ValueError, match="runs: expected at least one"):
        convergence_table([])
    with pytest.raises(ValueError, match="runs: expected distinct names, got ce, ce"):
        convergence_table([CE, replace(NONL, name="ce")], metrics=METRICS)
    with pytest.raises(ValueError, match=r"runs: expected the same number of classes, got {'ce': 10, 'nonl': 4}"):
        convergence_table([CE, replace(NONL, num_classes=4)], metrics=METRICS)
    with pytest.raises(ValueError, match=r"metrics: expected some of intra_erank, .*, got 'accuracy'"):
        convergence_table([CE], metrics=["accuracy"])
    with pytest.raises(ValueError, match="ce: has no metric 'cdnv'"):
        convergence_table([CE], metrics=["cdnv"])
    with pytest.raises(ValueError, match="ce: no iterations"):
        convergence_table([run("ce", [1], [1], [0])], metrics=METRICS)
    for tolerance in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"tolerance: expected a number in \(0, 1\]"):
            convergence_table([CE], metrics=METRICS, tolerance=tolerance)
    with pytest.raises(ValueError, match="smoothing"):
        convergence_table([CE], metrics=METRICS, smoothing=1)


# Files and the command


def write(path: Path, loss: str, final: float, **changes: Any) -> Path:
    metrics = {name: [None, 2.0, final, final, final] for name in TABLE_7_METRICS}
    recipe = {"loss": {"name": loss}}
    content = {"version": 2, "recipe": recipe, "steps": STEPS, "metrics": metrics, "num_classes": 10, "dim": 64}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


def test_loading_a_history(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "history.json", "ntce", 0.5)
    loaded = RunHistory.load(path)
    assert (loaded.name, loaded.loss, loaded.num_classes, loaded.dim) == (str(path), "ntce", 10, 64)
    assert loaded.steps == STEPS
    values = loaded.metrics["inter_erank"]
    assert (math.isnan(values[0]), values[1], values[4]) == (True, 2.0, 0.5)
    assert RunHistory.load(tmp_path / "run").name == str(tmp_path / "run")


def test_loading_a_history_of_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    from nckernels.train import History, Recipe

    recipe = Recipe().replace(**{"loss.name": "ntce"})
    series = {"nc1": [math.nan, 0.5]}
    History(recipe, num_classes=7, dim=5, steps=[0, 3], metrics=series).save(tmp_path / "history.json")
    loaded = RunHistory.load(tmp_path)
    assert (loaded.loss, loaded.num_classes, loaded.dim, loaded.steps) == ("ntce", 7, 5, [0, 3])
    assert math.isnan(loaded.metrics["nc1"][0])
    assert loaded.metrics["nc1"][1] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version: expected 2, got 1"),
        ({"recipe": []}, "recipe: expected an object, got list"),
        ({"recipe": {"loss": "ce"}}, "recipe.loss: expected an object, got str"),
        ({"recipe": {"loss": {"name": 3}}}, "recipe.loss.name: expected a string, got int"),
        ({"dim": None}, "dim: expected a positive whole number, got None"),
        ({"steps": []}, "steps: expected a list of steps, at least one"),
        ({"steps": None}, "steps: expected a list, got NoneType"),
        ({"steps": [0, 10, 10, 20, 30]}, "steps: expected increasing numbers"),
        ({"steps": [0, 1, 2, 3, "4"]}, "steps: expected a list of steps"),
        ({"metrics": {"mir": [1.0]}}, r"metrics.mir: expected one value per step \(5\)"),
        ({"metrics": {"mir": [1, 2, 3, 4, "5"]}}, "metrics.mir: expected numbers or null"),
        ({"num_classes": "10"}, "num_classes: expected a positive whole number, got '10'"),
    ],
)
def test_incomplete_histories_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"bad\.json: {message}"):
        RunHistory.load(write(tmp_path / "bad.json", "ce", 0.5, **changes))


def test_files_that_are_no_history_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    for content, message in ((b"{", "not a JSON file"), (b"\xff\xfe\xff", "not a JSON file"), (b"[]", "the history")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.json: {message}"):
            RunHistory.load(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ce, nonl = write(tmp_path / "1.json", "ce", 1.0), write(tmp_path / "2.json", "nonl", 0.05)
    options = ["--metrics", "weight_alignment", "--smoothing", "0"]
    assert main([str(nonl), str(ce), *options]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["nonl", "50.0%"] in rows
    assert ["ce", "never"] in rows
    assert ["ce, settled", "50.0%"] in rows
    assert rows.count(["[NCD], CIFAR-100", "7.4%"]) == rows.count(["[NCD], CIFAR-100", "1.8%"]) == 1

    # Two runs of a loss are told apart by their files; another file is the baseline, and is a row of part (II) only.
    again = write(tmp_path / "3.json", "nonl", 0.2)
    assert main([str(nonl), str(again), "--baseline", str(ce), "--tolerance", "0.11", *options]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0][:1] not in ("[", "-")] == [
        "(I) within 11% of collapse after", str(nonl), str(again),
        "(II) like the final ce after", str(nonl), str(again), "ce, settled",
    ]  # fmt: skip
    assert [str(again), "50.0%"] in rows


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, old = write(tmp_path / "1.json", "ce", 1.0), write(tmp_path / "old.json", "nonl", 1.0, version=1)
    cases = (
        ([tmp_path / "none.json"], "none.json"),
        ([tmp_path], str(tmp_path)),
        ([run, old], "old.json: version: expected 2, got 1"),
        ([run, "--metrics", "mir"], "ce: has no metric 'mir'"),
        ([run, "--tolerance", "0"], "tolerance: expected"),
    )
    for arguments, message in cases:
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err


def test_command_loads_no_trainer() -> None:
    code = "import sys, nckernels.metrics.cli; print(*[m for m in sys.modules if m.startswith('nckernels.train')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_values_that_are_not_finite() -> None:
    """An infinite value does not stay in the average for good, and a level that is none is named."""
    assert convergence_iteration([1, 2, 3], [math.inf, 0, 0], 0, 0.1) == 2
    with pytest.raises(ValueError, match="level: expected a number, got nan"):
        first_reach([1], [0.0], math.nan, 0)
