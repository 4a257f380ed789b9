"""Importing from the Hugging Face hub: the one part of the registry that touches the network.

A branch or tag is pinned to its commit first; only safetensors, config and tokenizer files are fetched, into the
hub's own cache, from which the directory import shares them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harmony_core.errors import NotFoundError, ResourceError, UsageError, VerificationError
from harmony_core.model_spec import read_config
from harmony_core.registry.content import SLOW_TOKENIZERS, TOKENIZER_FILES
from harmony_core.registry.files import storage_error
from harmony_core.registry.importing import ImportOptions, import_directory
from harmony_core.registry.versions import ModelVersion
from harmony_core.weight_files import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from harmony_core.registry.store import Registry

_SOURCE = re.compile(
    r"hf:([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([A-Za-z0-9._/-]{1,200}))?"
)
_PATTERNS = (
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "chat_template.json",
    *TOKENIZER_FILES,
)


def import_hub(registry: Registry, key: str, source: str, options: ImportOptions) -> ModelVersion:
    """Import `hf:org/name[@revision]`. Raises NotFoundError, ResourceError (network, offline), or a refusal."""
    match = _SOURCE.fullmatch(source)
    if not match:
        raise UsageError(f"{source[:200]!r} is not a hub id", hint="hf:org/name or hf:org/name@revision")
    name, revision = match[1], match[2]
    directory, commit = _fetch(name, revision)
    return import_directory(registry, key, directory, options, source=f"hf:{name}@{commit}")


def _fetch(name: str, revision: str | None) -> tuple[Path, str]:
    """The snapshot directory and its commit; a model that would be refused is refused before its weights come."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _typed(name, revision):
        if constants.is_offline_mode():
            directory = Path(api.snapshot_download(name, revision=revision, local_files_only=True))
        else:
            info = api.model_info(name, revision=revision)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            _refuse_early(api, name, str(info.sha), names)
            # By branch rather than by commit: so the cache learns what the branch means, for when there is no network.
            directory = Path(api.snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    return directory, directory.name


def _refuse_early(api: HfApi, name: str, commit: str, names: list[str]) -> None:
    """Look at the list of files and at the config before anything large is fetched."""
    pickled = [file for file in names if Path(file).suffix in PICKLE_SUFFIXES]
    if not any(file.endswith(".safetensors") and "/" not in file for file in names):
        reason = f"only pickled weights, which are never read ({pickled[0]})" if pickled else "no safetensors weights"
        raise VerificationError(f"hf:{name}: {reason}", hint="another repository may hold it converted")
    slow = [file for file in names if file in SLOW_TOKENIZERS]
    if slow and "tokenizer.json" not in names:
        raise VerificationError(
            f"hf:{name}: a tokenizer without tokenizer.json ({slow[0]})",
            hint="save it once with transformers (AutoTokenizer...save_pretrained), and add that directory",
        )
    if "adapter_config.json" in names:
        return
    if "config.json" not in names:
        raise VerificationError(f"hf:{name}: holds neither config.json nor adapter_config.json")
    read_config(Path(api.hf_hub_download(name, "config.json", revision=commit)).parent)


@contextlib.contextmanager
def _typed(name: str, revision: str | None) -> Iterator[None]:
    """Turn the client's exceptions into ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ResourceError(
            f"hf:{name} is gated", hint=f"accept its terms at the hub's page of {name}, then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"the hub has no model {name!r}, or it is private", hint="check the name; for a private one: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"hf:{name} has no revision {revision!r}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ResourceError(
            f"hf:{name} cannot be fetched: {_first_line(error)}",
            hint="without a network, import a directory: adaptive models add KEY DIRECTORY",
        ) from error
    # The client's HTTP library, whose name depends on the client's version.
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        raise ResourceError(f"hf:{name} cannot be fetched: {_first_line(error)}", hint="try again later") from error
    except OSError as error:
        raise storage_error(f"cannot fetch hf:{name}", error) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
