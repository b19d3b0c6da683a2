"""The training scripts' flags, under Megatron's names. A YAML file of flags comes first, the command line wins.

Run as a script it only checks the flags, without torch and before any rank starts.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import sys

from sources import is_indexed

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document
from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags from `--config` and the command line, checked for contradictions that need no ranks. Adds `args.scalemoe`, our config."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    known, _ = _config_parser().parse_known_args(argv)
    args = parser.parse_args([*(_flags_from_yaml(known.config) if known.config else []), *argv])
    args.scalemoe = scalemoe_config_from_args(args)
    _check(args)
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    if args.num_experts is not None:
        args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return args


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", help="a file of flags, one `name: value` each; true stands for a flag without value")
    return parser


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="pretrain",
        usage="pretrain_gpt.py or pretrain_bert.py [--config YAML] [flags]   (--help lists them)",
        description="Train a GPT-MoE or a BERT-MoE with Megatron-Core.",
        parents=[_config_parser()],
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a GPU (default)")
    _add_model_flags(parser.add_argument_group("model"))
    _add_moe_flags(parser.add_argument_group("mixture of experts"))
    _add_parallel_flags(parser.add_argument_group("parallelism"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_run_flags(parser.add_argument_group("data, checkpoints and results"))
    return add_scalemoe_args(parser)


def _add_model_flags(group) -> None:
    group.add_argument("--num-layers", type=int, default=2)
    group.add_argument("--hidden-size", type=int, default=128)
    group.add_argument("--ffn-hidden-size", type=int, help="default 4 x hidden size")
    group.add_argument("--num-attention-heads", type=int, default=4)
    group.add_argument("--seq-length", type=int, default=128)
    group.add_argument("--swiglu", action="store_true")
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    group.add_argument("--hidden-dropout", type=float, default=0.0)
    group.add_argument("--attention-dropout", type=float, default=0.0)
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--recompute-granularity", choices=("full", "selective"))
    group.add_argument("--recompute-method", choices=("uniform", "block"))
    group.add_argument("--recompute-num-layers", type=int)
    group.add_argument("--recompute-modules", nargs="*")


def _add_moe_flags(group) -> None:
    group.add_argument("--num-experts", type=int)
    group.add_argument("--moe-router-topk", type=int, default=2)
    group.add_argument("--moe-ffn-hidden-size", type=int, help="default: --ffn-hidden-size")
    group.add_argument("--moe-shared-expert-intermediate-size", type=int)
    group.add_argument("--moe-shared-expert-overlap", action="store_true")
    group.add_argument("--moe-layer-freq", type=int, default=1)
    group.add_argument("--moe-router-load-balancing-type", default="aux_loss")
    group.add_argument("--moe-aux-loss-coeff", type=float, default=0.0)
    group.add_argument("--moe-z-loss-coeff", type=float)
    group.add_argument("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax")
    group.add_argument("--moe-router-pre-softmax", action="store_true")
    group.add_argument("--moe-router-enable-expert-bias", action="store_true")
    group.add_argument("--moe-router-num-groups", type=int)
    group.add_argument("--moe-router-group-topk", type=int)
    group.add_argument("--moe-router-dtype", choices=("fp32", "fp64"))
    group.add_argument("--moe-expert-capacity-factor", type=float)
    group.add_argument("--moe-pad-expert-input-to-capacity", action="store_true")
    group.add_argument("--moe-token-drop-policy", choices=("probs", "position"), default="probs")
    group.add_argument("--moe-grouped-gemm", action="store_true")
    group.add_argument("--moe-token-dispatcher-type", choices=("allgather", "alltoall", "flex"), default="alltoall")


def _add_parallel_flags(group) -> None:
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--expert-model-parallel-size", type=int, default=1)
    group.add_argument("--expert-tensor-parallel-size", type=int, help="default: the tensor model parallel size")
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--overlap-param-gather", action="store_true")
    group.add_argument("--distributed-timeout-minutes", type=float, default=10)


def _add_training_flags(group) -> None:
    group.add_argument("--train-iters", type=int, default=300)
    group.add_argument("--micro-batch-size", type=int, default=8)
    group.add_argument("--global-batch-size", type=int, default=16)
    group.add_argument("--lr", type=float, default=3e-3)
    group.add_argument("--min-lr", type=float, default=3e-4)
    group.add_argument("--lr-warmup-iters", type=int, default=10)
    group.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine"), default="cosine")
    group.add_argument("--lr-decay-iters", type=int, help="default: --train-iters")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=1234)


def _add_run_flags(group) -> None:
    group.add_argument(
        "--data-path",
        nargs="+",
        help="text files or folders, read as bytes, or PREFIX of Megatron's PREFIX.bin and PREFIX.idx with a token for each byte "
        "(default: the Python standard library's sources)",
    )
    group.add_argument("--run-name", default=datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), help="results go to <results dir>/<name>")
    group.add_argument("--results-dir", default="runs", help="where runs have their folders (default: runs)")
    group.add_argument("--save", help="checkpoint directory (default: runs/<name>/checkpoints)")
    group.add_argument("--save-interval", type=int, default=100)
    group.add_argument("--load", help="checkpoint directory to resume from")
    group.add_argument("--ckpt-step", type=int, help="iteration to load instead of the latest")
    group.add_argument("--no-load-optim", action="store_true", help="load the weights only")
    group.add_argument("--tensorboard-dir", help="default: runs/<name>/tensorboard")
    group.add_argument("--log-interval", type=int, default=10)
    group.add_argument("--eval-interval", type=int, default=100)
    group.add_argument("--eval-iters", type=int, default=5)
    group.add_argument(
        "--compare-iters", type=int, default=0, help="at the end, train this many iterations with each dispatcher and print a table"
    )


def _flags_from_yaml(path: str) -> list[str]:
    """The file's `name: value` pairs as command-line words, so that argparse checks both alike."""
    flags: list[str] = []
    for name, value in read_document(pathlib.Path(path)).data.items():
        if value is False or value is None:
            continue
        items = value if isinstance(value, list) else [] if value is True else [value]
        flags += ["--" + name.replace("_", "-"), *map(str, items)]
    return flags


