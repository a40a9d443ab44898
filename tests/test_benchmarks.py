"""The benchmark suite: counts, checks before timing, and comparisons that distinguish slowdowns from noise."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import random
import re
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import (
    assignment,
    compare,
    e2e,
    harness,
    many_classes,
    measure,
    plots,
    problems,
    readme,
    report,
    rivals,
    small_batches,
    sweep,
    tune,
    variants,
)
from benchmarks.harness import GEMM, Measured, Result
from benchmarks.problems import Problem

CPU = torch.device("cpu")
NAIVE = next(v for v in rivals.RIVALS if v.name == rivals.BASELINE)
OURS = next(v for v in variants.OURS if v.name == "nckernels chunked")


def session(*chosen: variants.Variant) -> harness.Session:
    return harness.Session(CPU, torch.float32, chosen or (OURS, NAIVE))


# --- what is counted ---------------------------------------------------------------------------------------


def test_work_matches_the_kernels_page() -> None:
    work = Problem("nonl", 100, 50, 8).work(4, present=30)
    assert (work.flops, work.flops_again, work.exps) == (6 * 100 * 30 * 8, 8 * 100 * 30 * 8, 3000)
    assert work.bytes == 4 * 8 * (2 * 100 + 30 + 50)
    assert Problem("normface", 100, 50, 8).work(4, present=30).flops == 6 * 100 * 50 * 8
    assert Problem("supcon", 100, 50, 8).work(4, present=30).flops == 3 * 100 * 100 * 8


def test_floor_is_the_unit_that_takes_longest() -> None:
    work = problems.Work(600, 800, 50, 10)
    assert work.floor(gemm=100, copy=100, exp=100) == 6
    assert work.floor(gemm=100, copy=100, exp=100, again=True) == 8
    assert work.floor(gemm=1000, copy=10, exp=None) == 5
    assert work.floor(gemm=1000, copy=100, exp=1) == 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["quick", "full", "memory", "launch", "campaign"])
def test_suites_hold_each_problem_once(name: str, device: str) -> None:
    chosen = problems.suite(name, device)
    assert len(set(chosen)) == len(chosen) > 5
    assert all(p.loss in problems.LOSSES for p in chosen)


def test_summary_is_median_and_quartiles() -> None:
    found = measure.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == measure.Summary(3.0, 2.0, 4.0, 1.0, 5)
    assert measure.summary([]) is None


def test_interleaving_times_slow_steps_once_and_others_in_every_round() -> None:
    calls = dict.fromkeys("abc", 0)

    def step(name: str, seconds: float) -> measure.Step:
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    steps = {"a": step("a", 0.001), "b": step("b", 0.05), "c": step("c", 0.05)}
    rounds = measure.interleave(steps, CPU, 0.2, lambda _: None, always=("c",))
    assert calls["b"] == 1
    assert calls["a"] == calls["c"] == len(rounds) >= measure.MIN_ROUNDS
    assert len(measure.ratios(rounds, "b", "a")) == 1


def test_peak_memory_counts_what_a_step_allocates() -> None:
    found = measure.peak_memory(lambda: torch.empty(1 << 20, dtype=torch.uint8).fill_(1), CPU)
    assert found.extra == pytest.approx(1 << 20, rel=0.01)


# --- every variant computes the same -----------------------------------------------------------------------


SMALL = [Problem(x, 60, 13, 16) for x in problems.PROTOTYPE_LOSSES]
SMALL += [problems.samples(x, 60, 16) for x in problems.SAMPLE_LOSSES]
PAIRS = [(v, p, v.absent(p, CPU, torch.float32)) for p in SMALL for v in rivals.RIVALS if not v.compiles]
PAIRS = [(v, p, reason) for v, p, reason in PAIRS if reason in (None, "not installed")]


@pytest.mark.parametrize(("variant", "problem", "reason"), PAIRS, ids=[f"{v.name}, {p}" for v, p, _ in PAIRS])
def test_rivals_agree_with_float64(variant: variants.Variant, problem: Problem, reason: str | None) -> None:
    if reason is not None:
        pytest.skip(f"{variant.name} is {reason}")
    leaves, target = problem.tensors(CPU, torch.float32)
    outputs = harness.runner(variant.make(problem), leaves, target, False)()
    assert harness.relative_error(outputs, harness.exact(problem, leaves, target)) < 1e-5


def test_gpu_only_rivals_are_listed_with_the_reason() -> None:
    problem = Problem("normface", 64, 16, 16)
    for variant in rivals.RIVALS:
        if variant.name in ("liger-kernel", "cut-cross-entropy", "quack", "inf-cl"):
            assert variant.absent(problem, CPU, torch.float32) == "needs CUDA"
        assert variant.note


def test_too_much_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "memory_room", lambda _: 10**6)
    assert "GB" in str(NAIVE.absent(Problem("nonl", 1000, 1000, 8), CPU, torch.float32))
    assert OURS.absent(Problem("nonl", 1000, 1000, 8), CPU, torch.float32) is None


def test_a_wrong_variant_is_found_and_not_timed() -> None:
    wrong = replace(NAIVE, name="wrong", make=lambda p: lambda *a: NAIVE.make(p)(*a) * (1 + 1e-3))
    raises = replace(NAIVE, name="raises", make=lambda p: lambda *a: 1 / 0)
    nan = replace(NAIVE, name="nan", make=lambda p: lambda *a: NAIVE.make(p)(*a) * float("nan"))
    measured = harness.measure(Problem("nonl", 64, 8, 16), session(wrong, raises, nan, NAIVE), 0.05)
    found = {r.variant: r for r in measured.results}
    assert found["wrong"].absent.startswith("wrong: relative error 1.0e-03")
    assert found["nan"].absent.startswith("wrong")
    assert found["raises"].absent.startswith("fails: ZeroDivisionError")
    assert all(found[n].broken and found[n].seconds is None for n in ("wrong", "raises", "nan"))
    assert found[rivals.BASELINE].seconds.count >= measure.MIN_ROUNDS
    assert found[rivals.BASELINE].extra_bytes > 0


# --- the sweep ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sweep.LOSSES)
def test_naive_forms_of_the_sweep_agree_in_float64(loss: str) -> None:
    for options in sweep.OPTIONS[loss]:
        k = {"clip": 40, "info_nce": 53 if ("frozen", True) in options else 40, "simclr": 20}.get(loss, 7)
        problem = Problem(loss, 40, k, 9, options)
        leaves, target = problem.tensors(CPU, torch.float64)
        outputs = harness.runner(rivals.naive(problem), leaves, target, False)()
        expected = harness.exact(problem, leaves, target)
        assert len(outputs) == 1 + sum(x.requires_grad for x in leaves)
        assert outputs[0].shape == expected[0].shape
        assert harness.relative_error(outputs, expected) < 1e-12, problem


def test_naive_uniformity_in_16_bits_agrees() -> None:
    problem = Problem("uniformity", 40, 1, 9)
    leaves, target = problem.tensors(CPU, torch.bfloat16)
    outputs = harness.runner(rivals.naive(problem), leaves, target, False)()
    assert harness.relative_error(outputs, harness.exact(problem, leaves, target)) < 5e-2


def test_sweep_writes_a_report_for_each_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--suite sweep --loss dot_regression uniformity --budget 2 --seed 3 --out"
    assert suite.main([*words.split(), str(tmp_path)]) == 0
    drawn = sweep.problems(3, ("dot_regression", "uniformity"))
    assert drawn == sweep.problems(3, ("dot_regression", "uniformity")) != sweep.problems(4)
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        found = report.load(tmp_path / f"sweep-cpu-{dtype}.json")
        assert [m.problem for m in found.measured] == drawn[: len(found.measured)]
        assert all(m.results[0].error < harness.TOLERANCE[getattr(torch, dtype)] for m in found.measured)
        assert f"{dtype}: {len(found.measured)} problems" in printed
        found.save(tmp_path / "again.json")
        assert report.load(tmp_path / "again.json") == found


@pytest.mark.parametrize(
    ("words", "named"),
    [("--suite sweep --size 64,10,32 --brief", "--size --brief: not in"), ("--loss info_nce", "info_nce: in")],
)
def test_options_of_other_suites_are_refused(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(words.split())
    assert named in capsys.readouterr().err


def test_sweep_counts_a_problem_as_slower_only_if_slower_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {p: [1.2, 1.1] if i == 0 else [1.3, 0.9] if i == 1 else [0.5] for i, p in enumerate(sweep.problems(0))}
    count = len(values)

    def measured(problem: Problem, *_: object) -> Measured:
        ratio = measure.summary([values[problem].pop(0)])
        return Measured(problem, None, [Result(n, seconds=ratio, to_baseline=ratio) for n in ("nckernels", "naive")])

    monkeypatch.setattr(sweep, "measure", measured)
    text = sweep.table(sweep.run(torch.float32, "float32", "", 60.0, 0, sweep.LOSSES))
    assert f"{count} problems, 1 above 1.0, 1 above 1.05; median 0.50, worst 1.10" in text
    assert text.splitlines()[1].startswith("      1.10")
    assert not any(values.values())


def test_sweep_does_not_time_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "our_loss", lambda p: lambda *a: 1.001 * rivals.naive(p)(*a))
    found = sweep.measure(Problem("ntce", 40, 7, 9), torch.float32, 0.1)
    assert found.results[0].broken
    assert sweep.ratio(found) is None


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three batch sizes, written by the command."""
    out = tmp_path_factory.mktemp("report")
    words = "--loss nonl --size 32,6,16 64,6,16 128,6,16 --only chunked naive --skip compile --budget 10"
    assert suite.main([*words.split(), "--out", str(out)]) == 0
    return out


