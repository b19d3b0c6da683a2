"""What contradicts itself in a job, refused before anything is submitted; and what follows from its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.job.config import JobConfig
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.plan.placement_plan import load_plan


def check_job(job: JobConfig) -> dict[str, int]:
    """Numbers that follow: ranks, data parallel size, micro-batches, and with experts those of each rank.

    Raises `ScaleMoEError` that names the file, the line and the way out for the first contradiction.
    """
    numbers = _check_ranks(job)
    _check_model(job)
    numbers |= _check_batch(job, numbers["data_parallel_size"])
    _check_training(job)
    if job.get("moe", "num_experts") is not None:
        numbers |= _check_moe(job)
        if job.get("moe", "moe_dispatcher") == "scalemoe":
            _check_scalemoe(job)
    else:
        _check_no_moe(job)
    return numbers


def check_cluster(job: JobConfig) -> None:
    """What only a job needs that is submitted: the environment. Raises `ScaleMoEError`."""
    environment = job.get("cluster", "environment", "venv")
    needed = "venv" if environment == "venv" else "container"
    if job.get("cluster", needed) is None:
        raise job.error(("cluster", needed), f"is missing, and the environment is {environment}", try_=f"{needed}: /path/to/it")
    if job.program == "megatron_lm" and job.get("cluster", "megatron_lm_path") is None:
        raise job.error(("cluster", "megatron_lm_path"), "is missing", try_="megatron_lm_path: /path/to/Megatron-LM")


def _sizes(job: JobConfig) -> tuple[int, int, int, int, int]:
    """TP, PP, CP, EP, expert-TP."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
    tp, pp, cp, ep = (job.get("parallel", name, 1) for name in names)
    return tp, pp, cp, ep, job.get("parallel", "expert_tensor_parallel_size", tp)


