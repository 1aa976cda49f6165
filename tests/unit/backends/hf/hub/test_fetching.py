"""Adapters on a hub: what is asked of it, what is fetched, and what an error says."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.checkpoints.hub.locator import Locator
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendLoadError, SpecError, SwayError, WeightsError
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.offline import go_offline
from tests.hub import Files, ToyHub, commit_of, cut, error, files_of, lay_out, use_hub
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from werkzeug import Request, Response

_PLACED: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _spec(base: Path | str, adapter: str = "org/lora", **fields: Any) -> ModelSpec:
    return ModelSpec(**{"base": str(base), "adapter": adapter, **_PLACED, **fields})


def _located(spec: ModelSpec) -> ModelSpec:
    """The spec as a new run finds it."""
    return Locator()(spec)


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_an_adapter_on_a_hub_is_the_same_adapter_in_a_folder(
    hub: ToyHub, base: Path, adapter: Path, adapter_files: Files
) -> None:
    hub.push("org/lora", adapter_files)
    backend = Builder()(_spec(base))
    with backend.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))
    backend.close()


def test_the_files_that_say_how_to_pool_are_fetched(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    further = {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "sentence_bert_config.json": b"{}"}
    hub.push("org/lora", {**adapter_files, **further})
    folder = Path(str(_located(_spec(base)).adapter))
    assert [name for name in further if not (folder / name).is_file()] == []


def test_each_adapter_of_a_list_may_be_on_a_hub(
    hub: ToyHub, base: Path, adapter: Path, other_adapter: Path, adapter_files: Files
) -> None:
    hub.push("org/lora", {f"a/{name}": content for name, content in adapter_files.items()}, branch="v2")
    hub.push("org/other", files_of(other_adapter))
    build = Builder()
    on_hub = ModelSpec(adapter=("hf://org/lora@v2/a", "org/other"), **_PLACED)
    in_folders = ModelSpec(base=str(base), adapter=(adapter, other_adapter), **_PLACED)
    logits_of_both = []
    for spec in (on_hub, in_folders):
        backend = build(spec)
        with backend.as_finetuned() as view:
            logits_of_both.append(view_logits(view))
        backend.close()
    assert logits_of_both[0].equal(logits_of_both[1])
    found = build.resolve(on_hub)
    assert (found.base, [type(each) for each in found.adapters]) == (str(base), [type(base)] * 2)
    assert re.fullmatch(
        r".* \(from adapter_config\.json\) \+ org/lora@[0-9a-f]{7}/a \+ org/other@[0-9a-f]{7}", str(found)
    )


def test_a_hub_adapter_of_a_list_that_becomes_a_folder_is_that_folder(cache: Path, adapter: Path) -> None:
    spec = ModelSpec(adapter=(adapter, "org/lora"), **_PLACED)
    shutil.copytree(adapter, cache.parent / "org/lora")
    assert _located(spec).adapters == (adapter, cache.parent / "org/lora")


def test_only_what_an_adapter_needs_is_fetched(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    others = dict.fromkeys(("README.md", "optimizer.pt", "model.safetensors", "all_results.json", "sub/a.json"), b"x")
    needed = {"tokenizer.json": b"{}", "chat_template.jinja": b"t", "additional_chat_templates/tool.jinja": b"u"}
    hub.push("org/lora", {_CONFIG: adapter_files[_CONFIG], _WEIGHTS: adapter_files[_WEIGHTS], **needed, **others})
    folder = _located(_spec(base)).adapter
    found = {str(path.relative_to(str(folder))) for path in folder.rglob("*") if path.is_file()}  # type: ignore[union-attr]
    assert found == {_CONFIG, _WEIGHTS, *needed}


def test_an_adapter_of_mlx_lm_has_its_own_weights(hub: ToyHub) -> None:
    config = json.dumps({"fine_tune_type": "lora", "model": "org/b"}).encode()
    hub.push("org/lora", {_CONFIG: config, "adapters.safetensors": b"x", "0000100_adapters.safetensors": b"y"})
    spec = _located(ModelSpec(kind="mlx", adapter="org/lora", **_PLACED))
    assert sorted(path.name for path in Path(str(spec.adapter)).iterdir()) == [_CONFIG, "adapters.safetensors"]
    assert spec.base == "org/b"


def test_the_second_run_asks_once_for_a_branch_and_not_for_a_commit(
    hub: ToyHub, base: Path, adapter_files: Files
) -> None:
    commit = hub.push("org/lora", adapter_files)
    first = _located(_spec(base))
    fetched = hub.take_requests()
    assert len([each for each in fetched if each.startswith("GET /org/lora/")]) == len(
        [name for name in adapter_files if name != "README.md"]
    )
    assert _located(_spec(base)) == first
    assert hub.take_requests() == [f"HEAD /org/lora/resolve/main/{_CONFIG}"]
    assert _located(_spec(base, adapter_revision=commit)) == first
    assert hub.take_requests() == []


def test_a_run_asks_once_however_often_it_is_asked(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    locator = Locator()
    first = locator(_spec(base))
    hub.take_requests()
    assert locator(_spec(base)) is first
    assert hub.take_requests() == []


def test_threads_that_ask_at_once_ask_the_hub_once(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    locator, start = Locator(), Barrier(4)

    def ask(_: int) -> ModelSpec:
        start.wait()
        return locator(_spec(base))

    with ThreadPoolExecutor(4) as threads:
        assert len({str(spec) for spec in threads.map(ask, range(4))}) == 1
    assert hub.take_requests().count(f"HEAD /org/lora/resolve/main/{_CONFIG}") == 1


def test_a_branch_that_has_moved_is_fetched_anew(
    hub: ToyHub, base: Path, adapter_files: Files, other_adapter: Path
) -> None:
    hub.push("org/lora", adapter_files)
    first = _located(_spec(base))
    hub.push("org/lora", adapter_files | {_WEIGHTS: (other_adapter / _WEIGHTS).read_bytes()})
    assert resolved_key(_located(_spec(base))) != resolved_key(first)


def test_revisions_of_equal_files_are_one(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    hub.push("org/lora", adapter_files | {"README.md": b"new"}, branch="v2")
    keys = {resolved_key(_located(_spec(base, **fields))) for fields in ({}, {"adapter_revision": "v2"})}
    assert len(keys) == 1


def test_an_adapter_may_be_in_a_subfolder(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", {f"runs/a/{name}": content for name, content in adapter_files.items()})
    spec = _located(_spec(base, adapter_subfolder="runs/a"))
    assert Builder().check(spec).read.config["peft_type"] == "LORA"
    hub.take_requests()
    assert _located(_spec(base, "hf://org/lora@main/runs/a")) == spec
    assert hub.take_requests() == [f"HEAD /org/lora/resolve/main/runs/a/{_CONFIG}"]


def test_the_label_names_the_repository_and_the_commit(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    commit = hub.push("org/lora", adapter_files, branch="v1")
    spec = _spec("org/base", adapter_revision="v1")
    assert str(spec) == "org/base + org/lora@v1"
    assert str(_located(spec)) == f"org/base + org/lora@{commit[:7]}"


def test_a_folder_that_is_there_goes_before_a_hub_id(
    hub: ToyHub, base: Path, adapter: Path, tmp_path: Path, adapter_files: Files
) -> None:
    hub.push("runs/v3", adapter_files)
    spec = _spec(base, "runs/v3")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/v3").symlink_to(adapter)
    assert _located(spec).adapter == _spec(base, "runs/v3").adapter == adapter
    assert hub.take_requests() == []
    assert _located(_spec(base, "hf://runs/v3")).adapter != adapter


def test_a_fetch_is_shown_while_it_lasts(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files, branch="v1")
    shown: list[str] = []

    @contextmanager
    def fetching(what: str) -> Iterator[None]:
        shown.append(what)
        yield
        shown.append(f"{len(hub.take_requests())} requests")

    Locator(fetching)(_spec(base, adapter_revision="v1"))
    assert shown[0] == "the adapter 'org/lora' in revision 'v1' from the hub"
    assert shown[1] != "0 requests"


def test_what_was_fetched_is_told_with_its_bytes(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    commit = hub.push("org/lora", adapter_files)
    told: list[tuple[str, int]] = []
    for _ in range(2):
        Locator(on_fetch=lambda name, nbytes, seconds: told.append((name, nbytes)))(_spec(base))
    name = f"org/lora@{commit[:7]}"
    assert [told[0][0], told[1]] == [name, (name, 0)]
    assert told[0][1] >= len(adapter_files[_WEIGHTS])


# --- what is cached ---------------------------------------------------------------------------------------------------


def test_offline_the_cached_snapshot_is_used(cache: Path, base: Path, adapter: Path, adapter_files: Files) -> None:
    snapshot = lay_out(cache, "org/lora", commit_of("a"), adapter_files)
    for fields in ({}, {"adapter_revision": commit_of("a")}):
        spec = _located(_spec(base, **fields))
        assert spec.adapter == snapshot
    assert Builder().check(spec).read.folder == snapshot


def test_offline_nothing_is_asked(hub: ToyHub, base: Path, cache: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    lay_out(cache, "org/lora", commit_of("a"), adapter_files)
    restore = go_offline()
    try:
        assert str(_located(_spec(base)).adapter).endswith(commit_of("a"))
        with pytest.raises(WeightsError, match="not in this machine's cache"):
            _located(_spec(base, "org/other"))
    finally:
        restore()
    assert hub.take_requests() == []


def test_offline_what_is_not_cached_is_told_with_what_to_do(cache: Path, base: Path) -> None:
    with pytest.raises(
        WeightsError,
        match=r"^the adapter 'org/lora' in revision 'v2' is no folder in '.*' and not in this machine's cache of the"
        r" hub, and this run is offline \(--sway-offline, sway_offline or HF_HUB_OFFLINE\)\. Run once online, or name"
        r" a folder\.$",
    ):
        _located(_spec(base, adapter_revision="v2"))


def test_offline_a_snapshot_without_weights_is_told(cache: Path, base: Path, adapter_files: Files) -> None:
    lay_out(cache, "org/lora", commit_of("a"), {_CONFIG: adapter_files[_CONFIG]})
    with pytest.raises(
        WeightsError, match="is in this machine's cache of the hub without its weights, and this run is off"
    ):
        _located(_spec(base))


def test_what_another_program_has_fetched_is_completed(
    hub: ToyHub, base: Path, adapter_files: Files, cache: Path
) -> None:
    commit = hub.push("org/lora", adapter_files | {"chat_template.jinja": b"t"})
    snapshot = lay_out(cache, "org/lora", commit, {name: adapter_files[name] for name in (_CONFIG, _WEIGHTS)})
    assert _located(_spec(base, adapter_revision=commit)).adapter == snapshot
    assert (snapshot / "chat_template.jinja").read_bytes() == b"t"
    assert f"GET /org/lora/resolve/{commit}/{_WEIGHTS}" not in hub.take_requests()


def test_a_file_that_is_gone_from_the_cache_is_fetched_again(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    commit = hub.push("org/lora", adapter_files)
    spec = _located(_spec(base, adapter_revision=commit))
    weights = spec.adapter / _WEIGHTS  # type: ignore[operator]
    weights.resolve().unlink()
    weights.unlink()
    assert (_located(_spec(base, adapter_revision=commit)).adapter / _WEIGHTS).read_bytes() == adapter_files[_WEIGHTS]  # type: ignore[operator]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def _refused(hub: ToyHub, spec: ModelSpec, kind: type[SwayError], sentence: str) -> SwayError:
    locator = Locator()
    with pytest.raises(kind, match=sentence) as caught:
        locator(spec)
    asked = len(hub.take_requests())
    with pytest.raises(kind, match=re.escape(str(caught.value))):
        locator(spec)
    assert bool(hub.take_requests()) is not caught.value.permanent, asked
    return caught.value


def test_a_repository_that_is_not_there(hub: ToyHub, base: Path) -> None:
    _refused(
        hub,
        _spec(base),
        SpecError,
        r"^the adapter 'org/lora' is no folder in '.*', and http://localhost:\d+ has no such repository, or a private"
        r" one \(HTTP 401\)\. Name a folder, or a repository as org/name; for a private one, log in"
        r" \(hf auth login, or the environment variable HF_TOKEN\)\.$",
    )


@pytest.mark.parametrize(
    ("made", "hint"),
    [
        (["runs/a", "runs/v30"], r" The folder 'runs' holds a, v30\. Did you mean 'runs/v30'\?$"),
        (["runs"], r" The folder 'runs' holds no folders\.$"),
        (["run/v3"], r" Did you mean 'run/v3'\?$"),
    ],
)
def test_a_folder_that_was_meant_is_named(hub: ToyHub, base: Path, tmp_path: Path, made: list[str], hint: str) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    _refused(hub, _spec(base, "runs/v3"), SpecError, hint)


def test_a_revision_that_is_not_there(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    _refused(
        hub,
        _spec(base, adapter_revision="v9"),
        SpecError,
        r"^spec field 'adapter_revision': the repository 'org/lora' has no branch, tag or commit 'v9'\. Those it has",
    )


@pytest.mark.parametrize(
    ("files", "fields", "advice"),
    [
        (["a/adapter_config.json", "b/adapter_config.json"], {}, "It has one in a, b: say so in 'adapter_subfolder'."),
        (["adapter_config.json"], {"adapter_subfolder": "c"}, "It has one in its root: leave 'adapter_subfolder' out."),
        (["config.json"], {}, "It may hold a whole model: name that as 'base' or 'finetuned'."),
        (["README.md"], {}, "Name a repository into which PEFT's push_to_hub or save_pretrained has written."),
    ],
)
def test_a_repository_without_an_adapter_there(
    hub: ToyHub, base: Path, files: list[str], fields: dict[str, Any], advice: str
) -> None:
    hub.push("org/lora", dict.fromkeys(files, b"{}"))
    place = "c/" if fields else ""
    _refused(
        hub,
        _spec(base, **fields),
        SpecError,
        rf"is no adapter: http://localhost:\d+/org/lora has no {place}adapter_config.json\. {re.escape(advice)}$",
    )


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ("hf://org/runs", r"It has one in a, b: say so in its address, 'hf://org/runs/b'\.$"),
        ("hf://org/runs@main", r"It has one in a, b: say so in its address, 'hf://org/runs@main/b'\.$"),
        ("hf://org/lora/c", r"It has one in its root: leave the folder in its address out\.$"),
        ("hf://org/lora@v9", r"^spec field 'adapter': the repository 'org/lora' has no branch, tag or commit 'v9'\."),
    ],
)
def test_the_error_of_an_adapter_in_a_list_names_no_field_of_a_single_one(
    hub: ToyHub, base: Path, adapter: Path, adapter_files: Files, other: str, sentence: str
) -> None:
    hub.push("org/lora", adapter_files)
    hub.push("org/runs", dict.fromkeys(("a/adapter_config.json", "b/adapter_config.json"), b"{}"))
    with pytest.raises(SpecError, match=sentence):
        Builder().resolve(ModelSpec(base=str(base), adapter=(adapter, other), **_PLACED))


def _always(answer: Response) -> Any:
    return lambda request: answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            error(403, "GatedRepo", "Access to model org/lora is restricted"),
            r"is in a gated repository, which the hub does not let you read \(HTTP 403\)\. Accept its terms at"
            r" http://localhost:\d+/org/lora, log in \(hf auth login, or",
        ),
        (
            error(401, "GatedRepo", "Access is restricted"),
            r"is in a gated repository, .* \(HTTP 401\)\. Accept its terms",
        ),
        (
            error(401, "", "Invalid credentials in Authorization header"),
            r"was refused by http://localhost:\d+ \(HTTP 401\)\. Log in with an account that may read it",
        ),
        (error(403), r"was refused by http://localhost:\d+ \(HTTP 403\)\. Log in"),
        (error(404), r"has no such repository, or a private one \(HTTP 404\)"),
    ],
)
def test_what_a_hub_refuses_is_not_asked_again(hub: ToyHub, base: Path, answer: Response, sentence: str) -> None:
    hub.refuses = _always(answer)
    _refused(hub, _spec(base), SpecError, sentence)


def test_no_secret_of_an_endpoint_is_shown(hub: ToyHub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = hub.url.replace("//", "//me:hunter22@")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with use_hub(monkeypatch, endpoint), pytest.raises(SpecError, match="has no such repository") as caught:
        BackendCache().resolve(_spec(base))
    assert "hunter22" not in "".join(traceback.format_exception(caught.value))


def test_a_hub_that_is_down_is_asked_again(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", adapter_files)
    hub.refuses = _always(error(503))
    _refused(
        hub,
        _spec(base),
        BackendLoadError,
        r"^the adapter 'org/lora' could not be fetched from http.*503.* Run again; set HF_HUB_OFFLINE=1",
    )
    hub.refuses = _always(None)  # type: ignore[arg-type]
    assert _located(_spec(base)).adapter is not None


def test_a_download_that_is_cut_is_told_and_goes_on_in_the_next_request(
    hub: ToyHub, base: Path, adapter: Path, adapter_files: Files
) -> None:
    hub.push("org/lora", adapter_files)
    cuts = [cut(adapter_files[_WEIGHTS])]

    def refuses(request: Request) -> Response | None:
        if request.method == "GET" and request.path.endswith(_WEIGHTS):
            return cuts.pop() if cuts else error(500)
        return None

    hub.refuses = refuses
    locator = Locator()
    with pytest.raises(BackendLoadError, match=r"^the adapter 'org/lora' could not be fetched from .* Run again"):
        locator(_spec(base))
    hub.refuses = _always(None)  # type: ignore[arg-type]
    hub.take_requests()
    spec = locator(_spec(base))
    assert (spec.adapter / _WEIGHTS).read_bytes() == adapter_files[_WEIGHTS]  # type: ignore[operator]
    asked = hub.take_requests()
    assert not any(each.startswith("GET") and each.endswith(_CONFIG) for each in asked)


def test_a_hub_that_cannot_be_reached(hub: ToyHub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        use_hub(monkeypatch, "http://127.0.0.1:9"),
        pytest.raises(BackendLoadError, match=r"could not be fetched from http://127.0.0.1:9: Connect.* Run again"),
    ):
        _located(_spec(base))


def test_a_hub_that_cannot_be_reached_is_not_needed_for_what_is_cached(
    hub: ToyHub, base: Path, adapter_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/lora", adapter_files)
    spec = _located(_spec(base))
    with use_hub(monkeypatch, "http://127.0.0.1:9"):
        assert _located(_spec(base)) == spec


def test_a_cache_that_cannot_be_written_to_is_asked_about_again(
    hub: ToyHub, base: Path, adapter_files: Files, cache: Path
) -> None:
    commit = hub.push("org/lora", adapter_files)
    lay_out(cache, "org/lora", commit, adapter_files).parents[1].joinpath(".pytest-sway").touch()
    for _ in range(2):
        assert _located(_spec(base, adapter_revision=commit)).adapter is not None
        assert hub.take_requests() == [f"GET /api/models/org/lora/tree/{commit}"]


def test_weights_that_are_only_a_pickle_are_not_fetched(hub: ToyHub, base: Path, adapter_files: Files) -> None:
    hub.push("org/lora", {_CONFIG: adapter_files[_CONFIG], "adapter_model.bin": b"pickled"})
    _refused(
        hub, _spec(base), WeightsError, r"^the adapter 'org/lora' has its weights only in adapter_model.bin, a pickle"
    )
    folder = _located(_spec(base, allow_pickle=True)).adapter
    assert (folder / "adapter_model.bin").read_bytes() == b"pickled"  # type: ignore[operator]


# --- the base that an adapter names -----------------------------------------------------------------------------------


def test_the_base_of_an_adapter_on_a_hub_is_the_one_it_names(hub: ToyHub, adapter_files: Files) -> None:
    config = json.loads(adapter_files[_CONFIG]) | {"base_model_name_or_path": "org/base", "revision": "v7"}
    commit = hub.push("org/lora", adapter_files | {_CONFIG: json.dumps(config).encode()})
    spec = _located(_spec(""))
    assert (spec.base, spec.revision) == ("org/base", "v7")
    assert str(spec) == f"org/base (from adapter_config.json) + org/lora@{commit[:7]}"
