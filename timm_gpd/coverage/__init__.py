"""Which of timm's architectures expand exactly: ``python -m timm_gpd.coverage``; ``--help`` explains it."""
from .sweep import OWN_MODULES, create, create_small, main, read_back_error, timm_modules

__all__ = ['OWN_MODULES', 'create', 'create_small', 'main', 'read_back_error', 'timm_modules']
