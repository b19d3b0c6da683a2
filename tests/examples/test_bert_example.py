"""BERT-MoE, as examples/bert_moe trains it: the loss of stock Megatron, whatever of ours is on."""

import pytest

from tests.rank_pool import pool

ITERATIONS, SAVED = 30, 15
LIVE = "--scalemoe-replicas 2 --scalemoe-replan-interval 10 --scalemoe-migrate --scalemoe-sequence-placement affinity"


def on_ranks(ranks: int, name: str, *args) -> list:
    return pool(ranks).run(_call, name, args)


def _call(name: str, args: tuple):
    from tests.examples import example_case

    return getattr(example_case, name)(*args)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Losses of all iterations, and a checkpoint directory after the first `SAVED`."""
    saved = tmp_path_factory.mktemp("bert") / "checkpoints"
    flags = ["--expert-model-parallel-size", "2"]
    losses = on_ranks(2, "bert_losses", flags, 1, SAVED, None, saved)[0]
    return losses + on_ranks(2, "bert_losses", flags, SAVED + 1, ITERATIONS, saved)[0], saved


def difference(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize("ours", ["--scalemoe-dispatch ragged", LIVE])
def test_the_loss_is_stock_megatrons(stock, ours):
    flags = ["--expert-model-parallel-size", "2", "--moe-dispatcher", "scalemoe", *ours.split()]
    losses = on_ranks(2, "bert_losses", flags, 1, ITERATIONS)[0]
    assert losses[-1] < losses[0] - 0.5, "the model does not learn"
    assert difference(losses, stock[0]) <= 1e-4


def test_stocks_checkpoint_is_resumed_with_ours_and_ours_with_stock(stock, tmp_path):
    expected, saved = stock
    both = ["--expert-model-parallel-size", "2"]
    ours = [*both, "--moe-dispatcher", "scalemoe"]
    middle = SAVED + 5
    losses = on_ranks(2, "bert_losses", ours, SAVED + 1, middle, saved, tmp_path)[0]
    losses += on_ranks(2, "bert_losses", both, middle + 1, ITERATIONS, tmp_path)[0]
    assert difference(losses, expected[SAVED:]) <= 1e-6


def test_with_a_pipeline():
    flags = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    stock, ours = (on_ranks(4, "bert_losses", [*flags, *more], 1, 4)[0] for more in ([], ["--moe-dispatcher", "scalemoe"]))
    assert difference(ours, stock) <= 1e-4


def test_what_megatrons_bert_cannot_do_is_refused():
    for flags, said in (
        ("--moe-layer-freq 2", "--moe-layer-freq 2"),
        ("--transformer-impl transformer_engine", "no layers of Transformer Engine"),
        ("--tensor-model-parallel-size 2", "no norm for sequence parallelism"),
        ("--swiglu", ""),
    ):
        message = on_ranks(2, "bert_refusal", flags.split())[0]
        assert said in message
        assert bool(message) == bool(said)


def test_masking_depends_on_the_seed_of_the_sequence_alone():
    window = [[i % 256 for i in range(start, start + 1001)] for start in (0, 100, 0)]
    batch, swapped = (
        on_ranks(2, "masking", seeds, rows)[0] for seeds, rows in (([1, 2, 1], window), ([2, 1, 1], [window[1], *window[::2]]))
    )
    assert batch["labels"] == [row[:-1] for row in window]
    for name in ("tokens", "loss_mask"):
        first, second, again = batch[name]
        assert first == again != second
        assert swapped[name] == [second, first, first]
    for tokens, labels, counts in zip(batch["tokens"], batch["labels"], batch["loss_mask"], strict=True):
        predicted = [i for i in range(1000) if counts[i]]
        assert len(predicted) == 150
        assert all(tokens[i] == labels[i] for i in range(1000) if not counts[i])
        masked = sum(tokens[i] == batch["mask"] for i in predicted)
        kept = sum(tokens[i] == labels[i] for i in predicted)
        assert 105 <= masked <= 135 and 5 <= kept <= 30
