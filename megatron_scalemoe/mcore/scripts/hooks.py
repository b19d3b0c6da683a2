"""Putting functions of ours in front of functions of Megatron's, in this process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def attach(module: ModuleType, owner: Any, **wrappers: Callable) -> None:
    """Each of these names in `module` becomes `wrapper(owner, original, *args, **options)`."""
    for name, wrapper in wrappers.items():
        original = getattr(module, name)
        setattr(module, name, functools.wraps(original)(functools.partial(wrapper, owner, original)))


def arguments(function: Callable, args: tuple, options: dict) -> dict[str, Any]:
    """What `function(*args, **options)` gets, by name."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return bound.arguments
