import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.stores.split import validation_mask


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]))
def test_both_sides_get_text_where_that_is_possible(lengths, fraction):
    lengths = np.array(lengths, dtype=np.int64)
    mask = validation_mask(lengths, fraction)
    used = mask[lengths > 0]
    if fraction == 0 or len(used) < 2:
        assert not mask.any()
    else:
        assert used.any()
        assert not used.all()


def test_share_and_stability_when_documents_are_appended():
    few, many = (validation_mask(np.ones(n, dtype=np.int64), 0.05) for n in (20_000, 30_000))
    np.testing.assert_array_equal(few, many[:20_000])
    assert 0.045 < many.mean() < 0.055
