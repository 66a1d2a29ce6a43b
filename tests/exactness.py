"""What "exact" means here: float64, randomised weights and statistics, eval and train mode."""

import copy
from typing import Dict

import torch
import torch.nn as nn

from timm_gpd import ExpansionPlan
from timm_gpd.expansion.verify import compare, randomize_, read_back_error


def expansion_errors(student: nn.Module, plan: ExpansionPlan, x: torch.Tensor) -> Dict[str, float]:
    """Errors of expansion, relative to the largest logit, in both modes, and of extraction, relative to each tensor."""
    errors = {mode: agreement.error for mode, agreement in compare(student, plan, images=x).items()}
    return {**errors, 'extraction': read_back_error(randomize_(copy.deepcopy(student).double()), plan)}
