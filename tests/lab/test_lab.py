"""The lab: every experiment agrees, draws its picture, and notices a closed form that is wrong."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import nckernels
from nckernels import ufm
from nckernels.__main__ import main as command
from nckernels.geometry.dlp import dlp_table7
from nckernels.lab import bias, cli, collapse, encodings, errata, prototypes, relu, supcon
from nckernels.lab.report import Check, Result, table

SMALL = {
    "collapse": lambda **options: collapse.run(sizes=((3, 2), (4, 5)), **options),
    "bias": lambda **options: bias.run(multiples=(0.1, 0.9, 1.7, 50.0), **options),
    "encodings": encodings.run,
    "relu": lambda **options: relu.run(losses=("nonl",), classes=(3, 4), **options),
    "supcon": lambda **options: supcon.run(sizes=((3, 3),), **options),
    "prototypes": lambda **options: prototypes.run(dims=(20, 10), num_classes=20, **options),
    "errata": errata.run,
}


def test_every_experiment_has_small_settings_here():
    assert list(SMALL) == list(cli.EXPERIMENTS)


@pytest.mark.parametrize("name", SMALL)
def test_experiments_agree_and_draw(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setitem(cli.EXPERIMENTS, name, SMALL[name])
    assert command(["lab", name, "--quiet", "--out", str(tmp_path / "new"), "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "\nagrees\n" in text
    assert "DIFFERS" not in text
    picture = (tmp_path / "new" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def wrong_minimum(*args, **kwargs):
    return ufm.minimum(*args, **kwargs) - 1e-6


def test_a_wrong_closed_form_differs(monkeypatch, tmp_path, capsys):
    """An experiment with a wrong closed form or measurement reports a difference."""

    def solve(*args, **kwargs):
        return dataclasses.replace(ufm.solve(*args, **kwargs), minimum=wrong_minimum(*args[:2], *args[3:5]))

    def recipe_for_ours(*args, **kwargs):
        return [dataclasses.replace(row, ours=row.recipe) for row in dlp_table7(*args, **kwargs)]

    optimum = relu.optimum
    monkeypatch.setattr(collapse, "solve", solve)
    monkeypatch.setattr(supcon, "minimum", wrong_minimum)
    monkeypatch.setattr(bias, "expected_shift", lambda lambda_b, c: min(1.0, c / lambda_b))
    monkeypatch.setattr(relu, "optimum", lambda k, features: optimum(k))
    monkeypatch.setattr(encodings, "self_duality", lambda weight, means: 0.0)
    monkeypatch.setattr(errata, "optimum", lambda k: dataclasses.replace(optimum(k), mir=1.0))
    monkeypatch.setattr(errata, "dlp_recipe", lambda start, **_: start)  # spares its 1000 steps
    monkeypatch.setattr(prototypes, "dlp_table7", recipe_for_ours)
    for name, run in SMALL.items():
        result = run()
        assert not result.agrees, name
        assert "DIFFERS" in table(result)
    monkeypatch.setitem(cli.EXPERIMENTS, "bias", SMALL["bias"])
    assert command(["lab", "bias", "--quiet", "--out", str(tmp_path)]) == 1
    assert "differs: " in capsys.readouterr().out


def test_the_scatter_has_the_size_that_its_label_says():
    erratum = errata.rank_of_vanishing_scatter(seed=0, num_classes=10)
    assert "features 1e-6 from collapse" in erratum.checks[0].what
    assert "Features about 1e-06 from their means" in erratum.found


def test_the_gradient_of_dot_regression_is_longest_elsewhere_than_at_a_right_angle():
    """The documentation says only that it is not 0 there."""
    lengths = {}
    for s in (-0.5, 0.0):
        x = torch.tensor([[s, math.sqrt(1 - s * s)]], dtype=torch.float64, requires_grad=True)
        w = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        nckernels.dot_regression_loss(x, w, torch.zeros(1, dtype=torch.int64)).backward()
        lengths[s] = float(x.grad.norm())
    assert lengths == pytest.approx({-0.5: 0.75 * math.sqrt(3), 0.0: 1.0})


def test_all_runs_all_and_names_what_differs(monkeypatch, tmp_path, capsys):
    def experiment(measured):
        return lambda *, seed, progress: Result(
            "", [Check("x", measured, 1.0)], lambda path: path.write_text("picture")
        )

    for index, name in enumerate(cli.EXPERIMENTS):
        monkeypatch.setitem(cli.EXPERIMENTS, name, experiment(1.5 if index == 1 else 1.0))
    assert command(["lab", "all", "--quiet", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 7 experiments agree; not bias"
    assert len(list(tmp_path.iterdir())) == 7


def test_check_compares_measured_with_closed_form():
    assert Check("", 1.0, 1.1, 0.2).agrees
    assert not Check("", 1.0, 1.1, 0.05).agrees
    assert not Check("", math.nan, 1.0, math.inf).agrees
    assert Check("", 2.0, 1.0, relation=">").agrees
    assert not Check("", 2.0, 1.0, relation="<").agrees
    assert not Check("", math.nan, 1.0, relation="<").agrees
    text = table(Result("Claim.", [Check("a", 1.0, 2.0, printed="3"), Check("b", 1.0, 2.0, relation="<")], print))
    assert text.splitlines()[0] == "Claim."
    assert "printed" in text
    assert "at most 2" in text
    assert text.endswith("differs: 1 of 2 beyond what is allowed")


def test_unknown_experiment(capsys):
    with pytest.raises(SystemExit, match="2"):
        command(["lab", "everything"])
    assert "invalid choice" in capsys.readouterr().err
