"""Checks of single arguments that several modules share: whole numbers, and finite ones."""

import numbers
import sys


def check_integer(name: str, value, minimum: int = 1, maximum: int | None = None, step: int = 1) -> int:
    """Return `value` as an `int`; numpy's integers are integers too, `True` is not.

    Args:
        name (`str`): The argument, for the message.
        value: What was passed.
        minimum, maximum (`int`): The smallest and largest value allowed.
        step (`int`): Divides every value allowed.

    Raises:
        ValueError: If it is no integer, or not in the range.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum or value % step or (maximum is not None and value > maximum):
        kind = "an integer" if step == 1 else f"a multiple of {step}"
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"`{name}` is {value!r}; pass {kind} {limits}.")
    return int(value)


def check_number(name: str, value) -> float:
    """Return `value` as a `float`.

    Raises:
        ValueError: If it is no number, or NaN, or infinite.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` is {value!r}; pass a finite number.")
    return float(value)


def check_flag(name: str, value) -> None:
    """Refuse what is neither True nor False: `"False"` would count as true.

    Raises:
        ValueError: If it is no `bool`.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; pass True or False.")
