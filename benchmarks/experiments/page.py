"""docs/results.md, from the numbers."""

from __future__ import annotations

import textwrap
from pathlib import Path

from nckernels.train import recipes
from nckernels.train.data import glyphs

from . import pictures, tables
from .claims import AT_ONCE, MARGIN, claims
from .collect import Results, Run
from .measured import NAMES, dim, first_evaluation, num_classes
from .paired import CONFIDENCE, accuracy, critical
from .stages import PROCESSES, SEEDS, STAGES
from .verdicts import NOT_RUN, RULES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "results.md"
ABSENT = "Not run."
ALT = {
    "rates": "Accuracy on the held-out faces over the learning rate, a line for each loss, the chosen rate circled",
    "convergence": "Six metrics of neural collapse over the iterations, a line for each loss with a band for the seeds",
    "temperatures": "Accuracy of NormFace and NONL by temperature and batch size, as heat maps",
    "corruptions": "Error over the severity of each corruption, a line for each loss",
}


def write(results: Results, folder: Path = DOCS) -> list[Path]:
    """Write the page and its pictures; returns what was written."""
    path = folder / PAGE
    path.write_text(page(results), encoding="utf-8")
    return [path, *pictures.draw(results, folder)]


def page(results: Results) -> str:
    """The whole page in Markdown."""
    parts = [_head(results), _verdicts(results), _method(results), *_sections(results)]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs in lines of 120 characters; tables, code, headings and pictures as they are."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        block
        if block.startswith(("|", "`" * 3, "#", "!["))
        else textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)
        for block in blocks
    )


def _head(results: Results) -> str:
    file = f"benchmarks/results/{results.date or '...'}-experiments.json"
    return f"""# Results on glyphs

Which of the claims of [NCD], "Neural Collapse by Design", hold on {num_classes()} classes of letters and digits, for a
small network on a CPU. These are results on glyphs, and they say nothing of CIFAR or ImageNet, on which nothing was
trained here. All numbers are in [`{file}`](../{file}), from which a program writes this page, its verdicts too:

```
make experiments   # trains what is missing, then writes the page
python -m benchmarks experiments --write --report {file}
```"""


def _verdicts(results: Results) -> str:
    rows = [[c.source, c.statement, c.sentence(), f"**{c.verdict}**"] for c in claims(results)]
    words = "; ".join(f"**{word}**: {meaning}" for word, meaning in RULES.items())
    seeds = len(_seeds(results))
    return f"""## Verdicts

{tables.table(["in [NCD]", "claim", "here", "verdict"], rows, range(4))}

**The rule.** Two losses are compared seed by seed. Printed is the mean of the differences ± their standard deviation
over the seeds. A difference counts if the {100 * CONFIDENCE:g} % confidence interval of its mean (Student's t) leaves
out zero: with {seeds} seeds, if the mean is larger than {critical(seeds):.1f} standard deviations. That is strict: a
difference that does not count may still exist, {seeds} seeds do not show it. It makes no allowance for the number of
comparisons: of twenty differences that do not exist, one is expected to count. Times until something is reached, which
may be infinite, count if all seeds agree. EB4 is tested at the end of training, and asks whether the whole interval is
above -{MARGIN:g} point. A claim that is made of several comparisons gets one of these words: {words}.

EB1 does not count a value that the untrained network has already. For Table 7 (II) it counts, as in [NCD], and where
the first evaluation comes later than {100 * AT_ONCE:g} % of the iterations it stands for them."""


