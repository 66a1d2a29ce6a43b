"""Students on the Hugging Face Hub: ``python -m timm_gpd.hub push | pull | convert``; ``--help`` explains each."""

from .command import main
from .convert import convert
from .pull import pull
from .push import push

__all__ = ['convert', 'main', 'pull', 'push']
