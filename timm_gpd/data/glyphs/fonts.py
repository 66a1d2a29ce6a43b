"""Font files of this machine, and the faces of each family that are drawn."""

import hashlib
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Sequence

from PIL import ImageFont

from ...errors import UsageError

__all__ = ['Face', 'choose_faces', 'find_font_files']

_EXTENSIONS = ('.ttf', '.otf', '.ttc', '.otc', '.pfb', '.t1')
_USUAL_FOLDERS = (
    '~/.fonts',
    '~/.local/share/fonts',
    '~/Library/Fonts',
    '/usr/share/fonts',
    '/usr/local/share/fonts',
    '/Library/Fonts',
    '/System/Library/Fonts',
    'C:/Windows/Fonts',
)
# Styles of faces in the order in which they are taken; each group is what families call one and the same.
_STYLES = (
    ('regular', 'book', 'roman', 'normal', 'plain', 'medium', ''),
    ('bold',),
    ('italic', 'oblique', 'medium italic', 'slanted'),
    ('bold italic', 'bold oblique'),
)


@dataclass(frozen=True)
class Face:
    """One face of a font file.

    Attributes:
        path: the file.
        index: of the face in a collection, from 0.
        family: name of its family.
        style: name of its style in the family.
        sha256: of the file, in hexadecimal.
    """

    path: str
    index: int
    family: str
    style: str
    sha256: str


def find_font_files(folders: Sequence[str] = ()) -> List[str]:
    """Scalable fonts in folders, at any depth.

    Args:
        folders: where to look. By default what fontconfig lists; where it is not installed the usual folders; and
            where those have none, the fonts that ship with matplotlib.

    Returns:
        Paths of the files, sorted.

    Raises:
        UsageError: if a folder does not exist, or there are no fonts.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f'font folder {folder} does not exist: check --fonts')
    if folders:
        found = _files_in(folders)
    else:
        found = _listed_by_fontconfig() or _files_in(_USUAL_FOLDERS) or _files_of_matplotlib()
    if not found:
        where = ', '.join(folders) or 'the usual folders'
        raise UsageError(f'no fonts in {where}: install some, or name a folder of them with --fonts')
    return found


def _listed_by_fontconfig() -> List[str]:
    with suppress(OSError, subprocess.CalledProcessError):
        listed = subprocess.run(['fc-list', '--format', '%{file}\n'], capture_output=True, check=True).stdout
        return _fonts_among(os.fsdecode(listed).splitlines())
    return []


def _files_in(folders: Sequence[str]) -> List[str]:
    roots = [os.path.expanduser(folder) for folder in folders]
    return _fonts_among(
        os.path.join(folder, name) for root in roots for folder, _, names in os.walk(root) for name in names
    )


def _files_of_matplotlib() -> List[str]:
    with suppress(ImportError):
        import matplotlib

        return _files_in([os.path.join(matplotlib.get_data_path(), 'fonts')])
    return []


def _fonts_among(paths: Iterable[str]) -> List[str]:
    return sorted({path for path in paths if path.lower().endswith(_EXTENSIONS)})


def choose_faces(paths: Sequence[str]) -> Dict[str, List[Face]]:
    """The regular, bold, italic and bold italic face of each family, as far as names of styles tell.

    Args:
        paths: font files. Those that FreeType cannot read are passed over.

    Returns:
        Faces by family, in the order of the families' names, the regular one first; of a family that has none of the
        four, one of the others. Which they are does not depend on where the files lie.
    """
    by_family: Dict[str, List[Face]] = {}
    for path in paths:
        for face in _faces_of(path):
            by_family.setdefault(face.family, []).append(face)
    return {family: _plainest(faces) for family, faces in sorted(by_family.items())}


def _plainest(faces: List[Face]) -> List[Face]:
    ordered = sorted(faces, key=lambda face: (face.style, os.path.basename(face.path), face.index, face.sha256))
    by_style = {face.style.lower(): face for face in reversed(ordered)}
    found = [next((by_style[style] for style in styles if style in by_style), None) for styles in _STYLES]
    return [face for face in found if face is not None] or ordered[:1]


def _faces_of(path: str) -> Iterator[Face]:
    digest = ''
    for index in range(64 if path.lower().endswith(('.ttc', '.otc')) else 1):
        try:
            family, style = ImageFont.truetype(path, 16, index).getname()
        except OSError:  # no font, or no more faces
            return
        if not digest:
            with open(path, 'rb') as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        yield Face(path, index, family or os.path.splitext(os.path.basename(path))[0], style or '', digest)
