from megatron_scalemoe.report.figures.cost import best_policy, dispatch_panel, policies_finding, policies_panel, solvers_panel
from tests.report import small_run
from tests.report.figures.svg import texts

ROWS = small_run.compare()["rows"]


def test_the_title_is_the_gain_of_the_best_on_the_first():
    panel = policies_panel(ROWS, "p")
    assert panel.title == "memetic takes 455 µs where contiguous takes 910 µs, 2.00x as fast; 13.8% above the lower bound"
    assert {"contiguous", "910 µs", "728 µs, 1.25x", "455 µs, 2.00x", "dispatch", "compute"} <= set(texts(panel.svg))


def test_parts_that_no_policy_has_are_left_out():
    panel = policies_panel(ROWS, "p")
    assert "replicas" not in texts(panel.svg)
    assert "replicas" not in panel.table.headers
    with_replicas = policies_panel([*ROWS, {**ROWS[0], "policy": "r", "replica_us": 90.0}], "p")
    assert "replicas" in texts(with_replicas.svg)
    assert with_replicas.table.rows[-1][with_replicas.table.headers.index("replicas")] == "90.0 µs"


def test_numbers_that_a_policy_lacks_are_dashes():
    table = policies_panel(ROWS, "p").table
    assert table.rows[0][table.headers.index("gap")] == "–"
    assert table.rows[2][table.headers.index("gap")] == "13.8%"


def test_a_baseline_that_no_one_beats_is_named():
    assert policies_finding(ROWS[:1]) == "contiguous takes 910 µs for the MoE layers of a micro-batch"
    assert policies_finding([ROWS[2], ROWS[0]]).endswith("; no other policy is faster")
    assert best_policy([ROWS[0], {**ROWS[0], "policy": "equal"}])["policy"] == "contiguous"


def test_a_step_without_time_is_no_division():
    zero = {**dict.fromkeys(ROWS[0], 0.0), "policy": "nothing"}
    assert policies_panel([ROWS[0], zero], "p").title == "nothing takes 0 µs where contiguous takes 910 µs"
    assert policies_panel([zero, zero], "p").svg


def test_overlap_is_explained_where_there_is_any():
    assert "hides behind compute" not in policies_panel(ROWS, "p").note
    assert "hides behind compute" in policies_panel([{**ROWS[0], "step_us": 700.0}], "p").note


def test_of_many_policies_the_first_are_drawn_and_all_are_listed():
    panel = policies_panel([{**ROWS[0], "policy": f"p{i}"} for i in range(60)], "p")
    assert "The first 24 of 60 policies are drawn." in panel.note
    assert len(panel.table.rows) == 60


def test_dispatchers_are_told_against_stock():
    panel = dispatch_panel(small_run.bench_dispatch()["rows"], "b.json", 0)
    assert panel.title == "scalemoe takes 0.60x the time of alltoall and sends 0.75x its bytes"
    assert {"20.00 ms", "12.00 ms, 0.60x"} <= set(texts(panel.svg))
    assert panel.table.rows[1][:4] == ["scalemoe", "12.00", "13.00", "0.60"]


def test_a_stock_dispatcher_that_no_one_beats_is_named():
    rows = [
        {"dispatcher": "alltoall", "median_ms": 1.0, "ratio_to_stock": 1.0},
        {"dispatcher": "x", "median_ms": 2.0, "ratio_to_stock": 2.0},
    ]
    assert dispatch_panel(rows, "b.json", 0).title == "No dispatcher is faster than alltoall"


def test_solvers_are_means_over_their_runs():
    panel = solvers_panel(small_run.bench_solvers()["rows"], "s.json", 0)
    assert panel.title == "memetic finds the cheapest placements, 50% below contiguous, in 0.5 s"
    assert panel.table.rows[1] == ["memetic", "2", "550 µs", "14.58%", "25.00%", "0.50"]
    assert "lower bound" in texts(panel.svg)
