"""Learning in training which experts the tokens of each id choose: on the device, without a host synchronisation, on some of the steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable, stacked_hosts
from megatron_scalemoe.traffic.sample_history import SampleHistory

LEARN_INTERVAL = 8


class AffinityLearner:
    """Watches a model's token ids and its routers. Owns the counts on the device.

    model: the module that is called with `input_ids` [B, S], first or by name: a GPTModel. A pipeline stage that is called without them
        learns nothing: its layers then stay unknown, and the others speak for the whole model.
    routers: layer of the plan -> router of this stage, whose output is (probs, routing_map bool [T, E]), T = s * B + b.
    table: for its sizes. Every rank of `groups.world` takes part in what is collective.
    interval: learns in one training step of so many.

    Only what runs inside the model's forward is seen, so each token once, also with activation recomputation, which happens in backward.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Mapping[int, nn.Module],
        table: AffinityTable,
        groups: Groups,
        *,
        interval: int = LEARN_INTERVAL,
    ):
        self._groups, self._interval = groups, interval
        self._num_rows, self._num_layers, num_experts = table.counts.shape
        device = next(model.parameters()).device
        self._counts_RLE = torch.zeros(table.counts.shape, dtype=torch.float32, device=device)
        self._hosted_LE = torch.zeros(self._num_layers, num_experts, dtype=torch.bool, device=device)
        self._local = torch.zeros(2, dtype=torch.int64, device=device)
        self._learning, self._samples, self._recorded = False, iter(()), []
        self._ids_BS = self._rows_T = self._sequences = None
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave)
        for layer, router in routers.items():
            router.register_forward_hook(lambda router, _, output, layer=layer: self._observe(layer, output[1]))

    def start_step(self, iteration: int, sample_ids: np.ndarray | None = None) -> None:
        """Call before each training step. sample_ids: int [M, micro-batch], with which every sequence's choices are recorded, too."""
        self._learning = iteration % self._interval == 0
        self._samples = iter(()) if sample_ids is None else iter(sample_ids)

    def skip_pass(self) -> None:
        """Learn nothing until the next `start_step`: what follows repeats what was seen."""
        self._learning, self._samples = False, iter(())

    def set_plan(self, plan: PlacementPlan) -> None:
        """The plan in force, for `measured_share`."""
        hosted_LE = stacked_hosts(plan)[:, :, self._groups.ep.rank()]
        self._hosted_LE.copy_(torch.from_numpy(hosted_LE))

    def sync(self, table: AffinityTable, *, keep: float) -> AffinityTable:
        """`table`, faded to `keep`, with what all ranks learnt since the last call. Collective; one host synchronisation."""
        dist.all_reduce(self._counts_RLE, group=self._groups.world)
        merged = table.merged(self._counts_RLE.cpu().numpy(), keep)
        self._counts_RLE.zero_()
        return merged

    def measured_share(self) -> float | None:
        """Fraction of (token, expert) selections in the learning steps since the last call whose expert had a copy on the token's rank.

        That many can stay on their rank; a replica split that evens loads may send some of them elsewhere. None when none were seen.
        Collective; one host synchronisation.
        """
        dist.all_reduce(self._local, group=self._groups.world)
        local, selections = self._local.tolist()
        self._local.zero_()
        return local / selections if selections else None

    def record_samples(self, history: SampleHistory) -> None:
        """Moves the choices of the sequences seen since the last call into `history`. One host synchronisation per micro-batch."""
        for ids_B, counts_LBE in self._recorded:
            history.record(ids_B, counts_LBE.transpose(0, 1).cpu().numpy())
        self._recorded.clear()

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids_B = next(self._samples, None) if model.training else None
        ids_BS = kwargs["input_ids"] if "input_ids" in kwargs else next(iter(args), None)
        if not model.training or ids_BS is None or (ids_B is None and not self._learning):
            return
        self._ids_BS = ids_BS
        if ids_B is not None:
            counts_LBE = torch.zeros(self._num_layers, len(ids_B), self._counts_RLE.shape[2], dtype=torch.int32, device=ids_BS.device)
            self._sequences = counts_LBE
            self._recorded.append((np.array(ids_B), counts_LBE))

    def _leave(self, model: nn.Module, args: tuple, output: Tensor) -> None:
        self._ids_BS = self._rows_T = self._sequences = None

    @torch.no_grad()
    def _observe(self, layer: int, routing_map_TE: Tensor) -> None:
        if self._ids_BS is None:
            return
        if self._sequences is not None:
            sequences, num_experts = self._sequences.shape[1:]
            self._sequences[layer] += routing_map_TE.view(-1, sequences, num_experts).sum(0)
        if self._learning:
            if self._rows_T is None:
                self._rows_T = self._rows(len(routing_map_TE))
            flat_XE = self._counts_RLE.view(-1, self._counts_RLE.shape[2])
            flat_XE.index_add_(0, self._rows_T + layer, routing_map_TE.to(torch.float32))
            chosen_E = routing_map_TE.sum(0)
            self._local += torch.stack([chosen_E * self._hosted_LE[layer], chosen_E]).sum(1)

    def _rows(self, num_tokens: int) -> Tensor:
        """int64 [T]: row * L of this rank's tokens: with sequence parallelism a tensor-parallel rank routes its slice of S."""
        ids_X = self._ids_BS.transpose(0, 1).reshape(-1)
        if num_tokens != ids_X.numel():
            tp = self._groups.tp
            assert num_tokens * tp.size() == ids_X.numel()
            ids_X = ids_X.narrow(0, tp.rank() * num_tokens, num_tokens)
        return ids_X % self._num_rows * self._num_layers
