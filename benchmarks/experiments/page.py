"""Writes docs/results.md from the results of the experiments."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path

from nckernels.train import recipes
from nckernels.train.data import glyphs

from . import pictures, tables
from .claims import AT_ONCE, MARGIN, claims
from .collect import Results, Run
from .measured import NAMES, dim, first_evaluation, num_classes
from .paired import CONFIDENCE, accuracy, critical
from .stages import SEEDS, STAGES
from .verdicts import NOT_RUN, RULES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "results.md"
ABSENT = "Not run."
ALT = {
    "rates": "Accuracy on the held-out faces by learning rate, one line per loss, the chosen learning rate circled",
    "convergence": "Six metrics of neural collapse over the iterations, one line per loss with a band for the seeds",
    "temperatures": "Accuracy of NormFace and NONL by temperature and batch size, as heat maps",
    "corruptions": "Error by severity for each corruption, one line per loss",
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
    """The text with its paragraphs wrapped at 120 characters; tables, code, headings and pictures are left alone."""
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

This page is for anyone who wonders whether the claims of [NCD], "Neural Collapse by Design", hold outside of the
paper. It tests them on {num_classes()} classes of letters and digits (glyphs), with a small network on a CPU, and gives
a verdict on each.

{_summary(results)}

These results are about glyphs only: nothing was trained on CIFAR or ImageNet. All numbers are in
[`{file}`](../{file}). A program writes this page from them, the verdicts included:

```
make experiments   # trains what is missing, then writes the page
python -m benchmarks experiments --write --report {file}
```"""


def _summary(results: Results) -> str:
    """How many claims got each verdict."""
    verdicts = Counter(claim.verdict for claim in claims(results))
    found = "; ".join(f"**{word}**: {verdicts[word]}" for word in (*RULES, NOT_RUN) if verdicts[word])
    return f"Verdicts on {verdicts.total()} claims: {found}."


def _verdicts(results: Results) -> str:
    rows = [[c.source, c.statement, c.sentence(), f"**{c.verdict}**"] for c in claims(results)]
    words = "; ".join(f"**{word}**: {meaning}" for word, meaning in RULES.items())
    seeds = len(_seeds(results))
    return f"""## Verdicts

{tables.table(["in [NCD]", "claim", "here", "verdict"], rows, range(4))}

**The rule.** Losses are compared seed by seed. The table shows the mean of the differences ± their standard deviation
over the seeds. A difference counts if the {100 * CONFIDENCE:g} % confidence interval of its mean (Student's t) excludes
zero: with {seeds} seeds, if the mean is larger than {critical(seeds):.1f} standard deviations. This rule is strict: a
difference that does not count may still exist, but {seeds} seeds do not show it. It is not corrected for the number of
comparisons: of twenty differences that do not exist, one is expected to count. The time until something is reached can
be infinite, so that it has no mean; such a comparison counts if all seeds agree. EB4 is tested at the end of training,
and holds if the whole interval is above -{MARGIN:g} point.

**The verdict** on a claim with several comparisons is one of: {words}.

**Values at the start.** EB1 does not count a value that the untrained network already has. Table 7 (II) counts it, as
[NCD] does. If the first evaluation comes later than {100 * AT_ONCE:g} % of the iterations, Table 7 (II) uses that
evaluation instead."""


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

**Data.** {num_classes()} characters in {train} DejaVu faces, {images:,} training images of {size} x {size} pixels. The
test set has {tested:,} images in {test} STIX faces, which were used neither for training nor for tuning.

**Network and training.** Convolutions of width {recipe.model.width} with a linear projection to {recipe.model.dim}
signed features; {recipe.schedule.epochs} epochs with batches of {recipe.run.batch_size}; SGD with momentum
{sgd.momentum:g}, weight decay {sgd.weight_decay:g} and a cosine schedule. The recipe is
`nckernels/train/recipes/glyphs.toml`.

**Tuning.** Only the learning rate was tuned, for each loss on one grid of {len(grid)} values ({each}), with one seed
and by the accuracy on the serif faces, held out from the training faces. Then each loss was trained with its learning
rate on all training faces with the seeds {seeds or NOT_RUN}, and tested after the last step: no early stopping, no
choice of a checkpoint. All other stages use the same learning rates; `grid` and `ranks` scale them by the batch size
over {recipe.run.batch_size}.

**Differences between the losses.** SCL sees two random views of every image and has an MLP as its projection; the
others see the images without augmentation. The temperature is {recipe.loss.temperature:g} for all losses that have one.
In [NCD] Table 9 this is the best value for NONL, but not for the others. CE learns its own scale.

{tables.table(["stage", "runs with a result", "diverged or not run"], stages)}

Means and paired differences leave out the seeds without a result.

