"""examples/scalemoe_paper: the table comes out as the paper's, from two fitted cells; and its parts against hand calculation."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "scalemoe_paper"
sys.path.insert(0, str(EXAMPLE))
# The example's files import each other as scripts do.
alternatives, checks, network, paper, predict, remap, table2, workload = (
    importlib.import_module(name) for name in ("alternatives", "checks", "network", "paper", "predict", "remap", "table2", "workload")
)
TABLE = paper.TABLE_II_S
ROW_BYTES = 768 * 4
LATENCY_S = 48 * 20e-6


@pytest.fixture(scope="module")
def simulated():
    return predict.simulate()


@pytest.fixture(scope="module")
def networks():
    return [network.load_network(name) for name in network.NETWORKS]


@pytest.fixture(scope="module")
def clustered():
    return workload.after_clustering(0.3885, seed=0)


def run_script(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE / name), *flags], capture_output=True, text=True, timeout=120, check=False)


def test_the_order_and_the_gap_come_out_with_another_seed():
    _, seconds_SC = predict.predict_from(predict.simulate(seed=1), TABLE)
    assert checks.stages_in_order(seconds_SC).all()
    assert checks.gap_comes_out(seconds_SC, TABLE)


def test_the_two_fitted_cells_are_reproduced(simulated):
    constants, seconds_SC = predict.predict_from(simulated, TABLE)
    half_a_row_s = (simulated.padded_s_W2 - simulated.padded_s_W1)[0] / 2
    assert abs(seconds_SC[0, 0] - 10.60) <= half_a_row_s
    assert seconds_SC[1, 0] == pytest.approx(8.64, abs=1e-9)
    assert predict.FITTED_SC.sum() == 2
    assert paper.PADDING_SHARE[0] < 1 - 1 / constants.padding_factor < paper.PADDING_SHARE[1]


def test_no_prediction_depends_on_a_cell_that_is_predicted(simulated):
    other_SC = np.where(predict.FITTED_SC, TABLE, TABLE * np.random.default_rng(0).uniform(0.5, 2, TABLE.shape))
    constants, seconds_SC = predict.predict_from(simulated, TABLE)
    same_constants, same_SC = predict.predict_from(simulated, other_SC)
    assert same_constants == constants
    np.testing.assert_array_equal(same_SC, seconds_SC)
    changed_SC = np.where(predict.FITTED_SC, TABLE + 0.5, TABLE)
    assert (predict.predict_from(simulated, changed_SC)[1] != seconds_SC).all()


def test_the_paper_itself_passes_both_checks_and_broken_tables_do_not():
    assert checks.stages_in_order(TABLE).all()
    assert checks.gap_comes_out(TABLE, TABLE)
    assert checks.stages_in_order(TABLE[[0, 1, 3, 2]]).tolist() == [False] * 4
    equal_SC = TABLE.copy()
    equal_SC[2, 1] = equal_SC[1, 1]
    assert checks.stages_in_order(equal_SC).tolist() == [True, False, True, True]
    for stage, factor in ((0, 0.7), (1, 1.5), (3, 0.8)):
        broken_SC = TABLE.copy()
        broken_SC[stage, 2] *= factor
        assert not checks.gap_comes_out(broken_SC, TABLE)


@pytest.mark.parametrize(("which", "slowest_GBps"), [(0, 12.5), (1, 6.25)])
def test_padded_exchanges_take_the_time_of_their_bytes_over_the_slowest_node(networks, which, slowest_GBps):
    capacity = 1000
    block_bytes = 2 * capacity * ROW_BYTES  # from one rank to another: two experts there
    inside_s = 7 * 4 * block_bytes / 300e9  # to each of 7 neighbours: what goes to their place in 4 nodes
    between_s = 8 * 24 * block_bytes / (slowest_GBps * 1e9)
    expected_s = 48 * (inside_s + between_s)
    assert expected_s < network.padded_s(capacity, networks[which]) < expected_s + 2 * LATENCY_S


@pytest.mark.parametrize("which", [0, 1])
def test_ragged_exchanges_take_the_time_of_the_busiest_node(networks, clustered, which):
    node_GBps = [12.5, 12.5, 12.5, 12.5 if which == 0 else 6.25]
    expected_s = 0.0
    for layer, counts_GE in enumerate(clustered.trace.counts[0]):
        rows_NN = np.zeros((4, 4))
        for (rank, expert), tokens in np.ndenumerate(counts_GE):
            rows_NN[rank // 8, clustered.home_rank_LE[layer, expert] // 8] += tokens
        np.fill_diagonal(rows_NN, 0)
        busiest = max(max(rows_NN[n].sum(), rows_NN[:, n].sum()) / node_GBps[n] for n in range(4))
        expected_s += 4 * busiest * ROW_BYTES / 1e9
    assert expected_s < network.ragged_s(clustered, networks[which]) < expected_s + LATENCY_S


def test_the_workloads_have_the_published_skew_and_locality(clustered):
    before = workload.before_clustering(seed=0)
    load_LE = before.trace.counts[0].sum(axis=1) / before.trace.counts[0].sum(axis=(1, 2))[:, None]
    top_first_LE = -np.sort(-load_LE, axis=1)
    assert top_first_LE[:, 0].mean() == pytest.approx(paper.TOP_EXPERT_SHARE, abs=0.015)
    assert top_first_LE[:, :5].sum(axis=1).mean() == pytest.approx(paper.TOP_FIVE_SHARE, abs=0.04)
    assert before.local_share == pytest.approx(paper.LOCAL_SHARE_BY_REPLICAS[0], abs=0.003)
    assert clustered.local_share == pytest.approx(paper.LOCAL_SHARE_BY_REPLICAS[15], abs=0.001)


@pytest.mark.parametrize("which", [0, 1])
def test_remapping_moves_whole_clusters_to_where_the_nodes_are_less_busy(networks, clustered, which):
    remapped = remap.remap(clustered, networks[which], seed=0)
    assert remapped.local_share == clustered.local_share
    rows = remap.rows_between_clusters
    np.testing.assert_array_equal(np.sort(rows(remapped), axis=None), np.sort(rows(clustered), axis=None))
    rng = np.random.default_rng(0)
    random_orders = [remap.busiest_ports(rows(clustered), rng.permutation(32), networks[which]) for _ in range(100)]
    assert remap.busiest_ports(rows(remapped), np.arange(32), networks[which]) < min(random_orders)
    assert network.ragged_s(remapped, networks[which]) < network.ragged_s(clustered, networks[which])


def test_the_readme_shows_what_the_commands_print():
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for script in ("table2.py", "alternatives.py"):
        result = run_script(script)
        assert result.returncode == 0, result.stderr
        assert result.stdout in readme


def test_a_wrong_order_or_gap_exits_3_and_says_so(monkeypatch, capsys, simulated):
    clustering_slower = dataclasses.replace(simulated, remote_rows_R=simulated.remote_rows_R[[0, 2, 0]])
    monkeypatch.setattr(table2, "simulate", lambda seed: clustering_slower)
    assert table2.main([]) == 3
    assert "as in the paper in 0 of 4 columns" in capsys.readouterr().out
    same_network = dataclasses.replace(simulated, padded_s_W2=simulated.padded_s_W2[[0, 0]], padded_s_W1=simulated.padded_s_W1[[0, 0]])
    monkeypatch.setattr(table2, "simulate", lambda seed: same_network)
    assert table2.main([]) == 3
    assert "NOT as in the paper" in capsys.readouterr().out


def test_bad_input_is_an_error_with_exit_code_1(tmp_path, capsys):
    there = tmp_path / "there.json"
    there.write_text("precious")
    assert table2.main(["-o", str(there)]) == 1
    assert there.read_text() == "precious"
    assert table2.main(["--seed", "-1"]) == 1
    assert "must be 0 or more" in capsys.readouterr().err
