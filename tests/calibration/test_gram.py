import torch
from hypothesis import example, given
from hypothesis import strategies as st
from refit.helpers import PROPERTY, seeds

from balf_fx.calibration.gram import add_lower, gram, mirror

sizes = st.sampled_from([0, 1, 3, 63, 64, 65, 130])


def rows_of(seed, groups, size, count, dtype=torch.float64):
    return torch.randn(groups, size, count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@PROPERTY
@given(seeds, st.integers(1, 3), sizes, st.integers(0, 4), st.sampled_from([torch.float32, torch.float64]))
@example(0, 1, 2050, 2, torch.float64)  # blocks of more columns
def test_a_gram_matrix_is_the_product_of_rows_with_themselves(seed, groups, size, count, dtype):
    rows = rows_of(seed, groups, size, count, dtype)
    found = gram(rows)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, (rows @ rows.mT).double())


@PROPERTY
@given(seeds, sizes, st.integers(0, 3))
def test_products_with_further_rows_are_added_to_a_total(seed, size, further):
    first, second = (rows_of(seed + each, 2, size + further, 5) for each in range(2))
    total = torch.zeros(2, size + further, size, dtype=torch.float64)
    add_lower(total, first)
    add_lower(total, second)
    expected = first @ first[:, :size].mT + second @ second[:, :size].mT
    torch.testing.assert_close(total[:, size:], expected[:, size:])
    torch.testing.assert_close(mirror(total[:, :size]), expected[:, :size])
