"""`--model-path` to a folder, against a hub on localhost; each resolver runs in a process of its own, as in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub, Files, Repo
from safetensors.numpy import save

from launch.weights import resolve_model
from runtime.errors import InvalidInput
from runtime.models.card import card_for, read_configs

ROOT = Path(__file__).parent.parent
TOKEN = "hf_secretsecretsecret"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
PROGRAM = """
import json, sys, traceback
from launch.weights import resolve_model
heavy = sorted({"huggingface_hub", "torch"} & sys.modules.keys())
assert not heavy, heavy
for case in json.load(sys.stdin):
    try:
        answer = {"folder": str(resolve_model(*case))}
    except Exception as error:
        traceback.print_exc()
        answer = {"kind": type(error).__name__, "field": getattr(error, "field", ""), "message": str(error)}
    print(json.dumps(answer))
"""


@dataclass
class Outcome:
    answers: list[dict[str, str]]
    stderr: str

    @property
    def folder(self) -> Path:
        (answer,) = self.answers
        assert "folder" in answer, answer
        return Path(answer["folder"])

    def error(self, index: int = 0) -> str:
        answer = self.answers[index]
        assert answer.get("kind") == "InvalidInput", answer
        return answer["message"]


@dataclass(frozen=True)
class Host:
    """A machine with a Hugging Face cache."""

    endpoint: str
    home: Path
    token: str | None = None
    offline: bool = False

    def resolve(self, *cases: tuple[str, str | None] | tuple[str]) -> Outcome:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "HF_ENDPOINT": self.endpoint}
        env |= {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": str(int(self.offline))}
        if self.token is not None:
            env["HF_TOKEN"] = self.token
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM],
            input=json.dumps(cases),
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert self.token is None or self.token not in done.stdout + done.stderr
        return Outcome([json.loads(line) for line in done.stdout.splitlines()], done.stderr)


def tiny_pipeline() -> Files:
    """The demo's configs with weights of a few bytes, the transformer's in two shards, and what must stay behind."""
    model = ROOT / "workers/demo/model"
    found = {str(p.relative_to(model)): p.read_bytes() for p in sorted(model.rglob("*.json"))}
    weights = save({"weight": np.zeros(100, np.float32)})
    first = SHARD.replace("00002-of", "00001-of")
    index = {"weight_map": {"a": Path(first).name, "b": Path(SHARD).name}}
    found["transformer/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    found |= dict.fromkeys(
        (first, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"), weights
    )
    found[SHARD] = save({"weight": np.arange(50_000, dtype=np.float32)})
    return found | {"tokenizer/spiece.model": b"pieces", "tokenizer/merges.txt": b"a b"}


LEFT_BEHIND = dict.fromkeys(
    (
        "README.md",
        "tiny-fp8.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16-00001-of-00001.safetensors",
        "text_encoder/model-00001-of-00001.fp16.safetensors",
        "text_encoder/onnx/model.safetensors",
        "unused/model.safetensors",
    ),
    b"not needed",
)


@pytest.fixture
def hub():
    with FakeHub() as server:
        server.repos["org/tiny"] = Repo({"main": tiny_pipeline() | LEFT_BEHIND})
        yield server


@pytest.fixture
def host(hub, tmp_path):
    return Host(hub.url, tmp_path / "hf")


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_demo_and_a_folder_are_themselves(tmp_path, monkeypatch):
    assert card_for(read_configs(resolve_model("demo"))).family
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == tmp_path / "org/model"
    assert resolve_model("./org") == tmp_path / "org"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("./missing", "no folder"),
        ("/missing", "no folder"),
        ("~/missing", "no folder"),
        ("a/b/c", "no folder"),
        (__file__, "is a file"),
        ("missing", "org/name"),
        ("", "org/name"),
        ("org/na me", "org/name"),
        ("org/a--b", "org/name"),
    ],
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(path, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=says) as caught:
        resolve_model(path)
    assert caught.value.field == "model_path"


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(InvalidInput, match="revision: "):
        resolve_model(str(tmp_path), "main")


def test_an_id_is_downloaded_once_without_what_no_pipeline_needs(hub, host):
    first = host.resolve(("org/tiny",))
    assert first.stderr == ""
    assert files_in(first.folder) == set(tiny_pipeline())
    assert card_for(read_configs(first.folder)).family
    assert (first.folder / SHARD).read_bytes() == tiny_pipeline()[SHARD]
    hub.requests.clear()
    assert host.resolve(("org/tiny",)).folder == first.folder
    assert not [r for r in hub.requests if "/resolve/" in r.path]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, host):
    old = tiny_pipeline() | {"framemesh.json": b'{"old": 1}'}
    repo = hub.repos["org/tiny"]
    repo.revisions["v1"] = old
    outcome = host.resolve(("org/tiny", "v1"), ("org/tiny", repo.commit("v1")), ("org/tiny", None), ("org/tiny", "v2"))
    tag, commit, main = (Path(answer["folder"]) for answer in outcome.answers[:3])
    assert tag == commit != main
    assert (tag / "framemesh.json").read_bytes() == old["framemesh.json"]
    assert outcome.answers[3]["field"] == "revision"
    assert "no branch, tag or commit v2" in outcome.error(3)


def test_without_the_hub_a_complete_copy_is_used_and_said(hub, host):
    folder = host.resolve(("org/tiny",)).folder
    hub.status = 503
    down = replace(host, endpoint="http://127.0.0.1:1")
    for without, reason in (
        (host, "answered 503"),
        (down, "cannot be reached (ConnectError)"),
        (replace(host, offline=True), "HF_HUB_OFFLINE is set"),
    ):
        outcome = without.resolve(("org/tiny",))
        assert outcome.folder == folder
        (line,) = outcome.stderr.splitlines()
        assert reason in line
        assert str(folder) in line


def test_without_the_hub_an_empty_cache_says_what_to_do(host):
    for without in (replace(host, offline=True), replace(host, endpoint="http://127.0.0.1:1")):
        message = without.resolve(("org/tiny", "v1")).error()
        assert "no copy of org/tiny at v1" in message
        assert str(host.home) in message
    assert "ConnectError" in message


def test_a_copy_that_lacks_a_shard_is_named_offline_and_completed_online(hub, host):
    folder = host.resolve(("org/tiny",)).folder
    (folder / SHARD).unlink()
    offline = replace(host, offline=True)
    assert f"lacks {SHARD} (1 missing" in offline.resolve(("org/tiny",)).error()
    # Without the listing of the commit, as caches of older versions are, the shard index still tells.
    listing = folder.parent.parent / "trees" / f"{folder.name}.json"
    kept = listing.read_bytes()
    listing.unlink()
    assert f"lacks {Path(SHARD).name} (1 of 2 shards)" in offline.resolve(("org/tiny",)).error()
    listing.write_bytes(kept)
    assert files_in(host.resolve(("org/tiny",)).folder) == set(tiny_pipeline())
    assert offline.resolve(("org/tiny",)).folder == folder


def test_a_gated_model_names_its_licence(hub, host):
    hub.repos["org/tiny"] = Repo({"main": tiny_pipeline()}, gated=True, token=TOKEN)
    for refused in (host, replace(host, token="hf_wrongwrongwrong")):
        message = refused.resolve(("org/tiny",)).error()
        assert f"accept the licence at {hub.url}/org/tiny, then set HF_TOKEN" in message


def test_a_private_model_is_read_with_the_token_alone(hub, host):
    hub.repos["org/tiny"].token = TOKEN
    for refused in (host, replace(host, token="hf_wrongwrongwrong")):
        outcome = refused.resolve(("org/tiny",), ("org/missing",))
        assert "may not be read (401); check the id, and HF_TOKEN" in outcome.error()
        assert f"{hub.url}/org/missing does not exist" in outcome.error(1)
    hub.requests.clear()
    assert files_in(replace(host, token=TOKEN).resolve(("org/tiny",)).folder) == set(tiny_pipeline())
    sent = {r.authorization for r in hub.requests if "/org/tiny" in r.path}
    assert sent == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("token", ["hf_secret\x0csecret", "hf_sécret-secret"])
def test_a_token_that_no_header_can_carry_is_not_quoted(host, token):
    outcome = replace(host, token=token).resolve(("org/tiny",))
    assert "HF_TOKEN" in outcome.error()
    assert "secret" not in outcome.stderr


@pytest.mark.parametrize("only", ["pytorch_model.bin", "model.fp16.safetensors"])
def test_unusable_weights_are_refused_before_any_download(hub, host, only):
    repo = hub.repos["org/tiny"].revisions["main"]
    for name in [name for name in repo if name.startswith("text_encoder/model")]:
        del repo[name]
    repo[f"text_encoder/{only}"] = b"weights"
    message = host.resolve(("org/tiny",)).error()
    assert f"weights of text_encoder only as {only}" in message
    assert {Path(r.path).name for r in hub.requests if "/resolve/" in r.path} == {"model_index.json", "framemesh.json"}


def test_what_is_no_pipeline_or_no_hub_is_named(hub, host):
    hub.repos["org/other"] = Repo({"main": {"config.json": b"{}", "model.safetensors": b""}})
    hub.repos["org/broken"] = Repo({"main": {"model_index.json": b"{"}})
    hub.repos["org/list"] = Repo({"main": {"model_index.json": b"[]"}})
    outcome = host.resolve(("org/other",), ("org/broken",), ("org/list",))
    assert "org/other has no model_index.json" in outcome.error()
    assert "cannot be read as JSON" in outcome.error(1)
    assert "holds no JSON object" in outcome.error(2)
    hub.status = 200
    assert "check HF_ENDPOINT" in host.resolve(("org/tiny",)).error()


def test_a_download_that_is_cut_resumes_where_it_stopped(hub, host):
    chunk = 10 * 1024 * 1024  # what huggingface_hub reads, and so keeps, at once
    data = bytes(chunk) + b"the rest" * 300_000
    hub.repos["org/tiny"].revisions["main"][SHARD] = data
    hub.cut_once = {SHARD: chunk + 1000}
    assert (host.resolve(("org/tiny",)).folder / SHARD).read_bytes() == data
    assert [r.range for r in hub.downloads(SHARD)] == [None, f"bytes={chunk}-"]


def test_a_download_that_fails_is_completed_by_the_next_start(hub, host):
    hub.fail_once = {SHARD}
    message = host.resolve(("org/tiny",)).error()
    assert f"{hub.url}/org/tiny was not downloaded (HfHubHTTPError: " in message
    assert "start again" in message
    hub.requests.clear()
    assert files_in(host.resolve(("org/tiny",)).folder) == set(tiny_pipeline())
    assert len(hub.downloads(SHARD)) == 1
    assert not hub.downloads("model_index.json")