def test_command_writes_a_report_and_pictures(small: Path) -> None:
    found = report.load(small / "quick-cpu-float32.json")
    assert found.ceilings is not None
    assert min(found.ceilings.gemm, found.ceilings.copy, found.ceilings.exp or 1) > 0
    assert found.command.startswith("python -m benchmarks --loss nonl")
    assert found.versions["torch"] == torch.__version__
    assert found.commit
    assert found.date
    for measured in found.measured:
        ours = next(r for r in measured.results if r.ours)
        assert ours.error < 1e-5
        assert 0 < measured.share(ours, found.ceilings) < 1
    if importlib.util.find_spec("matplotlib"):
        assert {p.name for p in small.glob("*.png")} == {
            "quick-cpu-float32-floor-nonl.png", "quick-cpu-float32-M-nonl-K-6-d-16.png",
        }  # fmt: skip
    assert "% floor" in report.table(found)


def test_report_survives_the_file(small: Path, tmp_path: Path) -> None:
    found = report.load(small / "quick-cpu-float32.json")
    found.save(tmp_path / "again.json")
    assert report.load(tmp_path / "again.json") == found


def test_budget_that_is_spent_leaves_problems_out_and_says_so(tmp_path: Path) -> None:
    words = "--loss nonl --size 32,6,16 64,6,16 --only chunked --budget 1e-9 --out"
    assert suite.main([*words.split(), str(tmp_path)]) == 0
    assert len(report.load(tmp_path / "quick-cpu-float32.json").notes) == 2


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(SystemExit, match="take it again"):
        report.load(tmp_path / "old.json")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="use --device cpu"):
            suite.main(["--device", "cuda"])
        with pytest.raises(SystemExit, match="--defaults"):
            tune.main([])


