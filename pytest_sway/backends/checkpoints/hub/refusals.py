"""Why an adapter or model cannot be fetched from a hub, in words: which field asked, what was found and what to do."""

from __future__ import annotations

import difflib
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.hub_files import WHILE_OFFLINE, is_offline
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG
from pytest_sway.errors import BackendLoadError, SpecError, SwayError, WeightsError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_REFUSED: Final = (401, 403)
_LOGIN: Final = "hf auth login, or the environment variable HF_TOKEN"


class HubAdapter(NamedTuple):
    """An adapter on a hub.

    Attributes:
        repository: The id of its repository.
        revision: A commit, branch or tag; ``None`` for the repository's default.
        subfolder: Its folder in the repository; ``None`` for the root.
        allow_pickle: Whether weights may come as a pickle.
        alone: Whether it is the spec's only adapter, so that fields of the spec are about it.
    """

    repository: str
    revision: str | None
    subfolder: str | None
    allow_pickle: bool
    alone: bool = True

    @property
    def place(self) -> tuple[object, ...]:
        """What its folder on this machine depends on."""
        return self.repository, self.revision, self.subfolder, self.allow_pickle

    @property
    def field(self) -> str:
        """The field of its revision in a spec."""
        return "adapter_revision" if self.alone else "adapter"

    def __str__(self) -> str:
        revision = "" if self.revision is None else f" in revision {self.revision!r}"
        inside = "" if self.subfolder is None else f" in the folder {self.subfolder!r}"
        return f"the adapter {self.repository!r}{inside}{revision}"

    def path(self, name: str) -> str:
        """The path of one of its files in the repository."""
        return name if self.subfolder is None else f"{self.subfolder}/{name}"


class HubModel(NamedTuple):
    """A base or a whole fine-tuned model on a hub.

    Attributes:
        repository: The id of its repository.
        revision: A commit, branch or tag; ``None`` for the repository's default.
    """

    repository: str
    revision: str | None

    @property
    def field(self) -> str:
        """The field of its revision in a spec."""
        return "revision"

    def __str__(self) -> str:
        return f"the model {self.repository!r}{'' if self.revision is None else f' in revision {self.revision!r}'}"


@contextmanager
def explained_model(spec: ModelSpec) -> Iterator[None]:
    """Explain an error of a hub's that a library has met while it loaded a spec's base, and leave others alone."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, SwayError) and not isinstance(error, BackendLoadError)
        cause = None if told or is_path(spec.base) else _of_hub(error)
        if cause is None:
            raise
        raise _explanation(HubModel(spec.base, spec.revision), cause) from error


def _of_hub(error: BaseException) -> Exception | None:
    """The error by which a hub refused a repository or a revision, or could not be asked, among an error's causes."""
    try:
        from huggingface_hub import errors
    except ImportError:
        return None
    of_hub = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError)
    seen: list[BaseException] = []  # an error that was raised twice may be its own cause
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if isinstance(found, of_hub):
            no_file = isinstance(found, errors.EntryNotFoundError)
            return None if no_file and not isinstance(found, errors.LocalEntryNotFoundError) else found
        if found is not None and found not in seen:
            seen.append(found)
            pending += [found.__context__, found.__cause__]
    return None


@contextmanager
def explained(asked: HubAdapter) -> Iterator[None]:
    """Turn an error of the hub's into one that names the field and says what to do."""
    try:
        yield
    except SwayError:
        raise
    except Exception as error:
        raise _explanation(asked, error) from error


