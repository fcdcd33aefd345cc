from dataclasses import replace

import pytest
import torch

from balf_fx.graph.curves import RankCurve, Spectrum
from balf_fx.graph.widths import WidthCurve


def spectrum(energies, fitted):
    energies, fitted = (torch.tensor(each, dtype=torch.float64) for each in (energies, fitted))
    return Spectrum(energies, torch.eye(energies.shape[1]).expand(len(energies), -1, -1), None, fitted=fitted)


WHOLE = spectrum([[5.0, 2.0, 1.0]], [[6.0, 1.0, 0.5]])
PARTS = spectrum([[3.0, 1.0], [2.0, 2.0]], [[3.0, 0.0], [2.0, 1.5]])
CURVE = RankCurve((), 8.0, 1, WHOLE, PARTS)


@pytest.mark.parametrize(
    ("rank", "more"),
    [
        (None, 0.0),
        (0, 0.5),  # 8 in place of 7.5
        (1, 1.5),
        (2, 0.5),
        ((1, None), 1.0),
        ((1, 1), 1.5),
        ((None, None), 0.0),
    ],
)
def test_optimism_is_what_other_samples_lose_beyond_those_that_chose(rank, more):
    assert CURVE.optimism(rank) == more / 8


def test_optimism_is_never_negative_and_none_without_other_samples():
    better = replace(WHOLE, fitted=2 * WHOLE.energies)
    assert replace(CURVE, spectrum=better).optimism(1) == 0
    assert replace(CURVE, spectrum=replace(WHOLE, fitted=None)).optimism(1) == 0
    assert replace(CURVE, parts=None).optimism((1, 1)) == 0
    assert replace(CURVE, strips=WHOLE).optimism(1) == 0
    assert replace(CURVE, energy=0.0).optimism(1) == 0


def test_a_spectrum_is_rescaled_with_what_was_fitted():
    twice = WHOLE.rescaled(lambda energies: 2 * energies)
    assert torch.equal(twice.energies, 2 * WHOLE.energies)
    assert torch.equal(twice.fitted, 2 * WHOLE.fitted)
    assert replace(WHOLE, fitted=None).rescaled(lambda energies: 2 * energies).fitted is None
    assert torch.equal(PARTS.only(1).fitted, PARTS.fitted[1:])


def test_optimism_of_a_width():
    curve = WidthCurve((8.0, 3.0, 1.0, 0.0), 1.0, fitted=(8.0, 1.0, 2.0, 0.0))
    assert [curve.optimism(size) for size in range(4)] == [0.0, 0.25, 0.0, 0.0]
    assert replace(curve, fitted=()).optimism(1) == 0.0
