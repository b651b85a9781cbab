"""Knowledge distillation in two loss functions: with a teacher (NKD) and without one (USKD)."""

from .features import FeatureTap, WithWeakHead
from .linear import nkd_linear_loss
from .nkd import nkd_loss
from .taps import default_tap
from .teacher import Teacher
from .uskd import uskd_loss

__version__ = "0.1.0"
__all__ = ["FeatureTap", "Teacher", "WithWeakHead", "default_tap", "nkd_linear_loss", "nkd_loss", "uskd_loss"]
