"""ScaleMoE's Table II (PACT'25), paper and simulated side by side. Exits 3 if the order of the stages or the gap between the networks
does not come out as in the paper.

    python examples/scalemoe_paper/table2.py [--json] [-o FILE]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from checks import gap_comes_out, gap_limit, slowdown, stages_in_order
from paper import COLUMNS, PADDING_SHARE, STAGES, TABLE_II_S
from predict import FITTED_SC, Constants, predict_from, simulate

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, add_output_flags, emit, format_table
from megatron_scalemoe.errors import ScaleMoEError

USER_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(prog="table2.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and of the genetic algorithm (default 0)")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    try:
        constants, simulated_s_SC = predict_from(simulate(seed=args.seed), TABLE_II_S)
        result = as_json(constants, simulated_s_SC)
        emit(args, result, as_text(constants, simulated_s_SC))
    except ScaleMoEError as error:
        print(f"table2.py: error: {error}", file=sys.stderr)
        return USER_ERROR
    return OK if result["order_as_in_paper"] and result["gap_as_in_paper"] else CHECK_FAILED


def as_json(constants: Constants, simulated_s_SC: np.ndarray) -> dict:
    """`rows`, one per cell, the constants, and the two checks."""
    return {
        "rows": [
            {
                "stage": stage,
                "column": column,
                "paper_s": float(TABLE_II_S[s, c]),
                "simulated_s": float(simulated_s_SC[s, c]),
                "difference_s": float(simulated_s_SC[s, c] - TABLE_II_S[s, c]),
                "fitted": bool(FITTED_SC[s, c]),
            }
            for s, stage in enumerate(STAGES)
            for c, column in enumerate(COLUMNS)
        ],
        "non_communication_s": constants.non_communication_s,
        "capacity": constants.capacity,
        "padding_factor": constants.padding_factor,
        "us_per_remote_row": constants.us_per_remote_row,
        "order_as_in_paper": bool(stages_in_order(simulated_s_SC).all()),
        "gap_as_in_paper": gap_comes_out(simulated_s_SC, TABLE_II_S),
    }


def as_text(constants: Constants, simulated_s_SC: np.ndarray) -> str:
    """The table, what was fitted, and the two checks."""
    parts = [
        "Table II, seconds per iteration: paper, simulated, difference. * = fitted on the paper's cell; all others are predicted.",
        _cells(simulated_s_SC),
        _constants(constants),
        "Heterogeneous / homogeneous:",
        _slowdowns(simulated_s_SC),
        _verdict(simulated_s_SC),
    ]
    return "\n\n".join(parts)


def _cells(simulated_s_SC: np.ndarray) -> str:
    rows = []
    for s, stage in enumerate(STAGES):
        cells = []
        for paper_s, simulated_s, fitted in zip(TABLE_II_S[s], simulated_s_SC[s], FITTED_SC[s], strict=True):
            change = "     *" if fitted else f"{simulated_s / paper_s - 1:+6.0%}"
            cells.append(f"{paper_s:5.2f} {simulated_s:5.2f} {change}")
        rows.append([stage, *cells])
    return format_table(["", *COLUMNS], rows)


def _constants(constants: Constants) -> str:
    padding, low, high = 1 - 1 / constants.padding_factor, *PADDING_SHARE
    return (
        f"Published: {constants.non_communication_s:.2f} s without communication.\n"
        f"Fitted:    capacity {constants.capacity} rows per rank and expert: {constants.padding_factor:.1f} rows sent per row asked for, "
        f"{padding:.1%} padding (paper: {low:.0%} to {high:.0%}).\n"
        f"           {constants.us_per_remote_row:.1f} us per row that leaves its rank, once the exchange is ragged."
    )


def _slowdowns(simulated_s_SC: np.ndarray) -> str:
    paper_SM, simulated_SM = slowdown(TABLE_II_S), slowdown(simulated_s_SC)
    rows = [[stage, *(f"{x:.2f}x" for x in (*paper_SM[s], simulated_SM[s, 0]))] for s, stage in enumerate(STAGES)]
    return format_table(["", "paper BERT", "paper GPT", "simulated"], rows)


def _verdict(simulated_s_SC: np.ndarray) -> str:
    in_order, limit = stages_in_order(simulated_s_SC), gap_limit(TABLE_II_S)
    gap = "as in the paper" if gap_comes_out(simulated_s_SC, TABLE_II_S) else "NOT as in the paper"
    return (
        f"Order of the stages: as in the paper in {in_order.sum()} of {in_order.size} columns.\n"
        f"Gap between the networks: {gap} (the baseline above {limit:.2f}x, the later stages between 1 and {limit:.2f}x)."
    )


if __name__ == "__main__":
    sys.exit(main())