The runs took {hours:.1f} hours of training in total. {results.date or "No date"}, commit
{", ".join(results.commits) or "unknown"}; {", ".join(versions) or "versions unknown"}."""


def _told(run: Run) -> str:
    """A run by its name, what its grid sets, and its seed."""
    point = [f"{key.rpartition('.')[2]} {value}" for key, value in run.point.items()]
    return ", ".join([tables.name(run.row), *point, f"seed {run.seed}"])


def _sections(results: Results) -> list[str]:
    """One section for each table and figure of [NCD]."""

    def section(title: str, present: object, body: str) -> str:
        return f"## {title}\n\n{body if present else ABSENT}"

    main = results.of("main")
    return [
        section("Learning rates", results.of("tune"), f"""{_picture("rates")}

{tables.rates(results)}"""),
        section("Accuracy: [NCD] Tables 1 and 2", main, f"""{tables.accuracies(results)}

{tables.contrastive(results)}

The last column is for orientation only: it is a ResNet-18 on photographs. LP and NLP are trained on features that are
computed once, without augmentation. DLP gets fewer dimensions than classes, because in {dim("ce")} dimensions its
points would be the simplex of ETF+DR, for which every assignment to classes is equivalent."""),
        section("Collapse at the end: [NCD] Table 3", main, f"""{tables.collapse(results)}

Measured on the training set after the last step. *[NCD]* is CIFAR-100. [neural-collapse.md](neural-collapse.md#metrics)
explains what each metric measures and misses, and why the optima of intra erank and MIR that [NCD] prints are wrong.
The last three rows measure sizes instead of ranks and entropies. The prototypes of SCL are its class means, and those
of ETF+DR and DLP are fixed, so their weights erank says nothing about training. In {dim("dlp")} dimensions DLP cannot
reach the optima of the ranks."""),
        section("Speed: [NCD] Table 7 and Figure 2", main, f"""{tables.convergence(results, 1)}

{tables.convergence(results, 2)}

The numbers are medians over the seeds, with the smallest and the largest in brackets if they differ. The first table
has the share of a run's iterations after which the metric comes within 5 % of its range of collapse, and stays there.
The second has the share of CE's iterations after which the metric becomes as close to collapse as the final value of CE
with the same seed, and stays so. CE's own row shows when CE comes within 5 % of the range of its final value, and
stays. The runs are evaluated every {100 * first_evaluation(results):.1f} % of the iterations, and nothing is smoothed.
0 % means that the untrained network already had the value.

{_picture("convergence")}

The curves are means over the seeds, measured on the training set; the bands are one standard deviation."""),
        section("Transfer: [NCD] Table 4", results.of("half"), f"""{tables.transfers(results)}

The network is trained on the first half of the classes. Then a linear classifier is trained on the frozen encoder's
features (before the projection) of the other half, on the training faces, and tested on the unseen faces."""),
        section("Corruptions: [NCD] Table 5", any(run.corruptions for run in main), f"""{tables.corruptions(results)}

The errors are means over five severities and over the seeds. The mCE is relative to CE's mean errors: 100 is as bad as
CE. [NCD] divides by AlexNet's errors on ImageNet-C. Kinds and severities here are our own, made for images of this size
(`nckernels/train/corruptions.py`). SCL was trained on rotated, shifted and zoomed images.

{_picture("corruptions")}"""),
        section("Long tails: [NCD] Table 6", results.of("longtail"), f"""{tables.long_tails(results)}

The table shows the accuracy on a balanced test set, in %. The imbalance is the size of the rarest class divided by that
of the most frequent one. *[NCD]* is CIFAR-100-LT."""),
        section("Temperature and batch size: [NCD] Figure 3", results.of("grid"), f"""{_picture("temperatures")}

{_temperatures(results)} There is one seed, so small differences mean nothing. The learning rate is proportional to the
batch size; it was tuned at batches of {recipes.load("glyphs/nonl").run.batch_size} and temperature
{recipes.load("glyphs/nonl").loss.temperature:g}. All runs have the same number of epochs, so large batches take fewer
steps."""),
        section("One batch on several processes", results.of("ranks"), f"""{tables.ranks(results)}

NONL with {STAGES["ranks"].title} (`loss.global_batch`). Both variants train with the same samples
in the same order and differ only in the negatives. Group norm replaces batch norm, whose statistics would be those of
each process. [NCD] App. G.4 asks for large batches, but its code contrasts each device's own samples only."""),
    ]  # fmt: skip


def _temperatures(results: Results) -> str:
    """The best cell of each heat map, and the ranges beside it, in words."""
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
            f"batch sizes, this temperature gives {same[0]:.1f} to {same[-1]:.1f} %, "
            f"and {last:g} gives {warm[0]:.1f} to {warm[-1]:.1f} %."
        )
    return " ".join(sentences)


def _picture(key: str) -> str:
    return f"![{ALT[key]}]({pictures.path(Path(), key).name})"


def _seeds(results: Results) -> list[int]:
    return sorted({run.seed for run in results.of("main")}) or list(SEEDS)