def test_a_training_step_is_timed_with_all_losses() -> None:
    for kind, d in ((e2e.CLASSIFIER, 512), (e2e.SUPCON, 32)):
        measured = e2e.measure_step(Problem(kind, 8, 5, d), session(), 0.01)
        assert [r.absent for r in measured.results] == [None] * len(measured.results)
        assert any(r.ours for r in measured.results)
        assert "ConvNet" in measured.checked_on


# --- compare -----------------------------------------------------------------------------------------------


def fake(seed: int, slowdown: float = 1.0, spread: float = 0.03, memory: int = 8 << 20) -> report.Report:
    """Noisy samples around 1 ms for one variant of ours, with a planted ``slowdown``."""
    noise = random.Random(seed)
    drift = noise.uniform(0.8, 1.2)  # of the whole machine
    gemm = [drift * 1e-3 * noise.gauss(1, spread) for _ in range(40)]
    ours = [t * slowdown * noise.gauss(1, spread) for t in gemm]
    results = [
        Result(GEMM, seconds=measure.summary(gemm)),
        Result(
            "nckernels native",
            seconds=measure.summary(ours),
            to_gemm=measure.summary([a / b for a, b in zip(ours, gemm, strict=True)]),
            extra_bytes=memory,
        ),
    ]
    machine = {"device": "a machine", "threads": 2}
    return report.Report("quick", "float32", "", machine, None, [Measured(Problem("nonl", 1, 2, 3), None, results)])


