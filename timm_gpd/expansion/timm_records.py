"""What a timm model records of its own widths, for whoever builds on it. Its forward uses none of these."""

from ..private_torch import tree_map_only
from .widening import Widening

__all__ = ['widen_records']

_WIDTHS = ('num_features', 'head_hidden_size', 'embed_dim')


def widen_records(widening: Widening) -> None:
    """Makes the records true for the teacher: widths of features, and ``feature_info``.

    Args:
        widening: the student in the dry run, which has run.
    """
    known = widening.attributes.get('', {})
    for attribute in _WIDTHS:
        value = getattr(widening.model, attribute, None)
        if isinstance(value, (int, tuple, list)) and attribute not in known:
            widening.set_attribute('', attribute, tree_map_only(int, lambda width: width * widening.ratio, value))
    info = getattr(widening.model, 'feature_info', None)
    if isinstance(info, list):
        widening.set_attribute(
            '', 'feature_info', [{**stage, 'num_chs': stage['num_chs'] * widening.ratio} for stage in info]
        )
