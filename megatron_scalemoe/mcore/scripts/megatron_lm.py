"""ScaleMoE in Megatron-LM's training scripts: our flags in its parser, and our steps at six places of its training program.

`add_flags(parser)` is the whole of it: the launcher calls it through `hook_parser`, a patched checkout in its own `parse_args`. As soon as
the flags are parsed and ask for us, these names of Megatron are replaced in this process, each by a function that calls the original:

    TransformerLayer.__init__               the MoE layer's spec becomes ours, whichever builder made it
    training.setup_model_and_optimizer      live balance starts when model and optimizer are there, and goes on with a checkpoint's plan
    training.build_train_valid_test_data_loaders    sequence placement, if asked for
    training.train_step, training_log       counts, replans, metrics
    training.save_checkpoint, load_checkpoint, ...    see `checkpoints`
    training.train                          ranks that die are named; the end

With `--moe-dispatcher stock`, or without it, nothing is replaced and the arguments are as if we did not exist.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.faults.dead_ranks import naming_dead_ranks
from megatron_scalemoe.faults.orphans import end_with_launcher
from megatron_scalemoe.mcore.arguments import add_scalemoe_args, scalemoe_config_from_args
from megatron_scalemoe.mcore.compat import check_megatron_core
from megatron_scalemoe.mcore.scripts import checkpoints, hooks
from megatron_scalemoe.mcore.scripts.session import TrainingSession
from megatron_scalemoe.mcore.specs import is_moe, use_scalemoe


def hook_parser() -> None:
    """Give Megatron-LM's parser our flags, for scripts that are not patched."""
    from megatron.training import arguments

    add_megatron_arguments = arguments.add_megatron_arguments
    arguments.add_megatron_arguments = lambda parser: add_flags(add_megatron_arguments(parser))


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron-LM's `parser`; when it has parsed `--moe-dispatcher scalemoe`, `attach`. Returns the parser."""
    known_before = {action.dest for action in parser._actions}
    add_scalemoe_args(parser)
    ours = {action.dest for action in parser._actions} - known_before
    parse_known_args = parser.parse_known_args  # `parse_args` calls it, too

    def parse(*args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = parse_known_args(*args, **options)
        scalemoe = scalemoe_config_from_args(parsed)
        if scalemoe is not None:
            attach(scalemoe)
        else:
            for name in ours:
                delattr(parsed, name)
        return parsed, unknown

    parser.parse_known_args = parse
    return parser


@functools.cache
def attach(scalemoe: ScaleMoEConfig) -> TrainingSession:
    """Replace the names listed above, for the training that starts next in this process; once, though Megatron parses several times.

    Raises `ScaleMoEError` when the megatron.core that the script uses is not a tested version.
    """
    check_megatron_core()
    end_with_launcher()
    from megatron.training import training

    session = TrainingSession(scalemoe)
    TransformerLayer.__init__ = _building_our_layers(TransformerLayer.__init__, scalemoe)
    hooks.attach(
        training,
        session,
        setup_model_and_optimizer=_setup_model_and_optimizer,
        build_train_valid_test_data_loaders=_build_train_valid_test_data_loaders,
        train_step=_train_step,
        training_log=_training_log,
        train=_train,
    )
    checkpoints.attach(session)
    return session


def _building_our_layers(init: Callable, scalemoe: ScaleMoEConfig) -> Callable:
    @functools.wraps(init)
    def build(layer: TransformerLayer, config: Any, submodules: Any, *args: Any, **options: Any) -> None:
        if is_moe(getattr(submodules, "mlp", None)):
            spec = use_scalemoe(ModuleSpec(module=type(layer), submodules=submodules), scalemoe, options.get("pg_collection"))
            submodules = spec.submodules
        init(layer, config, submodules, *args, **options)

    return build


def _setup_model_and_optimizer(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> tuple:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    training_args = get_args()
    session.check(training_args)
    model, optimizer, scheduler = original(*args, **options)
    if optimizer is not None:  # else --skip-train
        session.start(training_args, model, optimizer, get_model_config(model[0]), get_num_microbatches())
        if training_args.iteration > 0 and training_args.load:
            session.live.resume(Path(get_checkpoint_name(training_args.load, training_args.iteration, return_base_dir=True)))
    return model, optimizer, scheduler


def _build_train_valid_test_data_loaders(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> tuple:
    train, valid, test = original(*args, **options)
    return session.placing_sequences(train), valid, test


def _train_step(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> tuple:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    micro_batches = get_num_microbatches()  # of this step: with --rampup-batch-size they grow
    result = original(*args, **options)
    _, _, _, should_exit, *_ = result
    if not should_exit:  # else no optimizer step was made
        session.step_done(hooks.arguments(original, args, options)["iteration"] + 1, micro_batches)
    return result


def _training_log(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> Any:
    from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

    result = original(*args, **options)
    session.report(get_args(), hooks.arguments(original, args, options)["iteration"], get_tensorboard_writer(), get_wandb_writer())
    return result


def _train(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> Any:
    from megatron.training import get_args

    with naming_dead_ranks(get_args().distributed_timeout_minutes * 60):
        try:
            result = original(*args, **options)
        except SystemExit:  # how Megatron ends a run at --exit-interval and the like, on all ranks
            session.close()
            raise
        session.close()
    return result
