"""``python -m nckernels demo``: five losses side by side, two tables and one picture.

Every loss trains the same network from the same initialisation on the same batches with the same optimiser, learning
rate and schedule. SupCon (SCL) sees two random views of every sample instead of the sample itself; the class means are
its classifier.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from nckernels.metrics import first_reach, optimum

from . import plots, recipes
from .cli import classifier_table
from .data import DataError
from .engine import TrainingError, fit
from .history import History

RECIPE = "digits"
NAMES = {"ce": "CE", "normface": "NormFace", "ntce": "NTCE", "nonl": "NONL", "scl": "SCL, FP"}

# Column heading, metric, format; first the definitions of [NCD] Table 3, then the direct measurements.
PUBLISHED = (
    ("intra", "intra_erank", ".1f"),
    ("inter", "inter_erank", ".2f"),
    ("weights", "weights_erank", ".2f"),
    ("w-align", "weight_alignment", ".3f"),
    ("i-align", "instance_alignment", ".3f"),
    ("MIR", "mir", ".3f"),
    ("HDR", "hdr", ".3f"),
)
DIRECT = (
    ("NC1", "nc1", ".1e"),
    ("CDNV", "cdnv", ".1e"),
    ("NC2norm", "nc2_norms", ".1e"),
    ("NC2cos", "nc2_cosines", ".1e"),
    ("offset", "offset", ".3f"),
    ("HDRctr", "hdr_centred", ".3f"),
)
WIDTH = 8
NOTES = """\
optimum: the value at exact neural collapse. like CE after: the share of CE's iterations until the smoothed metric is
as close to the optimum as CE's final value, and stays so. intra: counts directions of scatter and ignores its size;
NC1 and CDNV measure the size, and CDNV is more robust. offset: distance of the centre of the means from the origin,
1/sqrt(K) for the orthogonal frame of ReLU features. HDR: subtracts the direction of the global mean, which is noise
near collapse; HDRctr subtracts the mean itself. SCL, FP: SupCon with two views, class means as prototypes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the histories; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    runs = {}
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)  # an unwritable folder is an error before the training
        settings = {row: recipes.load(f"{RECIPE}/{row}", [*arguments.set, "run.metrics=true"]) for row in NAMES}
        for row, recipe in settings.items():
            runs[row] = fit(recipe, progress=False if arguments.quiet else None)
    except (DataError, FloatingPointError, TrainingError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, ImportError) as error:
        parser.error(str(error))

    print(table({row: run.history for row, run in runs.items()}))
    print(NOTES)
    for row, run in runs.items():
        if run.history.classifiers:
            print(f"Classifiers on the network trained with {row} ([NCD] Table 2):")
            print(classifier_table(run.history.classifiers), end="\n\n")
    for row, run in runs.items():
        run.history.save(arguments.out / f"{row}.json")
    picture = arguments.out / "demo.png"
    plots.demo_figure(runs, NAMES, picture)
    print(f"written: {picture} and one JSON history per loss")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels demo",
        description="Train cross-entropy, NormFace, NTCE, NONL and SupCon on the digits and compare their geometry.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change a setting of the recipe {RECIPE} for all losses, such as schedule.epochs=20; may be repeated",
    )
    add("--out", type=Path, default=Path("demo"), help="folder for the picture and the histories")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def table(histories: Mapping[str, History]) -> str:
    """Final values of every loss, the optimum, and how soon the other losses match the first one, cross-entropy.

    Below each of the other losses is the share of cross-entropy's iterations after which its smoothed metric is at
    least as close to the optimum as cross-entropy's final value, and stays so.
    """
    baseline = next(iter(histories.values()))
    best = asdict(optimum(baseline.num_classes))
    columns = PUBLISHED + DIRECT

    def row(label: str, test: str, cells: Sequence[str], seconds: str) -> str:
        cells = [f"{cell:>{WIDTH}}" for cell in cells]
        left, right = "".join(cells[: len(PUBLISHED)]), "".join(cells[len(PUBLISHED) :])
        return f"{label:<15}{test:>7} |{left} |{right} |{seconds:>6}".rstrip()

    def values(metrics: dict[str, float]) -> list[str]:
        return [_number(metrics[name], style) for _, name, style in columns]

    titles = (" as in [NCD] Table 3", " measured directly")
    lines = [
        f"{'':22} |{titles[0]:<{WIDTH * len(PUBLISHED)}} |{titles[1]:<{WIDTH * len(DIRECT)}} |",
        row("loss", "test %", [heading for heading, _, _ in columns], "s"),
        row("optimum", "", values(best), ""),
    ]
    lines.append("".join("+" if c == "|" else "-" for c in lines[1].ljust(len(lines[0]))))
    for loss, history in histories.items():
        final = {name: series[-1] for name, series in history.metrics.items()}
        test, seconds = f"{history.test_accuracy[-1]:.1%}"[:-1], f"{history.seconds:.1f}"
        lines.append(row(NAMES[loss], test, values(final), seconds))
        if history is not baseline:
            shares = [_share(history, baseline, name, best[name]) for _, name, _ in columns]
            lines.append(row("  like CE after", "", shares, ""))
    return "\n".join(lines)


def _number(value: float, style: str) -> str:
    if math.isnan(value):
        return "-"
    return "0" if value == 0 else format(value, style)


def _share(history: History, baseline: History, name: str, best: float) -> str:
    step = first_reach(history.steps, history.metrics[name], baseline.metrics[name][-1], best)
    return "never" if step is None else f"{step / baseline.steps[-1]:.0%}"
