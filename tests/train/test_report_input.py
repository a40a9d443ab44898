"""The report with unusual input: broken files, many files, and a browser as narrow as a phone."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from nckernels.train.report import charts, cli, figures
from nckernels.train.report.load import find, load, load_all
from nckernels.train.report.page import make_page
from nckernels.train.report.rows import group

from .made_up import history, write
from .report_page import Page, report, rows_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_text_of_files_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("&")</script>'
    run = history("nonl", name=f"made/{evil}", note=evil, class_names=[f"{evil}{c} $x$" for c in range(10)])
    run["recipe"]["title"] = run["recipe"]["source"] = run["recipe"]["data"]["root"] = evil
    run["recipe"]["data"]["name"] = run["recipe"]["model"]["name"] = run["versions"]["torch"] = evil
    run["recipe"]["loss"]["options"] = {evil: evil}
    run["versions"][evil] = evil
    run["classifiers"] = [{"name": evil, "accuracy": 0.5, "seconds": 1.0}]
    page = report(tmp_path, run, problems=[evil], waiting=[Path(evil)])
    assert "script" not in page.tags
    assert page.text.count(evil) >= 10
    assert "script" not in report(tmp_path / "titled", history("nonl", last=True), title=evil).tags


def test_a_broken_file_is_named_and_the_others_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "good", history("nonl", last=True))
    later = {**history("ce"), "version": 3}
    short = {**history("ce"), "loss": [1.0]}
    words = {**history("ce"), "test_accuracy": ["high"] * 30}
    nameless = history("ce")
    nameless["recipe"]["loss"] = {"name": 7}
    for name, content in (("later", later), ("short", short), ("words", words), ("nameless", nameless)):
        write(tmp_path / name, content)
    write(tmp_path / "cut", history("ce"))
    (tmp_path / "cut" / "history.json").write_text('{"version": 2, "recipe"')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "history.json").write_text("[1]")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text("{}")
    out = tmp_path / "new" / "page.html"
    assert cli.main([str(tmp_path), "--out", str(out)]) == 1
    page, errors = Page(out.read_text(encoding="utf-8")), capsys.readouterr().err
    for name, reason in (
        ("later", "version: expected 2, got 3"),
        ("short", "loss: expected one number per step (30)"),
        ("words", "test_accuracy: expected numbers or null"),
        ("nameless", "recipe.loss.name: expected str, got 7"),
        ("cut", "not a JSON file"),
        ("list", "the history: expected an object, got list"),
    ):
        line = f"{tmp_path / name / 'history.json'}: {reason}"
        assert line in errors
        assert line in page.text
    assert f"Started, but not evaluated yet: {tmp_path / 'begun'}." in page.text
    assert list(page.column("Results on digits", "Test, %")) == ["NONL"]


def test_many_classes_and_runs_give_a_small_page_quickly(tmp_path: Path) -> None:
    for i in range(200):
        loss = ("ce", "normface", "ntce", "nonl", "etf-dr")[i % 5]
        made = history(loss, evaluations=20, loss__temperature=0.1 + 0.01 * (i // 5), data__name="glyphs")
        write(tmp_path / str(i), made)
    write(tmp_path / "large", history("nonl", classes=200, evaluations=1000, dim=512, data__name="cifar100"))
    start = time.monotonic()
    assert cli.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert time.monotonic() - start < 30
    assert (tmp_path / "page.html").stat().st_size < 3e6


def test_files_folders_and_folders_of_runs_are_found_once(tmp_path: Path) -> None:
    deep = write(tmp_path / "sweep" / "a" / "b", history("nonl"))
    other = write(tmp_path / "other", history("ce"))
    found = find([tmp_path / "sweep", deep, deep / "history.json", other / "history.json"])
    assert found.histories == (deep / "history.json", other / "history.json")
    assert load(found.histories[1]).settings["loss.name"] == "ce"


def test_nothing_to_show_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in (
        (tmp_path / "none", "there is no such file or folder"),
        (tmp_path, "there is no history.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(path)])
        assert stop.value.code == 2
        assert f"{path}: {reason}" in capsys.readouterr().err
    (tmp_path / "history.json").write_text("{}")
    assert cli.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert not (tmp_path / "page.html").exists()


def test_old_and_new_recipes_are_read(tmp_path: Path) -> None:
    run = history("nonl")
    del run["recipe"]["run"]["log_every"], run["recipe"]["augment"]
    run["recipe"]["loss"]["margin"] = 0.3
    (row,) = rows_of(tmp_path, run)
    assert row.settings["augment.views"] == 1
    assert row.settings["loss.margin"] == 0.3


def test_the_page_refers_to_no_other_file(tmp_path: Path) -> None:
    write(tmp_path, history("nonl", class_names=[chr(0x4E00 + c) for c in range(10)]))
    text = make_page(load_all(find([tmp_path]).histories)[0])
    assert not re.search(r"""(src|href)=["'](?!#|data:)|@import|url\((?!#)""", text)
    assert "default-src 'none'" in text
    assert len(re.findall(r"<svg", text)) == 11


def test_means_that_are_the_prototypes_are_drawn_once(tmp_path: Path) -> None:
    for loss, maps in (("scl", ["prototypes = class means"]), ("nonl", ["prototypes", "class means"])):
        write(tmp_path / loss, history(loss, evaluations=1))
        (data,) = group(load_all(find([tmp_path / loss]).histories)[0])
        titles = re.findall("<title>Cosines of the (.*?) of", figures.cosines([data]))
        assert titles == maps


def test_axes_that_span_decades_are_logarithmic(tmp_path: Path) -> None:
    steps, flat = np.arange(3.0), np.zeros(3)
    for values, expected in (([1, 30, 0], True), ([1, 5, math.nan], False), ([-1, 30, 2], False), ([0, 0, 0], False)):
        assert charts.spans_decades([charts.Line("nonl", steps, np.array(values, float), flat)]) is expected


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome")
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    """In a frame of 360 pixels: a headless window cannot be that narrow everywhere."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    runs = [history("nonl", seed=s, loss__temperature=t, run__batch_size=b, class_names=names)
            for s in range(2) for t in (0.1, 0.2) for b in (64, 128)]  # fmt: skip
    for i, run in enumerate([*runs, history("ce"), history("scl")]):
        write(tmp_path / str(i), run)
    script = """<script>addEventListener("load", () => {
        document.querySelectorAll("details").forEach(d => d.open = true);
        const page = document.documentElement, text = [...document.querySelectorAll("svg text")];
        const size = Math.min(...text.map(t => t.getBoundingClientRect().height));
        parent.postMessage([page.scrollWidth, page.scrollHeight, text.length, Math.round(size)].join(" "), "*");
    })</script>"""
    text = make_page(load_all(find([tmp_path]).histories)[0], title="W" * 80)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", script + "</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    frame = """<body>waiting<script>onmessage = e => document.body.textContent = "measured " + e.data</script>
        <iframe src="page.html" style="width: 360px; height: 800px; border: 0"></iframe></body>"""
    (tmp_path / "frame.html").write_text(frame)
    command = [
        str(CHROMIUM),
        "--no-sandbox",
        "--headless=new",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    measured = re.search(r"measured (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert measured, done.stdout + done.stderr
    width, height, texts, size = map(int, measured.groups())
    assert width <= 360
    assert height > 3000
    assert texts > 100
    assert size >= 9
