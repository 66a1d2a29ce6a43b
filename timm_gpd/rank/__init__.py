"""Which student suits a teacher, before either is trained: ``python -m timm_gpd.rank``; ``--help`` explains it.

The scores are those of DisWOT (arXiv 2303.15678): how alike two networks of random weights are.
"""

from .similarity import Similarity, compare_networks
from .students import RankedStudent, rank_students

__all__ = ['RankedStudent', 'Similarity', 'compare_networks', 'rank_students']
