"""Students on the Hugging Face Hub: ``python -m timm_gpd.hub push | pull | convert``; ``--help`` explains each."""
from .commands import convert, main, pull, push

__all__ = ['convert', 'main', 'pull', 'push']
