"""What MkDocs has to know of this repository: pages that are not in ``docs/``, and links that leave it.

The start page is the README, so that the site and the repository have one text. The commands are what each program
prints for ``--help``.
"""

import contextlib
import io
import os
import posixpath
import re
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Callable

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import timm_gpd.coverage
import timm_gpd.data.glyphs.command
import timm_gpd.hub
from timm_gpd.training.args import train_parser, validate_parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = 'docs'
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
PARSERS = {'train.py': train_parser, 'validate.py': validate_parser}
LINK = re.compile(r'(?<![!\w)\]])\[([^\]]*)\]\(([^)\s]+)\)')
IMAGE_OF_README = re.compile(r'(!\[[^\]]*\]\()docs/')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in ``docs/``."""
    for source, page in PAGES.items():
        text = IMAGE_OF_README.sub(r'\1', (ROOT / source).read_text())
        files.append(File.generated(config, page, content=LINK.sub(lambda link: resolved(link, ''), text)))
    files.append(File.generated(config, 'commands.md', content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves the links of a page of ``docs/`` that lead out of it."""
    if page.file.generated_by is not None:
        return markdown
    return LINK.sub(lambda link: resolved(link, DOCS), markdown)


def resolved(link: 're.Match[str]', folder: str) -> str:
    """A link of a file in ``folder``, for the site: to a page, or to nothing where the site has no such page.

    Raises:
        PluginError: if there is no such file.
    """
    text, target = link.groups()
    if re.match(r'[a-z]+:|#', target):
        return link[0]
    target, _, anchor = target.partition('#')
    path = posixpath.normpath(posixpath.join(folder, target))
    if not (ROOT / path).exists():
        raise PluginError(f'there is no {path}, to which a file in {folder or "the root"} links')
    if path in PAGES:
        path = posixpath.join(DOCS, PAGES[path])
    if not path.startswith(f'{DOCS}/'):
        return text  # source code
    return f'[{text}]({path[len(DOCS) + 1 :]}{"#" if anchor else ""}{anchor})'


def commands() -> str:
    """The page of all commands."""
    parts = [
        '# Commands',
        'What each command prints for `--help`. [Flags](flags.md) compares those of `train.py` and `validate.py` with '
        'timm. These two programs are in the repository, not in the wheel.',
    ]
    programs = {
        **{name: partial(print_help, create, name) for name, create in PARSERS.items()},
        **{
            f'python -m timm_gpd.hub {name}': partial(timm_gpd.hub.main, [name, '--help'])
            for name in ('push', 'pull', 'convert')
        },
        'python -m timm_gpd.data.glyphs': partial(timm_gpd.data.glyphs.command.main, ['--help']),
        'python -m timm_gpd.coverage': partial(timm_gpd.coverage.main, ['--help']),
    }
    os.environ['COLUMNS'] = '100'
    for name, program in programs.items():
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            program()
        parts += [f'## {name}', f'```text\n{printed.getvalue().rstrip()}\n```']
    return '\n\n'.join(parts)


def print_help(create: Callable[[], ArgumentParser], name: str) -> None:
    """What a program of the repository prints, which takes its name from the command line."""
    parser = create()
    parser.prog = name
    parser.print_help()