def _check(args: argparse.Namespace) -> None:
    missing = [path for path in args.data_path or () if not (pathlib.Path(path).exists() or is_indexed(path))]
    if missing:
        raise ScaleMoEError("--data-path names nothing that exists", found=", ".join(missing), try_="a text file or a folder of them")
    for name in ("train_iters", "micro_batch_size", "global_batch_size", "log_interval", "eval_iters", "save_interval", "eval_interval"):
        if getattr(args, name) < 1:
            raise ScaleMoEError(f"--{name.replace('_', '-')} must be at least 1", found=getattr(args, name))
    if args.expert_model_parallel_size > 1 and args.num_experts is None:
        raise ScaleMoEError("--expert-model-parallel-size needs --num-experts", found="no --num-experts")
    if args.num_experts is not None and args.num_experts % args.expert_model_parallel_size:
        raise ScaleMoEError(
            "--num-experts must be a multiple of --expert-model-parallel-size",
            found=f"{args.num_experts} experts on {args.expert_model_parallel_size} ranks",
        )
    if args.overlap_param_gather and not args.use_distributed_optimizer:
        raise ScaleMoEError("--overlap-param-gather needs --use-distributed-optimizer")
    if args.compare_iters and args.pipeline_model_parallel_size > 1:
        raise ScaleMoEError(
            "--compare-iters measures whole models", found="--pipeline-model-parallel-size above 1", try_="--compare-iters 0"
        )
    if args.ckpt_step is not None and args.load is None:
        raise ScaleMoEError("--ckpt-step needs --load")


def main() -> int:
    try:
        parse_args()
    except ScaleMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