def _explanation(asked: HubAdapter | HubModel, error: Exception, file: str | None = None) -> SwayError:
    """Return the error for what a hub did not give: all of what was asked for, or one file of it."""
    from huggingface_hub import errors

    nowhere = f"{asked} is no folder in {os.getcwd()!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if is_offline():
            return WeightsError(
                f"{nowhere} and not in this machine's cache of the hub, and {WHILE_OFFLINE}, or name a folder."
                f"{_meant(asked)}"
            )
        if isinstance(error.__cause__, Exception):
            error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return SpecError(f"{nowhere} and no hub id: {_said(error)}{_meant(asked)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    why = _refusal(asked, nowhere, error, status)
    if why is not None:
        return SpecError(why)
    return _not_fetched(str(asked) if file is None else f"the file {file!r} of {asked}", error)


def file_not_fetched(spec: ModelSpec, name: str, error: Exception) -> SwayError:
    """Return the error for a file of a spec's base that a hub refused, or could not be asked for.

    Args:
        spec: The spec.
        name: The file's name in the repository.
        error: What huggingface_hub raised.
    """
    return _explanation(HubModel(spec.base, spec.revision), error, name)


def _not_fetched(what: str, error: Exception) -> BackendLoadError:
    return BackendLoadError(
        f"{what} could not be fetched from {_endpoint()}: {type(error).__name__}: {_said(error)} Run again; set"
        " HF_HUB_OFFLINE=1 if the cache has all that you need; or fetch it by hand (hf download), and name its folder."
    )


def _refusal(asked: HubAdapter | HubModel, nowhere: str, error: Exception, status: int | None) -> str | None:
    """Why a hub refuses for good, as far as it says; ``None`` for what may pass."""
    from huggingface_hub import errors

    page = f"{_endpoint()}/{asked.repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{asked} is in a gated repository, which the hub does not let you read (HTTP {status}). Accept its terms"
            f" at {page}, log in ({_LOGIN}), and run again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"spec field {asked.field!r}: the repository {asked.repository!r} has no branch, tag or commit"
            f" {asked.revision!r}. Those it has are at {page}/commits."
        )
    if isinstance(error, errors.EntryNotFoundError) and status is not None and isinstance(asked, HubAdapter):
        return f"{asked} is no adapter: {page} has no {asked.path(CONFIG)}. {_elsewhere(asked)}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"{nowhere}, and {_endpoint()} has no such repository, or a private one (HTTP {status}). Name a folder,"
            f" or a repository as org/name; for a private one, log in ({_LOGIN}).{_meant(asked)}"
        )
    if status in _REFUSED:
        return (
            f"{asked} was refused by {_endpoint()} (HTTP {status}). Log in with an account that may read it ({_LOGIN},"
            " whose token may have expired), and run again."
        )
    return None


def _elsewhere(asked: HubAdapter) -> str:
    """Where else in its repository an adapter is; the hub is asked for that."""
    from huggingface_hub import HfApi

    names: list[str] = []
    with suppress(Exception):  # what is told without it is enough
        names = HfApi().list_repo_files(asked.repository, revision=asked.revision)
    folders = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == CONFIG]
    if any(folders):
        root = "; leave it out for the root" if "" in folders else ""
        at = "" if asked.revision is None else f"@{asked.revision}"
        inside = "'adapter_subfolder'" if asked.alone else f"its address, 'hf://{asked.repository}{at}/{folders[-1]}'"
        return f"It has one in {some(filter(None, folders))}: say so in {inside}{root}."
    if folders:
        what = "'adapter_subfolder'" if asked.alone else "the folder in its address"
        return f"It has one in its root: leave {what} out."
    if "config.json" in names:
        return "It may hold a whole model: name that as 'base' or 'finetuned'."
    return "Name a repository into which PEFT's push_to_hub or save_pretrained has written."


def _meant(asked: HubAdapter | HubModel) -> str:
    """A sentence on the folder that may have been meant; empty if none is like it."""
    parent, _, name = asked.repository.partition("/")
    here = _folders(Path())
    if parent in here:
        there = _folders(Path(parent))
        holds = f" The folder {parent!r} holds {some(there) or 'no folders'}."
        return holds + _did_you_mean(parent, difflib.get_close_matches(name, there, n=1))
    nearest = difflib.get_close_matches(parent, here, n=1)
    return _did_you_mean(nearest[0], {name} & set(_folders(Path(nearest[0])))) if nearest else ""


def _folders(place: Path) -> list[str]:
    try:
        return [each.name for each in place.iterdir() if each.is_dir()]
    except OSError:
        return []


def _did_you_mean(parent: str, names: Any) -> str:
    return "".join(f" Did you mean {f'{parent}/{name}'!r}?" for name in names)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.endswith(".") else f"{text}."
