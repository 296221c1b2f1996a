"""Networks built of feature augment units, and the counting of their parameters and multiplications."""

from .counts import mac_count, parameter_count
from .hwnet import HWNet, hwnet
from .spindle import Spindle

__all__ = ["HWNet", "Spindle", "hwnet", "mac_count", "parameter_count"]
