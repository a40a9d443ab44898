"""The report of training runs, for made-up runs."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from nckernels.train.report import tables
from nckernels.train.report.load import find, load_all
from nckernels.train.report.markup import NONE
from nckernels.train.report.page import make_page
from nckernels.train.report.rows import group

from .made_up import history, write
from .report_page import Page, report, rows_of

# Rows


def test_runs_that_differ_only_in_their_seed_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    runs = [history("nonl", seed=s, accuracy=0.9 + 0.01 * s, last=True) for s in range(3)]
    page = report(tmp_path, *runs, history("ce", last=True))
    final = [100 * run["test_accuracy"][-1] for run in runs]
    cells = page.column("Results on digits", "Test, %")
    assert list(cells) == ["CE", "NONL"]
    assert cells["NONL"] == f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f}"
    assert cells["CE"] == f"{100 * history('ce')['test_accuracy'][-1]:.2f}"
    assert page.column("Results on digits", "Seeds") == {"CE": "1", "NONL": "3"}
    assert "4 runs: 2 rows on digits, 1 to 3 seeds each." in page.text


def test_rows_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        history("nonl", loss__temperature=0.2, data__root="elsewhere", run__log_every=3, run__eval_every=7),
        history("nonl", loss__temperature=0.1),
        history("ntce", run__batch_size=128),
        history("nonl", loss__temperature=0.1, seed=5, data__workers=2),
        history("ce", name="my.toml:wide"),
        history("scl", name="digits"),
    )
    names = {row.name.replace("\N{NO-BREAK SPACE}", " "): len(row.runs) for row in rows}
    assert names == {"wide": 1, "NTCE": 1, "NONL, τ = 0.1": 2, "NONL, τ = 0.2": 1, "SCL": 1}


def test_names_of_rows_are_distinct_even_where_many_settings_differ(tmp_path: Path) -> None:
    shared = {"model__dim": 3, "optimizer__lr": 0.3, "schedule__epochs": 3, "run__batch_size": 3, "augment__flip": 0.1}
    rows = rows_of(tmp_path, *(history("nonl", **{**shared, "augment__zoom": z, "model__width": w, "loss__queue": w})
                               for z, w in ((0.0, 1), (0.1, 2), (0.2, 3))), history("nonl"))  # fmt: skip
    assert len({row.name for row in rows}) == 4


def test_a_sweep_over_one_setting_is_a_table_of_its_values(tmp_path: Path) -> None:
    rates = [0.1 * n for n in range(1, 12)]
    runs = [
        history(loss, accuracy=0.9 - abs(rate - best), optimizer__lr=rate, last=True, data__validation=True)
        for loss, best in (("ce", 0.3), ("nonl", 0.5))
        for rate in rates
    ]
    page = report(tmp_path, *runs)
    assert list(page.column("The best rows on digits (held out)", "Test, %")) == ["CE, lr = 0.3", "NONL, lr = 0.5"]
    head, ce, nonl = page.tables["Test accuracy by lr on digits (held out)"]
    assert head == ["lr", *(f"{rate:g}" for rate in rates)]
    assert [ce[0], nonl[0]] == ["CE", "NONL"]
    assert ce[1:] == [f"{100 * run['test_accuracy'][-1]:.2f}" for run in runs[: len(rates)]]


def test_unfinished_runs_are_marked_and_do_not_count_beside_finished_ones(tmp_path: Path) -> None:
    done = history("nonl", accuracy=0.9, last=True)
    half = history("nonl", seed=1, accuracy=0.5, finished=False, last=True)
    page = report(tmp_path, done, half, history("ce", finished=False, last=True))
    cells = page.column("Results on digits", "Test, %")
    assert list(cells) == ["CE †", "NONL"]
    assert cells["NONL"] == f"{100 * done['test_accuracy'][-1]:.2f}"
    assert page.column("Results on digits", "Seeds") == {"CE †": "14 of 60 epochs †", "NONL": "1 + 1 unfinished"}
    assert "2 runs are unfinished." in page.text
    assert "The best test accuracy is 90.08 % with NONL" in page.text


def test_the_curve_of_a_row_is_the_mean_of_its_runs(tmp_path: Path) -> None:
    one, two = history("nonl", evaluations=3), history("nonl", seed=1, evaluations=2)
    one["loss"], two["loss"] = [1.0, None, 3.0], [2.0, None]
    (row,) = rows_of(tmp_path, one, two)
    steps, mean, deviation = row.curve("loss")
    assert steps.tolist() == [0, 5, 10]
    assert mean[[0, 2]].tolist() == [1.5, 3.0]
    assert math.isnan(mean[1])
    assert deviation[0] == pytest.approx(0.5**0.5)
    assert deviation[2] == 0


# Sections


def test_a_run_has_only_the_sections_that_it_has_data_for(tmp_path: Path) -> None:
    bare = {**history("nonl", evaluations=1), "metrics": {}, "prototype_cosines": None, "mean_cosines": None}
    page = report(tmp_path, bare)
    assert page.headings == ["Results", "Settings", "Runs"]
    assert "svg" not in page.tags


def test_data_sets_and_long_tails_have_a_column_each(tmp_path: Path) -> None:
    tails = [
        history(loss, data__imbalance=tail, accuracy=0.5 + tail, last=True)
        for loss in ("ce", "nonl")
        for tail in (0.1, 0.01)
    ]
    others = (("ce", "glyphs", 10), ("nonl", "cifar100", 20))
    others = [history(loss, data__name=name, classes=k, last=True) for loss, name, k in others]
    page = report(tmp_path, *tails, *others)
    table = page.tables["Test accuracy, %"]
    ce, nonl = (f"{100 * run['test_accuracy'][0]:.2f}" for run in others)
    assert table == [["Test accuracy, %", "glyphs", "CIFAR-100"], ["CE", ce, NONE], ["NONL", NONE, nonl]]
    assert page.tables["Imbalance"][0] == ["Imbalance", "0.1", "0.01"]
    assert [line[0] for line in page.tables["Imbalance"][1:]] == ["CE", "NONL"]
    assert page.tables["Imbalance"][1][1] == f"{100 * tails[0]['test_accuracy'][-1]:.2f}"


def test_metrics_stand_beside_the_optimum_of_their_features(tmp_path: Path) -> None:
    page = report(tmp_path, history("nonl", last=True), history("ce", model__projection="none", last=True))
    table = page.column("Metrics of Table 3, digits", "Prototype to mean² ↓")
    assert table["Optimum"] == "0"
    assert table["Optimum, ReLU"] == f"{2 - 2 * 0.9**0.5:.3f}"
    ranks = page.column("Metrics of Table 3, digits", "Inter-class rank ↑")
    assert ranks["Optimum"] == "9.00"
    assert ranks["CE"] == f"{history('ce', model__projection='none')['metrics']['inter_erank'][-1]:.2f}"
    measured = page.tables["Direct measurements, digits"][0]
    assert "NC1 ↓" in measured
    assert "Bias spread ↓" not in measured  # NaN in all runs


def test_convergence_compares_with_cross_entropy_over_the_mean_of_the_seeds(tmp_path: Path) -> None:
    for loss in ("ce", "nonl"):
        for seed in range(2):
            write(tmp_path / loss / str(seed), history(loss, seed=seed))
    (both,) = group(load_all(find([tmp_path]).histories)[0])
    (alone,) = group(load_all(find([tmp_path / "nonl"]).histories)[0])
    shown = Page(tables.convergence(both)).tables
    first = shown["(I) Within 5% of collapse after, % of iterations, digits"]
    assert [line[0] for line in first] == ["Row", "CE", "NONL"]
    assert first[1][1:] == ["never"] * 5
    second = shown["(II) As close as the final CE after, % of its iterations, digits"]
    assert [line[0] for line in second] == ["Row", "CE, settled", "NONL"]
    assert 0 < float(second[2][1]) < 50
    assert list(Page(tables.convergence(alone)).tables) == ["(I) Within 5% of collapse after, % of iterations, digits"]


def test_classifiers_are_compared(tmp_path: Path) -> None:
    page = report(tmp_path, history("scl", last=True), history("nonl", last=True))
    assert page.tables["Classifiers, digits"] == [
        ["Row", "FP, %", "LP, %"],
        ["SCL", "95.60 in 10 ms", "94.60 in 2.5 s"],
    ]


def test_a_grid_of_temperatures_and_batch_sizes_is_a_phase_diagram(tmp_path: Path) -> None:
    best = history("nonl", accuracy=0.95, loss__temperature=0.2, run__batch_size=64, last=True)
    others = [history("nonl", accuracy=0.8, loss__temperature=t, run__batch_size=b, last=True)
              for t, b in ((0.1, 64), (0.2, 32))]  # fmt: skip
    page = report(tmp_path, best, *others, history("ce", last=True))
    grid = page.tables["NONL on digits: test accuracy by temperature and batch size"]
    assert [line[:2] for line in grid[:1]] == [["τ \\ B", "32"]]
    assert [line[0] for line in grid[1:]] == ["0.1", "0.2"]
    assert grid[1][1] == ""
    assert grid[2][2] == f"{100 * best['test_accuracy'][-1]:.1f}"
    assert "at τ = 0.2, B = 64" in page.text
    assert not [title for title in page.tables if title.startswith("CE on")]


def test_settings_say_what_differs(tmp_path: Path) -> None:
    page = report(tmp_path, *(history(loss, seed=seed, note="drawn by hand", last=True)
                              for loss, seed in (("ce", 0), ("nonl", 0), ("nonl", 11))))  # fmt: skip
    assert page.tables["Settings that differ"][1:] == [
        ["loss.name", "ce (1) · nonl (2)"],
        ["run.seed", "0 (2) · 11 (1)"],
    ]
    assert ["run.batch_size", "256"] in page.tables["Settings that all runs have in common"]
    assert "torch 2.13" in page.text
    assert "drawn by hand" in page.text
    assert len(page.tables["Runs"]) == 4


def test_curves_have_gaps_optima_marks_and_colours_of_the_page(tmp_path: Path) -> None:
    broken = history("nonl")
    broken["metrics"]["inter_erank"][10:12] = [None, None]
    for name, content in (("whole", history("nonl")), ("gap", broken)):
        write(tmp_path / name / "run", content)
    pages = {name: make_page(load_all(find([tmp_path / name]).histories)[0]) for name in ("whole", "gap")}
    panel = re.compile(r"<svg[^>]*><title>Inter-class effective rank.*?</svg>", re.S)
    drawings = {name: panel.search(page) for name, page in pages.items()}
    moves = {name: max(d.count("M") for d in re.findall(r' d="([^"]*)"', drawing[0].replace("\n", " ")))
             for name, drawing in drawings.items() if drawing}  # fmt: skip
    assert moves["gap"] > moves["whole"]
    assert drawings["whole"]
    assert "stroke-dasharray" in drawings["whole"][0]
    assert "var(--nonl)" in drawings["whole"][0]
    assert "within 5 % of collapse from here" in pages["whole"]
    assert not re.search(r"(fill|stroke): #", "".join(re.findall(r"<svg.*?</svg>", pages["whole"], re.S)))
