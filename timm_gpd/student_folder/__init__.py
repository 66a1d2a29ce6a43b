"""A student as a folder that timm alone loads, and that is published as it is: weights, config, model card, plot."""
from .folder import read_metrics, save_student

__all__ = ['read_metrics', 'save_student']
