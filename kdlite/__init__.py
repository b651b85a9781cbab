"""Knowledge distillation in two loss functions: with a teacher (NKD) and without a teacher (USKD)."""

from .hooks import FeatureTap
from .layers import default_tap
from .linear import nkd_linear_loss
from .nkd import nkd_loss
from .teacher import Teacher
from .topk import nkd_from_logprobs, nkd_topk_loss, top_k_logprobs
from .uskd import uskd_loss
from .weak_head import WithWeakHead

__version__ = "0.1.0"
__all__ = [
    "FeatureTap",
    "Teacher",
    "WithWeakHead",
    "default_tap",
    "nkd_from_logprobs",
    "nkd_linear_loss",
    "nkd_loss",
    "nkd_topk_loss",
    "top_k_logprobs",
    "uskd_loss",
]