def status(old: report.Report, new: report.Report, folder: Path, *options: str) -> int:
    old.save(folder / "old.json")
    new.save(folder / "new.json")
    return compare.main([str(folder / "old.json"), str(folder / "new.json"), *options])


def test_compare_catches_a_planted_slowdown(tmp_path: Path) -> None:
    for seed in range(20):
        assert status(fake(seed), fake(seed + 100, slowdown=1.2), tmp_path) == 1


def test_compare_ignores_noise(tmp_path: Path) -> None:
    for seed in range(40):
        assert status(fake(seed), fake(seed + 100), tmp_path) == 0
        assert status(fake(seed, spread=0.2), fake(seed + 100, slowdown=1.1, spread=0.2), tmp_path) == 0


def test_compare_accepts_speedups(tmp_path: Path) -> None:
    assert status(fake(0, slowdown=1.5), fake(1), tmp_path) == 0


def test_compare_catches_memory_and_failures(tmp_path: Path) -> None:
    assert status(fake(0), fake(1, memory=16 << 20), tmp_path) == 1
    broken = fake(1)
    broken.measured[0].results[1] = Result("nckernels native", absent="fails: now")
    assert status(fake(0), broken, tmp_path) == 1
    gone = fake(1)
    problem = gone.measured.pop().problem
    gone.notes = [f"not run, the budget of 9 s is spent: {problem}"]
    assert status(fake(0), gone, tmp_path) == 2
    gone.notes = [f"not run: {problem}: no memory"]
    assert status(fake(0), gone, tmp_path) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "7"])
