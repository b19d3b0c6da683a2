"""What every dispatcher does: six stages, of which only the middle one of each direction waits for communication."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """Rows and probabilities between two stages of one dispatch, with whatever the later stages need.

    x and probs are ordinary differentiable tensors and may be replaced (`dataclasses.replace`) between stages; `state` is the
    dispatcher's own frozen record.
    """

    x: Tensor
    probs: Tensor
    state: Any


Count = int | Tensor  # on a GPU a tensor of one number, so that nothing waits for the device


@dataclasses.dataclass(frozen=True, slots=True)
class RowsSent:
    """Rows that this rank sent to itself and to other ranks in a dispatch; how many of them are zeros, up to a capacity."""

    stayed: Count = 0
    left: Count = 0
    padding: int = 0

    def __add__(self, other: RowsSent) -> RowsSent:
        return RowsSent(self.stayed + other.stayed, self.left + other.left, self.padding + other.padding)


class Dispatcher(abc.ABC):
    """Carries rows to the ranks of their experts and back.

    An object holds only what is fixed for the run (group, sizes), never anything of a call: several dispatches may be in flight.
    `dispatch` and `combine` are the six stages in order; a scheduler may call the stages one by one instead.
    """

    @abc.abstractmethod
    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        """Decide which rows go where, in sending order. May start the exchange of counts, but waits for nothing."""

    @abc.abstractmethod
    def exchange(self, flight: InFlight) -> InFlight:
        """Send the rows to their experts' ranks."""

    @abc.abstractmethod
    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Put the received rows in (expert, source rank, token) order, one copy per expert.

        Returns rows [R, D], tokens_per_expert int64 [L] on the host, row_probs [R] and the metadata that `combine` needs.
        """

    @abc.abstractmethod
    def reduce(self, rows_RD: Tensor, metadata: Any) -> Tensor:
        """Undo `expand`: sum the experts' outputs of each received row."""

    @abc.abstractmethod
    def exchange_back(self, x: Tensor, metadata: Any) -> Tensor:
        """Send the reduced rows back to their source ranks."""

    @abc.abstractmethod
    def restore(self, x: Tensor, metadata: Any) -> Tensor:
        """Undo `prepare`: sum the rows that came back for each token, [T, D]."""

    @abc.abstractmethod
    def rows_sent(self, metadata: Any) -> RowsSent:
        """What the dispatch of this metadata sent. Does not wait for the device."""

    def dispatch(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Tokens to experts: x [T, D], probs [T, E], routing_map bool [T, E] -> what `expand` returns."""
        return self.expand(self.exchange(self.prepare(x_TD, probs_TE, routing_map_TE)))

    def combine(self, rows_RD: Tensor, metadata: Any) -> Tensor:
        """Experts' outputs [R, D], already multiplied by `row_probs`, back to their tokens and summed: [T, D]."""
        return self.restore(self.exchange_back(self.reduce(rows_RD, metadata), metadata), metadata)
