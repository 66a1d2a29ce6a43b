"""What "exact" means here: float64, randomised weights and statistics, eval and train mode."""
import copy

import torch
import torch.nn as nn

from timm_gpd import ExpansionPlan
from timm_gpd.model_copy import wide_copy
from timm_gpd.verify import randomize_, relative_error


def without_randomness(model: nn.Module) -> nn.Module:
    """Switches dropout and stochastic depth off, whatever mode the model is in."""
    for module in model.modules():
        for attribute in ('p', 'drop_prob', 'attn_drop_rate', 'drop_rate'):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def expansion_errors(student: nn.Module, plan: ExpansionPlan, x: torch.Tensor) -> dict:
    """Errors of expansion, relative to the largest logit, in both modes, and of extraction, relative to each tensor."""
    student = without_randomness(randomize_(copy.deepcopy(student).double()))
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
