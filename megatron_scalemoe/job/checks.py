"""What contradicts itself in a job, refused before anything is submitted; and what follows from its numbers."""

from __future__ import annotations

from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.job.job_file import Job
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.plan.placement_plan import load_plan

# Of an expert-parallel group, to be proposed.
_MOST_RANKS = 4096


def check_job(job: Job) -> dict[str, int]:
    """Numbers that follow: ranks, data parallel size, micro-batches, and with experts those of each rank.

    Raises `ScaleMoEError` that names the file, the line and the way out for the first contradiction.
    """
    numbers = _check_ranks(job)
    _check_model(job)
    _check_pipeline(job)
    numbers |= _check_training(job, numbers["data_parallel_size"])
    if job.content.moe.num_experts is None:
        _check_no_moe(job)
        return numbers
    numbers |= _check_moe(job, job.content.moe.num_experts)
    if job.content.moe.moe_dispatcher == "scalemoe":
        _check_scalemoe(job, job.content.moe.num_experts)
    return numbers


def check_cluster(job: Job) -> None:
    """What only a job needs that is submitted: the environment. Raises `ScaleMoEError`."""
    cluster = job.content.cluster
    environment = cluster.environment or "venv"
    needed = "venv" if environment == "venv" else "container"
    if getattr(cluster, needed) is None:
        raise job.error(("cluster", needed), f"is missing, and the environment is {environment}", try_=f"{needed}: /path/to/it")
    if job.content.program == "megatron_lm" and cluster.megatron_lm_path is None:
        raise job.error(("cluster", "megatron_lm_path"), "is missing", try_="megatron_lm_path: /path/to/Megatron-LM")


