import pytest
import torch
from refit.helpers import random
from refit.test_regression import problem

from balf_fx.refit.regression import ridge
from balf_fx.refit.sums import Joint, JointSums, Shares, joint


def test_sums_of_batches_add_up():
    x, y, weights = problem(4, groups=2)
    whole = joint(x, y, weights)
    parts = Shares(joint(x[..., :20], y[..., :20], weights[:20]), joint(x[..., 20:], y[..., 20:], weights[20:])).whole
    for name in ("y", "yx"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    for name in ("x", "xx"):
        torch.testing.assert_close(getattr(whole.inputs, name), getattr(parts.inputs, name))
    assert whole.count == pytest.approx(parts.count)


def test_products_with_new_targets_need_no_new_products_of_inputs():
    x, y, weights = problem(6, groups=2)
    other = random(60, *y.shape)
    first, again = joint(x, y, weights), JointSums((2, 3), (2, 4), x.device, joint(x, y, weights).inputs)
    again.add(x, other, weights)
    expected = joint(x, other, weights)
    torch.testing.assert_close(again.joint().yx, expected.yx)
    torch.testing.assert_close(again.joint().y, expected.y)
    assert again.joint().inputs.xx.equal(first.inputs.xx)


def test_without_means_it_is_least_squares_without_a_bias_and_factors_are_taken_once():
    x, y, weights = problem(8)
    first = joint(x, y, weights)
    again = JointSums((1, 3), (1, 4), x.device, first.inputs)
    again.add(x, 2 * y, weights)
    fitted, _ = ridge(first.uncentred(), torch.zeros(1, 4, 3, dtype=torch.float64), 0.0)
    expected = torch.linalg.lstsq((x * weights.sqrt()).mT, (y * weights.sqrt()).mT).solution.mT
    torch.testing.assert_close(fitted, expected)
    factor = first.uncentred().inputs.factor(0.1)
    assert again.joint().uncentred().inputs.factor(0.1) is factor


def test_products_of_many_columns_are_whole():
    x, y = random(70, 1, 230, 40), random(71, 3, 5, 40)
    found = joint(x, y, None)
    torch.testing.assert_close(found.inputs.xx, x @ x.mT)
    torch.testing.assert_close(found.yx, y @ x.mT)
    torch.testing.assert_close(found.inputs.x, x.sum(-1))


def test_sums_stay_in_the_memory_in_which_they_are_accumulated_and_more_can_be_added():
    """Those of a convolution with 4,608 columns take 190 MB."""
    x, y = random(72, 2, 130, 40), random(73, 2, 5, 40)
    sums = JointSums((2, 130), (2, 5), x.device)
    sums.add(x[..., :25], y[..., :25], None)
    first = sums.joint()
    assert first.inputs.xx.untyped_storage().data_ptr() == first.yx.untyped_storage().data_ptr()
    sums.add(x[..., 25:], y[..., 25:], None)
    torch.testing.assert_close(sums.joint().inputs.xx, x @ x.mT)
    torch.testing.assert_close(sums.joint().yx, y @ x.mT)


def test_sums_of_other_targets_have_the_factors_of_the_first():
    x, y, weights = problem(9)
    train, held_out = joint(x, y, weights), joint(x + 1, y, weights)
    first = Shares(train, held_out)
    other = Shares(Joint(train.inputs, -y.sum(-1), -train.yx), held_out, first.whole.inputs)
    assert other.whole.inputs.factor(0.1) is first.whole.inputs.factor(0.1)
    torch.testing.assert_close(other.whole.yx, held_out.yx - train.yx)
    torch.testing.assert_close(first.whole.inputs.xx, train.inputs.xx + held_out.inputs.xx)


def test_values_far_from_zero_keep_their_covariance_in_single_precision():
    """Their means are 3,000 deviations; without a shift, the covariance is wrong by several times itself."""
    x = (random(74, 1, 6, 4000) + 3000 * random(75, 1, 6, 1).abs() + 3000).float()
    y = (random(76, 1, 3, 6) @ (x.double() - 3000) + random(77, 1, 3, 4000) - 5000).float()
    exact = joint(x.double(), y.double(), None)
    for known in (None, exact.inputs):
        sums = JointSums((1, 6), (1, 3), x.device, known)
        for chunk in range(4):
            own = slice(1000 * chunk, 1000 * chunk + 1000)
            sums.add(x[..., own], y[..., own], None)
        found = sums.joint()
        torch.testing.assert_close(found.inputs.covariance, exact.inputs.covariance, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.cross(), exact.cross(), rtol=1e-3, atol=1e-3)


def test_sums_over_some_of_the_known_inputs():
    """Those of one of several processes: the sums over known x are of all."""
    x, y = random(78, 2, 3, 40) + 5, random(79, 2, 4, 40) - 7
    known = joint(x, y, None).inputs
    parts = [JointSums((2, 3), (2, 4), x.device, known) for _ in range(2)]
    for sums, own in zip(parts, (slice(0, 25), slice(25, 40)), strict=True):
        sums.add(x[..., own], y[..., own], None)
        torch.testing.assert_close(sums.joint().yx, y[..., own] @ x[..., own].mT)
        torch.testing.assert_close(sums.joint().y, y[..., own].sum(-1))
