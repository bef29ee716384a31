"""Which objective goes with which loss."""

from __future__ import annotations

from palu.loss import PALULoss
from palu.methods.base import Method
from palu.methods.dual import DualObjective
from palu.methods.objective import MethodObjective
from palu.methods.pdu import PDU
from palu.methods.rmu import RMU
from palu.methods.rmu_objective import RMUObjective
from palu.methods.step_loss import Objective


def objective_class(loss: PALULoss | Method) -> type[Objective]:
    """What makes the terms of a batch."""
    if isinstance(loss, RMU):
        return RMUObjective
    if isinstance(loss, PDU):
        return DualObjective
    return MethodObjective if isinstance(loss, Method) else Objective
