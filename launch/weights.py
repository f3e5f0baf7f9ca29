"""Turns `--model-path` into a local folder, once per host and before any rank starts. Loads no weights.

"demo" is the folder inside the package, a folder is itself, and `org/name` is a snapshot in the Hugging Face cache.
HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's to read; no message repeats the token.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path

from runtime.config import DEMO_MODEL
from runtime.errors import InvalidInput
from runtime.models.card import read_configs

# Exact names: they leave out the variants (model.fp16.safetensors) that would be downloaded beside the full weights.
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_TOP_FILES = ("model_index.json", "framemesh.json")
_SIDE_FILES = (".json", ".txt", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model(model_path: str, revision: str | None = None, *, progress: bool = True) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        model_path: "demo", a diffusers folder, or a Hugging Face model id `org/name`.
        revision: branch, tag or commit of a model id.
        progress: show the download on a terminal.

    Raises:
        InvalidInput: there is no such model, it may not be read, or the local copy is incomplete; says what to do.
    """
    demo = model_path == DEMO_MODEL
    folder = Path(str(files("workers.demo") / "model")) if demo else Path(os.path.expanduser(model_path))
    if not model_path or not folder.is_dir():
        check_model_id(model_path)
        return _from_hub(model_path, revision, progress)
    if revision is not None:
        raise InvalidInput("revision", f"{model_path} is a folder, and only a Hugging Face model id has revisions")
    return folder.absolute()


def check_model_id(model_path: str) -> None:
    """Refuse what is no folder and cannot be a Hugging Face model id; asks nobody.

    Raises:
        InvalidInput: names `model_path`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isfile(os.path.expanduser(model_path)):
        raise InvalidInput("model_path", f"{model_path} is a file; give the diffusers folder with model_index.json")
    if model_path.startswith((".", "/", "~")) or model_path.count("/") > 1:
        raise InvalidInput("model_path", f"there is no folder {model_path}; give a diffusers folder or a model id")
    try:
        validate_repo_id(model_path)
    except HFValidationError:
        model_path = model_path or "an empty string"
    else:
        if "/" in model_path:
            return
    raise InvalidInput("model_path", f"{model_path} is neither a folder nor a Hugging Face model id (org/name)")


def _from_hub(repo_id: str, revision: str | None, progress: bool) -> Path:
    with _refusals_explained(repo_id, revision):
        outage = _hub_outage(repo_id, revision)
        folder = _cached(repo_id, revision, outage) if outage else _downloaded(repo_id, revision, progress)
    read_configs(folder)
    return folder


def _hub_outage(repo_id: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked, or None. A refusal is an answer, and raises."""
    import httpx2
    from huggingface_hub import HfApi, constants, errors

    try:
        # snapshot_download asks the same without a timeout: a firewall that drops packets would hold the start up.
        HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status != 429 and status < 500:
            raise
        return f"{constants.ENDPOINT} answered {status}"
    except (httpx2.NetworkError, httpx2.TimeoutException, httpx2.ProxyError, httpx2.RemoteProtocolError) as error:
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return None


def _cached(repo_id: str, revision: str | None, outage: str) -> Path:
    """The snapshot that is in the cache, if it is complete."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=["model_index.json"], local_files_only=True)
        )
    except errors.LocalEntryNotFoundError as error:
        wanted = repo_id if revision is None else f"{repo_id} at {revision}"
        raise InvalidInput(
            "model_path",
            f"{outage}, and the cache {constants.HF_HUB_CACHE} has no copy of {wanted}; "
            "start once with the network, or give a folder",
        ) from error
    missing = [name for name in _needed_files(repo_id, folder) if not (folder / name).is_file()]
    if missing:
        raise InvalidInput(
            "model_path",
            f"{outage}, and the cached copy of {repo_id} lacks {missing[0]} ({len(missing)} missing in "
            "all); start once with the network to complete it",
        )
    print(f"framemesh: {outage}; using the cached copy {folder}", file=sys.stderr)
    return folder


def _downloaded(repo_id: str, revision: str | None, progress: bool) -> Path:
    """The snapshot, its missing files fetched: first the index, then from the same commit what the index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    with disable_progress_bars():
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_TOP_FILES)))
    if not (folder / "model_index.json").is_file():
        raise InvalidInput("model_path", f"{repo_id} has no model_index.json, so it is no diffusers pipeline")
    with nullcontext() if progress and sys.stderr.isatty() else disable_progress_bars():
        snapshot_download(repo_id, revision=folder.name, allow_patterns=_needed_files(repo_id, folder))
    return folder


def _needed_files(repo_id: str, snapshot: Path) -> list[str]:
    """What a pipeline needs of the snapshot's commit; empty if the cache has no listing of that commit.

    Raises:
        InvalidInput: a component has weights, but none that may be loaded.
    """
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        paths = [file.path for file in get_cached_repo_tree(repo_id, revision=snapshot.name)]
    except errors.CachedRepoTreeNotFoundError:
        # Snapshots of huggingface_hub 1 and before have none; read_configs still checks their weights.
        return []
    needed = [path for path in paths if path in _TOP_FILES]
    for component in _components(snapshot):
        names = [path.removeprefix(f"{component}/") for path in paths if os.path.dirname(path) == component]
        _check_weights(repo_id, component, names)
        needed += [f"{component}/{n}" for n in names if n.endswith(_SIDE_FILES) or _WEIGHTS.fullmatch(n)]
    return needed


def _components(snapshot: Path) -> list[str]:
    try:
        index = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict):
        return []  # read_configs says what is wrong with it
    return [name for name, source in index.items() if isinstance(source, list) and source[:1] not in ([], [None])]


def _check_weights(repo_id: str, component: str, names: list[str]) -> None:
    weights = [name for name in names if name.endswith((*_PICKLES, ".safetensors"))]
    if not weights or any(_WEIGHTS.fullmatch(name) for name in weights):
        return
    reason = "a pickle, which can run code when it is loaded" if weights[0].endswith(_PICKLES) else "a variant"
    raise InvalidInput(
        "model_path",
        f"{repo_id} has the weights of {component} only as {weights[0]}, {reason}; "
        "take a repository with model.safetensors or diffusion_pytorch_model.safetensors",
    )


@contextmanager
def _refusals_explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """What the hub or the disk refuses, as `InvalidInput` with what would be right."""
    import httpx2
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except InvalidInput:
        raise
    except (httpx2.LocalProtocolError, UnicodeEncodeError):
        # Not chained: this error quotes the Authorization header.
        raise InvalidInput("model_path", "HF_TOKEN has characters that no token has; copy it again") from None
    except errors.GatedRepoError as error:
        raise InvalidInput(
            "model_path", f"{repo_id} is gated; accept the licence at {page}, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidInput("revision", f"{repo_id} has no branch, tag or commit {revision}; see {page}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise InvalidInput("model_path", _broken_off(error, page)) from error
    except (httpx2.InvalidURL, ValueError) as error:
        raise InvalidInput("model_path", f"{constants.ENDPOINT} is no Hugging Face hub; check HF_ENDPOINT") from error


def _broken_off(error: Exception, page: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response.status_code in {401, 403, 404}:
        status = error.response.status_code
        return f"{page} does not exist or may not be read ({status}); check the id, and HF_TOKEN if it is private"
    reason = str(error).strip().partition("\n")[0]
    return f"{page} was not downloaded ({type(error).__name__}: {reason}); start again, complete files are kept"