def _method(results: Results) -> str:
    recipe = recipes.load("glyphs/ce")
    options, train, test = recipe.data.options, len(glyphs.DEJAVU), len(glyphs.STIX)
    images = options["num_classes"] * options["train_views"] * train
    tested = options["num_classes"] * options["test_views"] * test
    size, sgd = options["image_size"], recipe.optimizer
    grid = sorted({run.lr for run in results.runs if run.stage == "tune"})
    seeds = ", ".join(map(str, _seeds(results)))
    versions = [f"{key} {value}" for key, value in results.versions.items()]
    versions += [f"matplotlib {results.matplotlib}"] if results.matplotlib else []
    hours = sum(run.seconds for run in results.runs if run.finished) / 3600
    stages = []
    for key, stage in STAGES.items():
        runs = [run for run in results.runs if run.stage == key]
        finished = sum(run.finished for run in runs)
        without = "; ".join(map(_told, (run for run in runs if not run.finished))) if finished else ""
        stages.append(
            [f"`{key}`: {stage.title}", f"{finished} of {len(runs)}", without if key != "tune" else "see below"]
        )
    each = ", ".join(f"{lr:g}" for lr in grid)
    return f"""## What was done

**Data.** {num_classes()} characters in {train} DejaVu faces, {images:,} images of {size} x {size} pixels; tested on
{tested:,} images in {test} STIX faces, on which nothing was trained or tuned.

**Network.** Convolutions of width {recipe.model.width} with a linear projection to {recipe.model.dim} signed features,
{recipe.schedule.epochs} epochs of batches of {recipe.run.batch_size}, SGD with momentum {sgd.momentum:g}, weight decay
{sgd.weight_decay:g} and a cosine schedule: `nckernels/train/recipes/glyphs.toml`.

**Tuning.** One grid of {len(grid)} learning rates for every loss ({each}), with one seed. The rate is chosen on the
serif faces, held out from the training faces. Then every loss is trained with its rate on all training faces with the
seeds {seeds or NOT_RUN}, and tested after the last step: no early stopping, no choice of a checkpoint. All other stages
have the same rates, `grid` and `ranks` times the batch size over {recipe.run.batch_size}.

**What is not equal.** SCL sees two further random views of every image, where the others see the images as they are,
and has an MLP as its projection. The temperature is {recipe.loss.temperature:g} for all losses that have one, which is
the best of NONL in [NCD] Table 9 and not of the others; CE learns its own scale. Nothing but the learning rate was
tuned for any of them.

{tables.table(["stage", "runs with a result", "diverged, or not run"], stages)}

Means and paired differences leave out the seeds without a result.

{hours:.1f} hours of training, added over the runs. {results.date or "No date"}, commit
{", ".join(results.commits) or "unknown"}; {", ".join(versions) or "versions unknown"}."""


def _told(run: Run) -> str:
    """Which one it is."""
    point = [f"{key.rpartition('.')[2]} {value}" for key, value in run.point.items()]
    return ", ".join([tables.name(run.row), *point, f"seed {run.seed}"])


