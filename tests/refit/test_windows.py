import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.refit.windows import chunks, pixel_grid, pixel_steps


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 2000), st.integers(1, 600))
def test_a_quarter_of_all_samples_is_held_out(batches, positions, features):
    shares, seen = [0, 0], 0
    for samples in batches:
        covered = torch.zeros(samples)
        for share, own in chunks(seen, samples, positions, features):
            covered[own] += 1
            shares[share] += own.stop - own.start
        assert (covered == 1).all()
        seen += samples
        assert shares[1] == seen // 4


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=3))
def test_grids_of_pixels_take_turns_until_each_has_been_read(axes):
    sizes, steps = zip(*axes, strict=True)
    seen = torch.zeros(sizes)
    for turn in range(math.prod(steps)):
        window = pixel_grid(sizes, steps, turn)
        assert seen[window].numel() > 0
        seen[window] += 1
    small = any(size < step for size, step in axes)
    assert (seen == 1).all() or (small and (seen >= 1).all())


@given(
    samples=st.integers(1, 5000),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3).map(tuple),
    inputs=st.integers(0, 900),
)
def test_enough_positions_are_read_and_not_many_more(samples, sizes, inputs):
    steps = pixel_steps(samples, sizes, inputs)
    enough = 300 * max(inputs, 32)
    positions = samples * math.prod(size / step for size, step in zip(sizes, steps, strict=True))
    assert max(steps) == 1 or positions >= enough * (1 - 1e-9)
    assert max(steps) - min(steps) <= 1
    least = min(steps)
    assert positions * least / (least + 1) < enough * (1 + 1e-9)  # no axis can be read more coarsely
