"""Students and static teachers of many kinds, and the losses between them by the plain formula."""

import timm
import torch
import torch.nn.functional as F

from conftest import TINY_RESNET
from timm_gpd import DistillationTask, GapPreservingTask

TASKS = [DistillationTask, GapPreservingTask]


def make_student(**kwargs):
    student = timm.create_model('test_resnet', **{**TINY_RESNET, **kwargs})
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


def make_teacher(name='test_resnet', num_classes=10, seed=5, mean=0.5, std=0.5, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = timm.create_model(name, num_classes=num_classes, in_chans=1, **kwargs).eval()
        for parameter in teacher.parameters():  # so that images make a difference
            parameter.data += torch.randn_like(parameter) * 0.1
    teacher.pretrained_cfg.update(mean=(mean,), std=(std,))
    return teacher


def make_token_student(name='deit_tiny_distilled_patch16_224', seed=0):
    torch.manual_seed(seed)
    student = timm.create_model(
        name, num_classes=10, in_chans=1, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


def make_task(task_class, teacher, distill_type='kd', student=None, **kwargs):
    return task_class(student or make_student(), teacher, distill_type=distill_type, verbose=False, **kwargs).train()


def terms_of(result, loss):
    """The loss as the student and as the dynamic teacher has it, with the logits that it is of."""
    return [
        (result[f'{prefix}/{loss}'], result[output])
        for prefix, output in (('kd', 'output'), ('teacher_kd', 'teacher_output'))
        if output in result
    ]


def kd(logits, teacher_logits, temperature=4.0):
    student, teacher = (values / temperature for values in (logits, teacher_logits))
    divergence = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction='batchmean')
    return divergence * temperature**2