def test_compare_refuses_files_that_are_no_reports(text: str, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(text)
    with pytest.raises(SystemExit, match=r"new\.json is no report"):
        report.load(tmp_path / "new.json")


def test_compare_refuses_other_machines_and_disjoint_reports(tmp_path: Path) -> None:
    other = copy.deepcopy(fake(1))
    other.machine["threads"] = 4
    assert status(fake(0), other, tmp_path) == 2
    other = fake(1)
    other.measured = []
    assert status(fake(0), other, tmp_path) == 2


# --- generated documents, tile tables ----------------------------------------------------------------------


def test_readme_tables_match_the_reports() -> None:
    """If this fails: python -m benchmarks readme."""
    assert readme.main(["--check"]) == 0


def test_readme_table_is_written_between_its_markers(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    data = small / "quick-cpu-float32.json"
    path.write_text(f"before\n<!-- speed table: begin {data} -->\nold\n<!-- speed table: end -->\nafter\n")
    assert readme.main(["--check", str(path)]) == 1
    assert readme.main([str(path)]) == readme.main(["--check", str(path)]) == 0
    text = path.read_text()
    assert "| **nckernels chunked** |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old\n" not in text


@pytest.mark.parametrize("family", tune.FAMILIES)
def test_tile_tables_are_complete_and_name_their_source(family: int, tmp_path: Path) -> None:
    """If this fails after a change of a rule: python -m benchmarks tune --defaults, for tables that are not
    measured."""
    config = pytest.importorskip("nckernels.backends.triton.config", exc_type=ImportError)
    rules = tune.defaults(config, family)
    data = json.loads((config.TABLES / f"sm_{family}.json").read_text())
    assert data["fields"] == list(config.Tile._fields)
    for kernel in tune.KERNELS:
        table = config.table(family, kernel)
        assert table.keys() == rules[kernel].keys()
        if data["source"] == "rules":
            assert table == rules[kernel]
    written = tune.write(tmp_path, family, rules, "rules")
    if data["source"] == "rules":
        assert written.read_text() == (config.TABLES / written.name).read_text()


@pytest.mark.parametrize("family", tune.FAMILIES)
def test_tile_table_keys_distinguish_shapes_as_the_rules_do(family: int) -> None:
    """No key is shared by two shapes with different tiles by the rules."""
    config = pytest.importorskip("nckernels.backends.triton.config", exc_type=ImportError)
    if json.loads((config.TABLES / f"sm_{family}.json").read_text())["source"] != "rules":
        return
    either = (False, True)
    for kernel in tune.KERNELS:
        choose = getattr(config, f"{kernel}_tile")
        for kind, d, heavy, square, full in itertools.product(
            ("half", "tf32", "ieee"), (48, 128, 256, 500, 512, 2048), either, either, either
        ):
            shape = config.Shape(
                config.Arch(family, 132, 227 << 10), kind, d, True, heavy, square=square, entries=1 << 40 if full else 0
            )
            assert choose(shape) == choose.__wrapped__(shape), (kernel, shape)


def test_a_tile_table_overrides_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("nckernels.backends.triton.config", exc_type=ImportError)
    shape = config.Shape(config.Arch(90, 132, 227 << 10), "half", 128, True, False)
    rule, other = config.lse_tile(shape), config.Tile(32, 32, 32, 4, 1)
    monkeypatch.setattr(config, "table", lambda family, kernel: {"half 128": other} if family == 90 else {})
    assert config.lse_tile(shape) == other != rule
    assert config.lse_tile(shape._replace(aligned=False)) != other
    assert config.lse_tile(shape._replace(d=256)) != other


def test_tile_search_finds_improvements_and_skips_failures() -> None:
    config = pytest.importorskip("nckernels.backends.triton.config", exc_type=ImportError)
    table = tune.Recorder({"key": config.Tile(64, 64, 64, 4, 2), "none": None})

    def cost() -> float:
        tile = table["key"]
        return float("inf") if tile.stages > 3 else 10.0 / tile.stages + abs(tile.q - 128) / 64

    best = tune.search({"lse": table}, [("lse", "key"), ("lse", "none")], cost, deadline=float("inf"))
    assert (table["key"].stages, table["key"].q) == (3, 128)
    assert best == cost()
    assert "key" in table
    assert table.used == ["key"]


def test_pictures_need_three_sizes(small: Path) -> None:
    found = report.load(small / "quick-cpu-float32.json")
    assert [(axis, len(points)) for axis, _, points in plots._sweeps(found)] == [("M", 3)]
    found.measured = found.measured[:2]
    assert plots._sweeps(found) == []


def test_many_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """Times and memory of every variant are printed; sparse gradients take less than dense ones of 2.4 MiB."""
    assert many_classes.main(["--samples", "16", "--classes", "20000", "--dim", "32", "--seconds", "0.05"]) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("M=16 K=20000 d=32")
    assert head.split() == ["ms", "a", "step", "least", "extra", "MiB"]
    assert len(rows) == 6
    for row in rows:
        median, least, extra = map(float, row.split()[-3:])
        assert median >= least > 0
        assert (extra < 1.0) == ("sparse" in row)


# --- small batches -----------------------------------------------------------------------------------------


def test_small_batches_are_trained_with_each_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.delitem(small_batches.LOSSES, "ntce")
    out = tmp_path / "outcomes.json"
    grid = ["--epochs", "1", "--seeds", "1", "--lr", "0.1", "--small", "200", "--large", "600"]
    assert suite.main(["queue", *grid, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    rows = [(line[:5].strip(), line[6:32].strip()) for line in table.splitlines()[2:-1]]
    more = ["queue 400", "repelled 0.3333", "decay 0.5", "decay 0.6667"]
    names = ["batch 200", *(f"batch 200, {name}" for name in more), "batch 600"]
    assert rows == [("nonl", name) for name in names]
    assert suite.main(["queue", "--report", str(out)]) == 0
    assert capsys.readouterr().out == table


def test_small_batches_table_matches_the_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    file = "benchmarks/results/2026-11-30-small-batches-32.json"
    assert small_batches.main(["--report", str(root / file)]) == 0
    page = (root / "docs" / "scaling.md").read_text()
    assert file in page
    assert capsys.readouterr().out in page


def test_a_rate_is_chosen_by_the_training_loss_among_those_that_did_not_diverge() -> None:
    def outcome(lr: float, seed: int, whole: float, accuracy: float) -> small_batches.Outcome:
        values = {key: 1.0 for _, key in small_batches.METRICS}
        return small_batches.Outcome("nonl", "batch 32", lr, seed, accuracy, whole, values)

    runs = [outcome(0.1, s, 2.0 + s, 0.5) for s in (0, 1)] + [outcome(0.2, s, 3.0 + s, 0.9) for s in (0, 1)]
    row = small_batches.table([*runs, outcome(0.4, 0, 1.0, 0.7)]).splitlines()[2]
    assert row.split()[3:8] == ["0.1", "2.5000", "(0.7071)", "50.0", "(0.0)"]
    assert row.split()[-3:] == ["50.0", "90.0", "70.0"]


# --- assignment of labels to fixed prototypes --------------------------------------------------------------


def trained(row: str, lr: float, accuracy: float, seed: int = 0, dataset: str = "glyphs") -> assignment.Outcome:
    return assignment.Outcome(row, 10, lr, seed, dataset, accuracy, 2 * accuracy)


def outcomes() -> assignment.Results:
    """Two rates for each of two rows; the rate that is better on the validation faces is worse on the test faces."""
    results = assignment.Results({})
    for row, good, bad in (("static", 0.1, 1.0), ("dynamic", 1.0, 0.1)):
        results.runs += [trained(row, lr, 0.3, dataset="glyphs-validation") for lr in (good, 3.0)]
        results.runs += [trained(row, bad, 0.2, dataset="glyphs-validation")]
        results.runs += [trained(row, bad, 0.9, seed) for seed in (0, 1)]
    results.runs += [trained("static", 0.1, a, seed) for a, seed in ((0.14, 1), (0.10, 0))]
    results.runs += [trained("dynamic", 1.0, a, seed) for a, seed in ((0.20, 0), (0.30, 1))]
    return results


def test_the_table_of_assignments_has_the_rates_chosen_on_the_validation_faces() -> None:
    results = outcomes()
    head, _, *rows = assignment.table(results).splitlines()
    assert head == "|  | d = 10: unseen faces, % | trained faces, % | lr |"
    static, dynamic = (f"| {assignment.TITLES[row]} |" for row in ("static", "dynamic"))
    assert rows == [f"{static} 12.0 (2.8) | 24.0 | 0.1 |", f"{dynamic} 25.0 (7.1) | 50.0 | 1 |"]
    assert assignment.verdict(results) == "d = 10: assigning anew gains +13.0 points (+10.0, +16.0)."
    results.runs.remove(trained("static", 0.1, 0.10, 0))  # not yet trained, so its seed has no counterpart
    assert assignment.verdict(results) == "d = 10: assigning anew gains +16.0 points (+16.0)."


def test_the_table_of_assignments_goes_between_the_markers() -> None:
    begin, end = assignment.MARKERS
    page = assignment.written(f"before\n{begin}\nold\n{end}\nafter\n", outcomes())
    assert page == f"before\n{begin}\n{assignment.table(outcomes())}\n{end}\nafter\n"
    assert assignment.written(page, outcomes()) == page
    with pytest.raises(SystemExit, match="assignment table: begin"):
        assignment.written("no markers", outcomes())


def test_assignments_resume_after_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[assignment.Task] = []

    def train(task: assignment.Task, settings: dict[str, object]) -> assignment.Outcome:
        calls.append(task)
        if len(calls) == 6:
            raise KeyboardInterrupt
        accuracy = 0.5 if (task.row, task.lr) in (("static", 0.3), ("dynamic", 0.1)) else 0.4
        return assignment.Outcome(**asdict(task), accuracy=accuracy, train_accuracy=1.0)

    monkeypatch.setattr(assignment, "train", train)
    monkeypatch.setattr(assignment, "_versions", dict)
    out = tmp_path / "new" / "results.json"
    grid = ["assignment", "--dims", "4", "--seeds", "2", "--rates", "0.1", "0.3", "--rows", "static", "dynamic"]
    grid += ["--out", str(out), "--quiet"]
    with pytest.raises(KeyboardInterrupt):
        suite.main(grid)
    assert len(assignment.Results.load(out).runs) == 5
    assert suite.main(grid) == 0
    printed = capsys.readouterr().out
    assert len(calls) == 9  # 8 runs, one of them twice
    tested = {(t.row, t.lr, t.seed) for t in calls if t.dataset == "glyphs"}
    assert tested == {(row, lr, seed) for row, lr in (("static", 0.3), ("dynamic", 0.1)) for seed in (0, 1)}
    saved = json.loads(out.read_text())
    assert saved["commands"] == ["python -m benchmarks " + " ".join(grid)]
    assert saved["settings"] == {"epochs": 10, "batch_size": 128, "width": 16, "temperature": 0.1}
    assert suite.main(["assignment", "--report", str(out)]) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="was made with"):
        suite.main([*grid, "--epochs", "3"])
    assert len(calls) == 9


def test_a_training_that_diverges_has_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(recipe: object, *, progress: bool) -> None:
        raise FloatingPointError

    monkeypatch.setattr(assignment, "fit", diverge)
    settings = {"epochs": 1, "batch_size": 8, "width": 4, "temperature": 0.1}
    done = assignment.train(assignment.Task("static", 10, 0.1, 0, "glyphs"), settings)
    assert (done.accuracy, done.train_accuracy) == (0.0, 0.0)


def test_each_row_is_a_configuration_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = []

    def fit(recipe: object, *, progress: bool) -> object:
        recipes.append(recipe)
        return types.SimpleNamespace(history=types.SimpleNamespace(test_accuracy=[0.5], train_accuracy=[0.6]))

    monkeypatch.setattr(assignment, "fit", fit)
    settings = {"epochs": 3, "batch_size": 8, "width": 4, "temperature": 0.1}
    for row in assignment.ROWS:
        done = assignment.train(assignment.Task(row, 12, 0.2, 5, "glyphs-validation"), settings)
        assert (done.accuracy, done.train_accuracy) == (0.5, 0.6)
    assert [(r.loss.name, r.loss.assignment) for r in recipes] == [
        ("dlp", "static"), ("dlp", "dynamic"), ("ce", "dynamic"), ("psc-star", "dynamic"), ("nonl", "dynamic")
    ]  # fmt: skip
    assert {(r.data.name, r.data.validation, r.loss.temperature) for r in recipes} == {("glyphs", True, 0.1)}
    assert {(r.model.dim, r.model.width, r.optimizer.lr, r.run.seed) for r in recipes} == {(12, 4, 0.2, 5)}
    assert {(r.schedule.epochs, r.run.batch_size) for r in recipes} == {(3, 8)}


def test_page_has_the_table_of_the_latest_report() -> None:
    found = assignment.Results.load(
        sorted((assignment.PAGE.parents[1] / "benchmarks/results").glob("*-assignment.json"))[-1]
    )
    page = assignment.PAGE.read_text()
    assert assignment.written(page, found) == page
    gains = re.findall(r"gains \+([\d.]+)", assignment.verdict(found))
    assert "gains {} points in 10 dimensions and {} in 25".format(*gains) in page
