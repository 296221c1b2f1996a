"""Feature augment ("FiF") units for PyTorch: the plain definition, and the same module fused into one pass."""

from . import backends, models
from .frozen import Frozen, freeze
from .functional import feature_augment
from .modules import FusedFiF, explain
from .reference import FeatureAugment, Norm

__all__ = ["FeatureAugment", "Frozen", "FusedFiF", "Norm", "backends", "explain", "feature_augment", "freeze", "models"]
__version__ = "0.1.0"
