from megatron_scalemoe.placement.gap import gap_to


def test_a_gap_is_a_share_of_the_bound_and_shows_a_bound_that_is_none():
    assert gap_to(2.0, 3.0) == 0.5
    assert gap_to(4.0, 3.0) == -0.25
    assert gap_to(0.0, 3.0) == gap_to(2e-9, 0.0) == 0.0
