"""Pictures of characters, drawn from the fonts of a machine: ``python -m timm_gpd.data.glyphs OUT``."""

from .augmentation import augment
from .classes import CLASSES
from .command import write_glyphs
from .families import DrawnFace, Family, choose_families
from .fonts import Face, choose_faces, find_font_files
from .rendering import render_face
from .splits import SPLITS, split_families
from .store import Glyphs, read_description, read_glyphs

__all__ = [
    'CLASSES',
    'DrawnFace',
    'Face',
    'Family',
    'Glyphs',
    'SPLITS',
    'augment',
    'choose_faces',
    'choose_families',
    'find_font_files',
    'read_description',
    'read_glyphs',
    'render_face',
    'split_families',
    'write_glyphs',
]