def _sections(results: Results) -> list[str]:
    """One for each table and figure of [NCD]."""

    def section(title: str, present: object, body: str) -> str:
        return f"## {title}\n\n{body if present else ABSENT}"

    main = results.of("main")
    return [
        section("Learning rates", results.of("tune"), f"""{_picture("rates")}

{tables.rates(results)}"""),
        section("Accuracy: [NCD] Tables 1 and 2", main, f"""{tables.accuracies(results)}

{tables.contrastive(results)}

The last column is a ResNet-18 on photographs, for orientation only. LP and NLP train on features that are computed
once, without augmentation. DLP has fewer dimensions than classes, because in {dim("ce")} its points are the simplex of
ETF+DR, whose labellings are all alike."""),
        section("Collapse at the end: [NCD] Table 3", main, f"""{tables.collapse(results)}

Of the training set, after the last step; *[NCD]* is CIFAR-100. What each metric sees and does not see, and why the
printed optima of intra erank and MIR are not what they are taken for, is in
[neural-collapse.md](neural-collapse.md#metrics). The last three rows measure the same things by size. Prototypes of SCL
are its class means, those of ETF+DR and DLP are fixed, and so their weights erank says nothing about training. In
{dim("dlp")} dimensions DLP cannot reach the optima of the ranks."""),
        section("Speed: [NCD] Table 7 and Figure 2", main, f"""{tables.convergence(results, 1)}

{tables.convergence(results, 2)}

Medians over the seeds, smallest and largest in brackets where they differ. The first table has the share of its
iterations after which a run is, and stays, within 5 % of the metric's range of collapse. The second has the share of
CE's iterations after which it is, and stays, as near to collapse as CE of the same seed is in the end; in CE's own row,
after which CE stays within 5 % of the range of its final value. An evaluation comes every
{100 * first_evaluation(results):.1f} % of the iterations, and nothing is smoothed. 0 % means that the untrained network
was there already.

{_picture("convergence")}

Mean and standard deviation over the seeds, of the training set."""),
        section("Transfer: [NCD] Table 4", results.of("half"), f"""{tables.transfers(results)}

Trained on the first half of the classes. Then a linear classifier is trained on the frozen encoder's features (before
the projection) of the training faces of the other half, and tested on their unseen faces."""),
        section("Corruptions: [NCD] Table 5", any(run.corruptions for run in main), f"""{tables.corruptions(results)}

Means over five severities and over the seeds. The mCE is relative to CE's mean errors, 100 is as bad as CE. [NCD]
divides by AlexNet's errors on ImageNet-C; kinds and severities here are ours, made for images of this size
(`nckernels/train/corruptions.py`). SCL has trained on turned, shifted and zoomed images.

{_picture("corruptions")}"""),
        section("Long tails: [NCD] Table 6", results.of("longtail"), f"""{tables.long_tails(results)}

Accuracy on all classes alike, %. The imbalance is the size of the rarest class over that of the most frequent one.
*[NCD]* is CIFAR-100-LT."""),
        section("Temperature and batch size: [NCD] Figure 3", results.of("grid"), f"""{_picture("temperatures")}

{_temperatures(results)} One seed: small differences mean nothing. The learning rate grows with the batch, from the one
that was tuned at batches of {recipes.load("glyphs/nonl").run.batch_size} and temperature
{recipes.load("glyphs/nonl").loss.temperature:g}. All have the same epochs, so that large batches take fewer steps."""),
        section("One batch on several processes", results.of("ranks"), f"""{tables.ranks(results)}

NONL on {PROCESSES} processes (`loss.global_batch`), {STAGES["ranks"].title}. Both train with the same samples in the
same order; only what they are contrasted with differs. Group norm stands in for batch norm, whose statistics would be
each process's own. [NCD] App. G.4 asks for large batches, and its code contrasts each device's samples on their
own."""),
    ]  # fmt: skip


def _temperatures(results: Results) -> str:
    """What the heat maps show, in words."""
    sentences = []
    for row in STAGES["grid"].rows or ():
        runs = results.of("grid", row)
        if not runs:
            sentences.append(f"{NAMES[row]}: not run.")
            continue
        top = max(runs, key=accuracy)
        tau, size = top.point["loss.temperature"], top.point["run.batch_size"]
        same = sorted(map(accuracy, results.of("grid", row, loss__temperature=tau)))
        last = max(run.point["loss.temperature"] for run in runs)
        warm = sorted(map(accuracy, results.of("grid", row, loss__temperature=last)))
        sentences.append(
            f"{NAMES[row]} is best at temperature {tau:g} and batch size {size} ({accuracy(top):.1f} %). Over the "
            f"batch sizes that temperature gives {same[0]:.1f} to {same[-1]:.1f} %, "
            f"and {last:g} gives {warm[0]:.1f} to {warm[-1]:.1f} %."
        )
    return " ".join(sentences)


def _picture(key: str) -> str:
    return f"![{ALT[key]}]({pictures.path(Path(), key).name})"


def _seeds(results: Results) -> list[int]:
    return sorted({run.seed for run in results.of("main")}) or list(SEEDS)