def _check_ranks(job: JobConfig) -> dict[str, int]:
    ranks_per_node = job.get("cluster", "ranks_per_node")
    if ranks_per_node is None:
        raise job.error(("cluster", "ranks_per_node"), "is missing, and there are no GPUs", try_="ranks_per_node: 2")
    gpus = job.get("cluster", "gpus_per_node")
    if gpus and ranks_per_node != gpus:
        found = f"{ranks_per_node} ranks and {gpus} GPUs on a node"
        raise job.error(("cluster", "ranks_per_node"), "each rank needs a GPU of its own", found=found, try_="leave ranks_per_node out")
    ranks = job.get("cluster", "nodes") * ranks_per_node
    tp, pp, cp, ep, expert_tp = _sizes(job)
    have = f"{ranks} ranks = {job.get('cluster', 'nodes')} nodes x {ranks_per_node}"
    if ranks % (tp * pp * cp):
        problem = f"ranks must be a multiple of TP x PP x CP = {tp} x {pp} x {cp}"
        key = (
            "parallel",
            "tensor_model_parallel_size" if tp > 1 else "pipeline_model_parallel_size" if pp > 1 else "context_parallel_size",
        )
        raise job.error(key, problem, found=have, try_="other cluster.nodes, or smaller sizes")
    if ranks % (expert_tp * ep * pp):
        problem = f"ranks must be a multiple of expert-TP x EP x PP = {expert_tp} x {ep} x {pp}"
        try_ = "other cluster.nodes, or smaller sizes" + (", or expert_tensor_parallel_size: 1" if expert_tp > 1 else "")
        raise job.error(("parallel", "expert_model_parallel_size"), problem, found=have, try_=try_)
    return {"ranks": ranks, "data_parallel_size": ranks // (tp * pp * cp)}


def _check_model(job: JobConfig) -> None:
    tp, pp, cp, _, _ = _sizes(job)
    layers, hidden, heads, length = (job.get("model", name) for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"))
    if job.get("model", "kv_channels") is None and not job.get("model", "multi_latent_attention") and hidden % heads:
        problem, found = "must be a multiple of num_attention_heads", f"{hidden} and {heads}"
        raise job.error(("model", "hidden_size"), problem, found=found, try_="another size, or kv_channels")
    if heads % tp:
        problem = "must be a multiple of tensor_model_parallel_size"
        raise job.error(("model", "num_attention_heads"), problem, found=f"{heads} and {tp}")
    groups = job.get("model", "num_query_groups")
    if groups is not None and (groups % tp or heads % groups):
        problem = "must divide num_attention_heads, and be a multiple of tensor_model_parallel_size"
        raise job.error(("model", "num_query_groups"), problem, found=f"{groups}, {heads} heads, TP {tp}")
    if groups is not None and not job.get("model", "group_query_attention"):
        raise job.error(("model", "num_query_groups"), "does nothing without group_query_attention", try_="group_query_attention: true")
    if cp > 1 and length % (2 * cp):
        raise job.error(("model", "seq_length"), "must be a multiple of 2 x context_parallel_size", found=f"{length} and {cp}")
    positions = job.get("model", "max_position_embeddings")
    if positions is not None and positions < length:
        raise job.error(("model", "max_position_embeddings"), "must not be less than seq_length", found=f"{positions} and {length}")
    if job.get("model", "bf16") and job.get("model", "fp16"):
        raise job.error(("model", "fp16"), "bf16 and fp16 exclude each other", try_="leave one out")
    _check_pipeline(job, layers, pp)


def _check_pipeline(job: JobConfig, layers: int, pp: int) -> None:
    uneven = [job.get("parallel", f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")]
    given = [size for size in uneven if size is not None]
    stages, rest = pp - len(given), layers - sum(given)
    if (rest % stages or rest < stages) if stages > 0 else rest:
        problem = f"{layers} layers do not divide evenly over the pipeline's {pp} stages"
        found = f"{rest} layers for {stages} stages" if given else None
        try_ = "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers, or another size"
        raise job.error(("parallel", "pipeline_model_parallel_size"), problem, found=found, try_=try_)


def _check_batch(job: JobConfig, data_parallel: int) -> dict[str, int]:
    batch, micro = job.get("training", "global_batch_size"), job.get("training", "micro_batch_size")
    if batch % (micro * data_parallel):
        problem = f"must be a multiple of micro_batch_size x data parallel size = {micro} x {data_parallel}"
        raise job.error(
            ("training", "global_batch_size"), problem, found=batch, try_=f"{-(-batch // (micro * data_parallel)) * micro * data_parallel}"
        )
    return {"micro_batches": batch // (micro * data_parallel)}


def _check_training(job: JobConfig) -> None:
    if job.get("parallel", "overlap_param_gather"):
        for other in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not job.get("parallel", other):
                raise job.error(("parallel", "overlap_param_gather"), f"needs {other}", try_=f"{other}: true")
    if job.get("training", "min_lr", 0.0) > job.get("training", "lr"):
        raise job.error(("training", "min_lr"), "must not be above lr", found=job.get("training", "min_lr"))
    if job.get("training", "mock_data") and job.get("training", "data_path"):
        raise job.error(("training", "mock_data"), "and data_path exclude each other", try_="leave one out")


def _check_no_moe(job: JobConfig) -> None:
    for section, option in job.values:
        if section == "moe" or (section == "scalemoe" and job.values[section, option].origin == "file"):
            raise job.error((section, option), "moe.num_experts is missing: there is no MoE layer", try_="num_experts: 8")
    if job.get("parallel", "expert_model_parallel_size") > 1:
        raise job.error(("parallel", "expert_model_parallel_size"), "needs moe.num_experts", try_="moe: {num_experts: 8}")


def _check_moe(job: JobConfig) -> dict[str, int]:
    tp, _, _, ep, _ = _sizes(job)
    experts, top_k = job.get("moe", "num_experts"), job.get("moe", "moe_router_topk", 2)
    if experts % ep:
        divisors = [size for size in range(1, experts + 1) if experts % size == 0]
        try_ = f"one of {', '.join(map(str, divisors))}"
        raise job.error(("parallel", "expert_model_parallel_size"), "must divide moe.num_experts", found=f"{ep} and {experts}", try_=try_)
    if top_k > experts:
        raise job.error(("moe", "moe_router_topk"), "must not be above num_experts", found=f"{top_k} and {experts}")
    groups = job.get("moe", "moe_router_num_groups")
    if groups is not None and (experts % groups or job.get("moe", "moe_router_group_topk", 1) > groups):
        problem = "must divide num_experts, and not be less than moe_router_group_topk"
        raise job.error(("moe", "moe_router_num_groups"), problem, found=f"{groups}, {experts} experts")
    if tp > 1 and not job.get("parallel", "sequence_parallel"):
        raise job.error(("parallel", "sequence_parallel"), "experts with tensor parallelism need it", try_="leave it out")
    return {"experts_per_rank": experts // ep}


def _check_scalemoe(job: JobConfig) -> None:
    chosen = {option: value.value for (section, option), value in job.values.items() if section == "scalemoe"}
    try:
        ScaleMoEConfig(**chosen)
    except ScaleMoEError as error:
        raise job.error(("scalemoe", *error.field), error.problem, found=error.found, try_=error.try_) from error
    dispatcher = job.get("moe", "moe_token_dispatcher_type")
    if dispatcher != "alltoall":
        problem = "must be left alone: moe_dispatcher scalemoe replaces it"
        raise job.error(("moe", "moe_token_dispatcher_type"), problem, found=dispatcher, try_="leave it out")
    for key, problem, found, try_ in _placing_problems(job):
        raise job.error(key, problem, found=found, try_=try_)


def _placing_problems(job: JobConfig) -> Iterator[tuple[tuple[str, str], str, str, str]]:
    """Of replicas and the plan, with the expert-parallel size."""
    ep, experts = job.get("parallel", "expert_model_parallel_size"), job.get("moe", "num_experts")
    replicas, plan_file = job.get("scalemoe", "replicas"), job.get("scalemoe", "plan")
    key = ("scalemoe", "replicas")
    if replicas and replicas % ep:
        yield key, "must be a multiple of expert_model_parallel_size", f"{replicas} and {ep}", f"{-(-replicas // ep) * ep}"
    most = ep * (experts - experts // ep)
    if replicas and replicas > most:
        yield key, "a rank holds no expert twice", str(replicas), f"{most} or fewer"
    # Where the job is written the plan may not be: the run checks it again.
    if plan_file is not None and Path(plan_file).is_file():
        plan = load_plan(Path(plan_file))
        try:
            check_fit({"the job": Sizes(num_ranks=ep, num_experts=experts), str(plan_file): plan})
        except ScaleMoEError as error:
            yield ("scalemoe", "plan"), error.problem, error.found, "scalemoe plan with a trace of this model on so many ranks"
