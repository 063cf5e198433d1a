"""Checks of single arguments that several modules use. Errors name the argument, its value and the remedy.

`warn_caller` gives a warning the line of the user.
"""

import math
import numbers
import os
import sys
import warnings
from collections.abc import Collection
from typing import Any

import torch


# Packages whose functions stand between this package and the line of the user.
LIBRARIES = ("editar_hf", "torch", "transformers", "diffusers")


def warn_caller(message: str) -> None:
    """Warn at the line that called this package, however many functions are between that line and the warning."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None, step: int = 1) -> int:
    """Check an integer and return it as an `int`. numpy integers are accepted; booleans are not.

    Args:
        name (`str`): Name of the argument, for the message.
        value: The value.
        minimum, maximum (`int`): The smallest and largest allowed value.
        step (`int`): Every allowed value is a multiple of `step`.

    Raises:
        ValueError: If `value` is not an integer, not in the range, or not a multiple of `step`.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum or value % step or (maximum is not None and value > maximum):
        kind = "an integer" if step == 1 else f"a multiple of {step}"
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"`{name}` is {value!r}; pass {kind} {limits}.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Check a number and return it as a `float`. NaN and infinity are refused."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; pass a finite number.")
    return float(value)


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False. A string such as `"False"` is refused, because Python treats it as true."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; pass True or False.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that a value is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def check_texts(name: str, texts: Any) -> None:
    """Check that a value is a string or a non-empty list of strings."""
    listed = [texts] if isinstance(texts, str) else texts
    if not (isinstance(listed, list | tuple) and listed and all(isinstance(text, str) for text in listed)):
        raise ValueError(f"`{name}` is {texts!r}; pass a string or a list of strings.")


def check_path(name: str, value: Any) -> None:
    """Check that a value is a path. An empty string is refused, because it would mean the current folder."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{name}` is {value!r:.80}; pass a path as a string or `Path`.")
    if not os.fspath(value):
        raise ValueError(f"`{name}` is empty; pass a path.")


def check_tensor(name: str, value: Any) -> None:
    """Check that a value is a tensor with at least one row."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is {value!r:.80}; pass a tensor with one row per image.")
    if value.ndim == 0 or not len(value):
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; pass a tensor with one row per image.")
