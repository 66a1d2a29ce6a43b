"""Which of timm's architectures expand exactly: ``python -m timm_gpd.coverage``; ``--help`` explains it."""

from ..expansion.verify import read_back_error
from .architectures import OWN_MODULES, create, create_small, timm_modules
from .command import main

__all__ = ['OWN_MODULES', 'create', 'create_small', 'main', 'read_back_error', 'timm_modules']
