"""Unlearning methods of the trainer: PALU and the field's others, on the same operators.

`METHODS` maps the names that `PALUConfig.method` and `palu unlearn --method` take to classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palu.methods.answers import Answers
from palu.methods.base import Method
from palu.methods.distillation import CEU, UNDIAL
from palu.methods.gradient import WGA, GradAscent, GradDiff, SatImp
from palu.methods.palu import PALU
from palu.methods.pdu import PDU
from palu.methods.preference import DPO, NPO, IdkDPO, SimNPO
from palu.methods.rmu import RMU

__all__ = [
    "CEU",
    "DPO",
    "METHODS",
    "NPO",
    "PALU",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "Answers",
    "GradAscent",
    "GradDiff",
    "IdkDPO",
    "Method",
    "SatImp",
    "SimNPO",
    "check_options",
    "make_method",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(PALU, GradAscent, GradDiff, NPO, SimNPO, DPO, IdkDPO, WGA, SatImp, UNDIAL, CEU),
        *(PDU, RMU),
    )
}


def make_method(name: str, options: Mapping[str, Any], **shared: Any) -> Method:
    """A method by its name.

    Args:
        name: a key of `METHODS`.
        options: its own; those that are None are its defaults.
        **shared: `forget_weight`, `backend` and `seed`.

    Raises:
        TypeError, ValueError: an option it does not have, or one out of its range.
    """
    check_options(name, options)
    given = {option: value for option, value in options.items() if value is not None}
    return METHODS[name](**given, **shared)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is not in `METHODS`, or an option that is not None and not
    the method's."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    known = METHODS[name].option_names()
    for option, value in options.items():
        if value is not None and option not in known:
            raise ValueError(
                f"{option} is {value} and method {name!r} has no such option; it must be left out "
                f"(its own: {', '.join(known) or 'none'})"
            )
