"The grid of windows, the patches to learn from, the slices of a forgery."
import numpy as np
import pytest

from mits_nb.core import DetectError, UsageError
from mits_nb.detect.windows import cut_windows, grid_mask, grid_shape, touched_slices, training_centres, window_centres


def test_default_grid_has_12477_distinct_windows():
    centres = window_centres()
    assert centres.shape == (12477, 2) and len(np.unique(centres, axis=0)) == 12477
    assert grid_shape() == (121, 121) and grid_mask().sum() == 12477


@pytest.mark.parametrize("size, window, stride", [(512, 32, 4), (512, 32, 8), (256, 32, 4), (160, 32, 4), (33, 32, 1), (100, 16, 3), ((64, 120), 32, 4), ((121, 50), 32, 4)])
def test_every_window_lies_in_the_slice_and_its_centre_in_the_circle(size, window, stride):
    h, w = (size, size) if isinstance(size, int) else size
    centres = window_centres(size, window, stride)
    assert len(centres) == len(np.unique(centres, axis=0)) > 0
    corners = centres - window // 2
    assert corners.min() >= 0 and (corners + window <= (h, w)).all() and (corners % stride == 0).all()
    assert (((centres - (h / 2, w / 2)) ** 2).sum(1) <= (min(h, w) / 2) ** 2).all()


def test_grid_is_symmetric_where_the_stride_fits():
    mask = grid_mask()
    assert (mask == mask[::-1]).all() and (mask == mask[:, ::-1]).all() and (mask == mask.T).all()


@pytest.mark.parametrize("size", [31, (512, 20), 0])
def test_a_slice_smaller_than_a_window_is_an_error(size):
    with pytest.raises(DetectError, match="smaller than a window"): window_centres(size)


@pytest.mark.parametrize("window, stride", [(32, 0), (32, -4), (1, 4)])
def test_impossible_grids_are_errors(window, stride):
    with pytest.raises(UsageError): window_centres(512, window, stride)


def test_windows_are_cut_around_their_centres():
    hu = np.random.default_rng(0).integers(-1000, 1000, (70, 90), dtype=np.int16)
    centres = window_centres(hu.shape)
    cut = cut_windows(hu, centres)
    assert cut.dtype == np.int16 and cut.shape == (len(centres), 32, 32)
    for k in (0, len(centres) // 2, -1):
        y, x = centres[k]
        assert np.array_equal(cut[k], hu[y - 16:y + 16, x - 16:x + 16])
    cut[:] = 0 # a copy: the slice is not touched
    assert hu.any()


@pytest.mark.parametrize("at", [(15, 40), (40, 75), (60, 40)])
def test_a_window_that_leaves_the_slice_is_an_error(at):
    with pytest.raises(DetectError, match="leaves the slice"): cut_windows(np.zeros((70, 90)), [at])


def test_training_centres_follow_the_paper():
    assert sorted(map(tuple, training_centres((100, 200), True) - (100, 200))) == [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    negatives = training_centres((100, 200), False, seed=3)
    assert sorted(map(tuple, negatives[:10] - (100, 200))) == [(y, x) for y in (-2, -1) for x in range(-2, 3)]
    assert {tuple(c) for c in negatives[10:]} <= {tuple(c) for c in window_centres()} and len(negatives) == 25
    assert np.array_equal(negatives, training_centres((100, 200), False, seed=3))
    assert not np.array_equal(negatives, training_centres((100, 200), False, seed=4))


def test_training_windows_stay_inside_and_n_is_checked():
    for at in ((0, 0), (159, 159)):
        centres = training_centres(at, True, size=160)
        assert centres.min() >= 16 and centres.max() <= 144
    assert len(training_centres((80, 80), False, size=160, paired=0)) == 25
    with pytest.raises(UsageError): training_centres((80, 80), False, paired=26)
    with pytest.raises(DetectError): training_centres((8, 8), True, size=16)


@pytest.mark.parametrize("dz, n", [(0.625, 25), (1.0, 17), (2.5, 7), (5.0, 3), (20.0, 1)])
def test_touched_slices_count_in_millimetres(dz, n):
    touched = touched_slices(50, dz, 100)
    assert len(touched) == n and 50 in touched and touched[0] + touched[-1] == 100


def test_touched_slices_are_clipped_to_the_scan():
    assert list(touched_slices(0, 2.5, 3)) == [0, 1, 2] and list(touched_slices(0, 1.0, 1)) == [0]


def test_odd_windows_stay_inside_and_strides_leave_no_gap():
    centres = training_centres((99, 99), True, size=100, window=33)
    assert (centres + 17 <= 100).all() and (centres >= 16).all()
    with pytest.raises(UsageError, match="from 1 to the window"): grid_shape(100, 32, 34)
