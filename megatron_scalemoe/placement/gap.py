"""How far a cost is above a lower bound."""

# A layer without tokens has a bound of about 1e-9 us.
_NOTHING_US = 1e-6


def gap_to(lower_bound_us: float, cost_us: float) -> float:
    """How far a cost is above a lower bound, as a share of the bound; 0 where there is next to nothing to do.

    With few tokens it may be a little below 0: the cost is of mean counts made whole, the bound of the means themselves.
    """
    return cost_us / lower_bound_us - 1 if lower_bound_us > _NOTHING_US else 0.0
