import numpy as np

from megatron_scalemoe.traffic.rounding import whole_tokens


def test_totals_are_kept_where_cells_are_rounded():
    rng = np.random.default_rng(0)
    for _ in range(100):
        mean_GE = rng.random((2, rng.integers(1, 9), rng.integers(1, 33))) * rng.choice([0.1, 1, 50])
        error_GE = whole_tokens(mean_GE) - mean_GE
        assert np.abs(error_GE).max() < 1
        assert np.abs(error_GE.sum(-2)).max() < 1
        assert np.abs(error_GE.sum((-2, -1))).max() <= 0.5


def test_whole_numbers_stay_and_halves_go_to_all_ranks():
    whole_GE = np.random.default_rng(0).integers(0, 9, (4, 8))
    assert (whole_tokens(whole_GE.astype(float)) == whole_GE).all()
    assert whole_tokens(np.full((4, 64), 0.5)).sum(axis=1).tolist() == [32, 32, 32, 32]