def _check_ranks(job: Job) -> dict[str, int]:
    parallel, cluster = job.content.parallel, job.content.cluster
    gpus, ranks_per_node = cluster.gpus_per_node, cluster.ranks_per_node
    if ranks_per_node is None:
        raise job.error(("cluster", "ranks_per_node"), "is missing, and there are no GPUs", try_="ranks_per_node: 2")
    if gpus and ranks_per_node != gpus:
        found = f"{ranks_per_node} ranks and {gpus} GPUs on a node"
        raise job.error(("cluster", "ranks_per_node"), "each rank needs a GPU of its own", found=found, try_="leave ranks_per_node out")
    ranks = cluster.nodes * ranks_per_node
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    ep, expert_tp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tp
    have = f"{ranks} ranks = {cluster.nodes} nodes x {ranks_per_node}"
    if ranks % (tp * pp * cp):
        problem = f"ranks must be a multiple of TP x PP x CP = {tp} x {pp} x {cp}"
        kind = "tensor_model" if tp > 1 else "pipeline_model" if pp > 1 else "context"
        raise job.error(("parallel", f"{kind}_parallel_size"), problem, found=have, try_="other cluster.nodes, or smaller sizes")
    if ranks % (expert_tp * ep * pp):
        problem = f"ranks must be a multiple of expert-TP x EP x PP = {expert_tp} x {ep} x {pp}"
        try_ = "other cluster.nodes, or smaller sizes" + (", or expert_tensor_parallel_size: 1" if expert_tp > 1 else "")
        raise job.error(("parallel", "expert_model_parallel_size"), problem, found=have, try_=try_)
    return {"ranks": ranks, "data_parallel_size": ranks // (tp * pp * cp)}


def _check_model(job: Job) -> None:
    model, parallel = job.content.model, job.content.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads, groups, length = model.num_attention_heads, model.num_query_groups, model.seq_length
    if model.kv_channels is None and not model.multi_latent_attention and model.hidden_size % heads:
        problem, found = "must be a multiple of num_attention_heads", f"{model.hidden_size} and {heads}"
        raise job.error(("model", "hidden_size"), problem, found=found, try_="another size, or kv_channels")
    if heads % tp:
        problem = "must be a multiple of tensor_model_parallel_size"
        raise job.error(("model", "num_attention_heads"), problem, found=f"{heads} and {tp}")
    if groups is not None and (groups % tp or heads % groups):
        problem = "must divide num_attention_heads, and be a multiple of tensor_model_parallel_size"
        raise job.error(("model", "num_query_groups"), problem, found=f"{groups}, {heads} heads, TP {tp}")
    if groups is not None and not model.group_query_attention:
        raise job.error(("model", "num_query_groups"), "does nothing without group_query_attention", try_="group_query_attention: true")
    if cp > 1 and length % (2 * cp):
        raise job.error(("model", "seq_length"), "must be a multiple of 2 x context_parallel_size", found=f"{length} and {cp}")
    positions = model.max_position_embeddings
    if positions is not None and positions < length:
        raise job.error(("model", "max_position_embeddings"), "must not be less than seq_length", found=f"{positions} and {length}")
    if model.bf16 and model.fp16:
        raise job.error(("model", "fp16"), "bf16 and fp16 exclude each other", try_="leave one out")


def _check_pipeline(job: Job) -> None:
    """As Megatron's `validate_args` does; a layout is left to it."""
    if _flag(job, "pipeline_model_parallel_layout"):
        return
    parallel, stages = job.content.parallel, job.content.parallel.pipeline_model_parallel_size
    layers = job.content.model.num_layers
    layers += sum(bool(_flag(job, f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss"))
    uneven = [parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers]
    given = [size for size in uneven if size is not None]
    even_stages, rest = stages - len(given), layers - sum(given)
    if (rest % even_stages or rest < even_stages) if even_stages > 0 else rest:
        problem = f"{layers} layers do not divide evenly over the pipeline's {stages} stages"
        found = f"{rest} layers for {even_stages} stages" if given else None
        try_ = "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers, or another size"
        raise job.error(("parallel", "pipeline_model_parallel_size"), problem, found=found, try_=try_)
    if even_stages > 0:
        _check_virtual_stages(job, rest // even_stages)


def _check_virtual_stages(job: Job, layers_of_stage: int) -> None:
    for option in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        size = str(_flag(job, option) or 1)
        if size.isdecimal() and (int(size) == 0 or layers_of_stage % int(size)):
            raise job.error(("parallel", option), f"must divide the {layers_of_stage} layers of a pipeline stage", found=size)


def _flag(job: Job, option: str) -> object:
    """A flag's value wherever the job gives it: in `parallel` or among the extra flags, there as text, True without one; None if not."""
    words, flag = job.content.extra_flags, "--" + option.replace("_", "-")
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            follows = words[index + 1 : index + 2]
            return value if equals else follows[0] if follows and not follows[0].startswith("-") else True
    return (job.content.parallel.model_extra or {}).get(option)


def _check_training(job: Job, data_parallel: int) -> dict[str, int]:
    parallel, training = job.content.parallel, job.content.training
    batch, at_once = training.global_batch_size, training.micro_batch_size * data_parallel
    if batch % at_once:
        problem = f"must be a multiple of micro_batch_size x data parallel size = {training.micro_batch_size} x {data_parallel}"
        raise job.error(("training", "global_batch_size"), problem, found=batch, try_=f"{-(-batch // at_once) * at_once}")
    if parallel.overlap_param_gather:
        for other in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, other):
                raise job.error(("parallel", "overlap_param_gather"), f"needs {other}", try_=f"{other}: true")
    if training.min_lr > training.lr:
        raise job.error(("training", "min_lr"), "must not be above lr", found=training.min_lr)
    if training.mock_data and training.data_path:
        raise job.error(("training", "mock_data"), "and data_path exclude each other", try_="leave one out")
    return {"micro_batches": batch // at_once}


def _check_no_moe(job: Job) -> None:
    for section, option in job.values:
        if section == "moe":
            raise job.error((section, option), "moe.num_experts is missing: there is no MoE layer", try_="num_experts: 8")
    if job.content.parallel.expert_model_parallel_size > 1:
        raise job.error(("parallel", "expert_model_parallel_size"), "needs moe.num_experts", try_="moe: {num_experts: 8}")


def _check_moe(job: Job, experts: int) -> dict[str, int]:
    moe, parallel = job.content.moe, job.content.parallel
    ep, groups = parallel.expert_model_parallel_size, moe.moe_router_num_groups
    if experts % ep:
        divisors = [size for size in range(1, min(experts, _MOST_RANKS) + 1) if experts % size == 0]
        try_ = f"one of {', '.join(map(str, divisors))}"
        raise job.error(("parallel", "expert_model_parallel_size"), "must divide moe.num_experts", found=f"{ep} and {experts}", try_=try_)
    if moe.moe_router_topk > experts:
        raise job.error(("moe", "moe_router_topk"), "must not be above num_experts", found=f"{moe.moe_router_topk} and {experts}")
    if groups is not None and (experts % groups or moe.moe_router_group_topk > groups):
        problem = "must divide num_experts, and not be less than moe_router_group_topk"
        raise job.error(("moe", "moe_router_num_groups"), problem, found=f"{groups}, {experts} experts")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise job.error(("parallel", "sequence_parallel"), "experts with tensor parallelism need it", try_="leave it out")
    return {"experts_per_rank": experts // ep}


def _check_scalemoe(job: Job, experts: int) -> None:
    """What concerns our dispatcher, replicas and the plan, with the expert-parallel size."""
    ep, dispatcher = job.content.parallel.expert_model_parallel_size, job.content.moe.moe_token_dispatcher_type
    if dispatcher != "alltoall":
        problem = "must be left alone: moe_dispatcher scalemoe replaces it"
        raise job.error(("moe", "moe_token_dispatcher_type"), problem, found=dispatcher, try_="leave it out")
    replicas, plan_file = job.content.scalemoe.get("replicas"), job.content.scalemoe.get("plan")
    most = ep * (experts - experts // ep)
    if replicas and replicas % ep:
        problem = "must be a multiple of expert_model_parallel_size"
        raise job.error(("scalemoe", "replicas"), problem, found=f"{replicas} and {ep}", try_=f"{-(-replicas // ep) * ep}")
    if replicas and replicas > most:
        raise job.error(("scalemoe", "replicas"), "a rank holds no expert twice", found=replicas, try_=f"{most} or fewer")
    # Where the job is written the plan may not be: the run checks it again.
    if plan_file is not None and Path(plan_file).is_file():
        plan = load_plan(Path(plan_file))
        try:
            check_fit({"the job": Sizes(num_ranks=ep, num_experts=experts), plan_file: plan})
        except ScaleMoEError as error:
            try_ = "scalemoe plan with a trace of this model on so many ranks"
            raise job.error(("scalemoe", "plan"), error.problem, found=error.found, try_=try_) from error
