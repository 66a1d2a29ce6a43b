"""Talking to the Hub through huggingface_hub: what went wrong is said in one line."""

from contextlib import contextmanager
from typing import Iterator, Optional

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UsageError, first_line
from ..version import __version__

__all__ = ['LIBRARY', 'create_api', 'hub_errors']

LIBRARY = 'timm-gpd'


def create_api() -> HfApi:
    """The Hub's client, which tells the server who asks."""
    return HfApi(library_name=LIBRARY, library_version=__version__)


@contextmanager
def hub_errors(repo_id: str, revision: Optional[str]) -> Iterator[None]:
    """Says in one line what went wrong between huggingface_hub and the server.

    Args:
        repo_id: ``namespace/name`` that is talked about.
        revision: its branch, tag or commit, if one was asked for.

    Raises:
        UsageError: in the place of any error of huggingface_hub, of the network or of the file system.
    """
    server = constants.ENDPOINT
    cache = f'what was downloaded before is in {constants.HF_HUB_CACHE} (HF_HUB_CACHE), and HF_HUB_OFFLINE=1 uses it'
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except HFValidationError as error:
        raise UsageError(first_line(error)) from error
    except RevisionNotFoundError as error:
        raise UsageError(f'{repo_id} has no revision {revision}: check --revision') from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f'{repo_id} was not found at {server}, or the token may not see it: check the name, and '
            'HF_TOKEN or `hf auth login`'
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UsageError(
                f'{server} refused the token for {repo_id} ({status}): set HF_TOKEN, or run '
                '`hf auth login`, with a token that has the permission'
            ) from error
        raise UsageError(
            f'{server} answered {status} for {repo_id}: {error.server_message or "no reason given"}; try again later'
        ) from error
    except OfflineModeIsEnabled as error:
        raise UsageError('HF_HUB_OFFLINE is set, and this needs the Hub: unset it') from error
    except LocalEntryNotFoundError as error:
        why = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else f'{server} cannot be reached'
        raise UsageError(
            f'{why}, and {repo_id} is not in the cache, {constants.HF_HUB_CACHE} (HF_HUB_CACHE): check '
            'the network, HF_ENDPOINT and HF_HUB_OFFLINE'
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise UsageError(
            f'the transfer with {server} broke off: {first_line(cause)}; run the same command again, or '
            f'check the network and HF_ENDPOINT ({cache})'
        ) from error
