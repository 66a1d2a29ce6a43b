"""A student as a folder that timm alone loads, and that is published as it is: weights, config, model card, plot."""

from .card import CARD, card_of_repo
from .folder import CONFIG, PLOT, STUDENT_FILES, WEIGHTS, new_folder, read_metrics, save_student

__all__ = [
    'CARD',
    'CONFIG',
    'PLOT',
    'STUDENT_FILES',
    'WEIGHTS',
    'card_of_repo',
    'new_folder',
    'read_metrics',
    'save_student',
]
