"""What "exact" means here: float64, randomised weights and statistics, eval and train mode."""
import copy

import torch
import torch.nn as nn

from timm_gpd import ExpansionPlan
from timm_gpd.model_copy import wide_copy
from timm_gpd.verify import disable_randomness_, randomize_, relative_error


def expansion_errors(student: nn.Module, plan: ExpansionPlan, x: torch.Tensor) -> dict:
    """Errors of expansion, relative to the largest logit, in both modes, and of extraction, relative to each tensor."""
    student = disable_randomness_(randomize_(copy.deepcopy(student).double()))
    teacher = wide_copy(student, plan, plan.expand_tensor)
    errors = {}
    with torch.no_grad():
        back = plan.extract(dict(teacher.state_dict()))
        errors['extract'] = max(
            ((back[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30)).item()
            for name, tensor in student.state_dict().items() if tensor.is_floating_point())
        for mode in (False, True):
            student.train(mode), teacher.train(mode)
            errors['train' if mode else 'eval'] = relative_error(teacher(x.double()), student(x.double()))
    return errors
