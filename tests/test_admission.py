"""Who may ask, how much, and how a refusal looks: keys, tokens, limits, leniency, names, over real sockets."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time

import openai
import pytest
import structlog
from served import BODY, eventually

from gateway.owners import is_owned, owned_id
from launch.cli import main
from launch.client import Client
from launch.options import take_in
from launch.serve import with_own_key
from runtime.apikeys import line_for, parse_keys, read_keys
from runtime.config import Config, check_config
from runtime.errors import FramemeshError, InvalidInput
from runtime.sampling import SamplingParams

ALICE, BOB = "fm-alice", "fm-bob"
TWO_KEYS = (line_for("alice", ALICE), line_for("bob", BOB))
LONG = {"num_inference_steps": 8}


def bearer(secret):
    return {"authorization": f"Bearer {secret}"}


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


def make(gateway, secret, **changes):
    answer = gateway.http.post("/v1/videos", json=BODY | changes, headers=bearer(secret))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


# ---- lines of keys -----------------------------------------------------------------------------------------------


def test_a_line_is_a_name_a_hash_and_limits():
    (key,) = parse_keys("api_keys", [f"{line_for('alice', ALICE)}:rate=60/minute:concurrent=4", "# a remark", " "])
    assert (key.name, key.digest) == ("alice", hashlib.sha256(ALICE.encode()).digest())
    assert (key.rate.amount, key.rate.seconds, key.concurrent) == (60, 60, 4)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([ALICE], "NAME:SHA256"),
        ([f"alice:{ALICE}"], "NAME:SHA256"),
        ([f"a b:{'0' * 64}"], "NAME:SHA256"),
        ([f"{TWO_KEYS[0]}:rate=60"], "60/minute"),
        ([f"{TWO_KEYS[0]}:rate=0/minute"], "60/minute"),
        ([f"{TWO_KEYS[0]}:concurrent=0"], "1 or more"),
        ([f"{TWO_KEYS[0]}:speed=1"], "rate and concurrent"),
        ([TWO_KEYS[0], line_for("alice", BOB)], "same name"),
        ([TWO_KEYS[0], line_for("bob", ALICE)], "same key"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(lines, words):
    with pytest.raises(InvalidInput, match=words) as refused:
        parse_keys("api_keys", lines)
    assert ALICE not in str(refused.value)


def test_a_file_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n".join(TWO_KEYS))
    file.chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    assert [key.name for key in read_keys(file)] == ["alice", "bob"]
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_the_command_makes_a_key_and_its_line(capsys, tmp_path):
    assert main(["apikey", "carol"]) == 0
    secret, line = capsys.readouterr().out.split()
    assert line == line_for("carol", secret)
    assert len(secret) > 40
    assert secret not in line
    assert main(["apikey", "carol"]) == 0
    assert capsys.readouterr().out.split()[0] != secret
    assert main(["apikey", "no/name"]) == 2
    assert "letters" in capsys.readouterr().err


def test_the_server_of_one_prompt_lets_itself_in(start):
    assert with_own_key(Config(), "mine") == Config()
    config = with_own_key(Config(api_keys=TWO_KEYS), "mine")
    gateway = start(api_keys=config.api_keys)
    with Client(gateway.url, "mine") as client:
        video = client.create(SamplingParams(prompt="a", num_inference_steps=2))
        assert client.retrieve(video["id"])["id"] == video["id"]
    with Client(gateway.url, "other") as client, pytest.raises(FramemeshError, match="Incorrect API key"):
        client.create(SamplingParams(prompt="a"))


def test_keys_come_from_the_environment(tmp_path):
    settings = take_in(["serve"], {"FRAMEMESH_API_KEYS": ",".join(TWO_KEYS)}).settings
    assert settings["api_keys"].values == TWO_KEYS
    names = tmp_path / "names.yaml"
    names.write_text("served_model_name: [wan, gpt-image-1]")
    assert take_in(["serve", "--config", str(names)], {}).settings["served_model_name"].values == ("wan", "gpt-image-1")


@pytest.mark.parametrize(
    "setting",
    [
        {"api_keys": (ALICE,)},
        {"rate_limit": "many"},
        {"max_concurrent_per_key": 0},
        {"max_queue": -1},
        {"max_pixels": 0},
        {"served_model_name": ("a", "a")},
        {"served_model_name": "wan"},
        {"served_model_name": ("",)},
    ],
)
def test_wrong_settings_are_refused_at_the_start(setting):
    with pytest.raises(InvalidInput) as refused:
        check_config(Config(**setting))
    assert refused.value.field.startswith(next(iter(setting)))


def test_serve_refuses_a_wrong_file_of_keys_before_it_starts(tmp_path, capsys):
    words = ["serve", "--dry-run", "--port", "0", "--output-path", str(tmp_path)]
    assert main([*words, "--api-keys-file", str(tmp_path / "absent")]) == 2
    assert "api_keys_file" in capsys.readouterr().err


# ---- who may ask -------------------------------------------------------------------------------------------------


def test_without_keys_everybody_is_let_in(gateway):
    one = gateway.create()
    for headers in ({}, bearer("x"), {"authorization": "Basic eDp5"}):
        assert gateway.http.get(f"/v1/videos/{one}", headers=headers).status_code == 200
    token = gateway.http.post("/v1/tokens", json={"video_id": one}).json()
    assert token["token"] == ""


def test_with_keys_nobody_else_is_let_in(start):
    gateway = start(api_keys=TWO_KEYS)
    error = error_of(gateway.http.get("/v1/models"), 401)
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    wrong = gateway.http.post("/v1/videos", json=BODY, headers=bearer("fm-mallory"))
    assert "mallory" not in wrong.text
    assert error_of(wrong, 401)["message"] == "Incorrect API key provided."
    assert wrong.headers["www-authenticate"].startswith("Bearer")
    for path in ("/v1/videos", "/models", "/v1/nowhere", "/server_info", "/health/../v1/models"):
        assert gateway.http.get(path).status_code == 401
    for path in ("/health/live", "/health", "/openapi.json"):
        assert gateway.http.get(path).status_code == 200
    assert gateway.http.get("/metrics").status_code != 401
    for sent in (f"Bearer {ALICE}", f"bearer  {ALICE}"):
        assert gateway.http.get("/v1/models", headers={"authorization": sent}).status_code == 200


def test_metrics_can_be_protected(start):
    assert start(api_keys=TWO_KEYS, protect_metrics=True).http.get("/metrics").status_code == 401


def test_the_openai_sdk_sees_an_authentication_error(start):
    gateway = start(api_keys=TWO_KEYS)
    with openai.OpenAI(api_key="wrong", base_url=f"{gateway.url}/v1") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert (refused.value.code, refused.value.status_code) == ("invalid_api_key", 401)
        assert refused.value.request_id
    with openai.OpenAI(api_key=BOB, base_url=f"{gateway.url}/v1") as client:
        assert [model.id for model in client.models.list()] == ["demo"]


def test_no_key_comes_into_the_log_or_the_mesh(start, fake, logs):
    gateway = start(api_keys=TWO_KEYS)
    gateway.http.get("/v1/models", headers=bearer("fm-mallory"))
    make(gateway, ALICE)
    eventually(lambda: fake.completed)
    assert [request.key for request in fake.submitted] == ["alice"]
    assert all(word not in str(logs) for word in (ALICE, "mallory", TWO_KEYS[0].split(":")[1]))


def test_a_key_sees_its_own_videos_only(start, fake):
    fake.held = {"encode"}
    gateway = start(api_keys=TWO_KEYS)
    made = [(who, make(gateway, who)) for who in (ALICE, BOB, BOB, BOB, ALICE, BOB)]
    of_alice, of_bob = ([video for who, video in made if who == name] for name in (ALICE, BOB))
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")):
        answer = gateway.http.request(method, f"/v1/videos/{of_alice[0]}{path}", headers=bearer(BOB))
        assert error_of(answer, 404)["code"] == "video_not_found"
    assert gateway.http.get(f"/v1/videos/{of_alice[0]}", headers=bearer(ALICE)).json()["status"] != "cancelled"

    page = gateway.http.get("/v1/videos", headers=bearer(ALICE)).json()
    assert [video["id"] for video in page["data"]] == of_alice[::-1]
    first = gateway.http.get("/v1/videos", params={"limit": 1}, headers=bearer(ALICE)).json()
    assert (first["has_more"], first["last_id"]) == (True, of_alice[1])
    rest = {"limit": 1, "after": first["last_id"]}
    second = gateway.http.get("/v1/videos", params=rest, headers=bearer(ALICE)).json()
    assert (second["has_more"], second["last_id"]) == (False, of_alice[0])
    oldest = gateway.http.get("/v1/videos", params={"order": "asc", "limit": 4}, headers=bearer(BOB)).json()
    assert ([video["id"] for video in oldest["data"]], oldest["has_more"]) == (of_bob, False)
    assert gateway.http.delete(f"/v1/videos/{of_alice[0]}", headers=bearer(ALICE)).json()["deleted"] is True


def test_keys_are_read_again_when_their_file_changes(start, tmp_path, logs):
    file = tmp_path / "api-keys"
    file.touch(0o600)
    gateway = start(api_keys_file=str(file))

    def lets_in(secret):
        return gateway.http.get("/v1/models", headers=bearer(secret)).status_code == 200

    assert not lets_in(ALICE)
    file.write_text(TWO_KEYS[0])
    eventually(lambda: lets_in(ALICE))
    assert not lets_in(BOB)
    file.write_text("nonsense")
    eventually(lambda: lets_in(ALICE) and any("not usable" in entry["event"] for entry in logs))
    replacement = tmp_path / "new"
    replacement.write_text(TWO_KEYS[1])
    replacement.chmod(0o600)
    os.replace(replacement, file)
    eventually(lambda: lets_in(BOB))
    assert not lets_in(ALICE)


# ---- tokens for what sends no headers ----------------------------------------------------------------------------


def test_a_token_reads_one_video_and_nothing_else(start):
    gateway = start(api_keys=TWO_KEYS)
    mine, other = make(gateway, ALICE), make(gateway, ALICE)
    ask = {"json": {"video_id": mine, "expires_in": 60}, "headers": bearer(ALICE)}
    told = gateway.http.post("/v1/tokens", **ask).json()
    assert (told["object"], told["video_id"]) == ("token", mine)
    assert 0 < told["expires_at"] - time.time() <= 60
    token = {"token": told["token"]}
    eventually(lambda: gateway.http.get(f"/v1/videos/{mine}/content", params=token).status_code == 200)
    assert gateway.http.get(f"/v1/videos/{mine}", params=token).json()["id"] == mine
    with gateway.http.stream("GET", f"/v1/videos/{mine}/events", params=token) as events:
        assert events.status_code == 200
    refused = [
        ("GET", f"/v1/videos/{other}", token),
        ("GET", "/v1/videos", token),
        ("GET", "/v1/models", token),
        ("DELETE", f"/v1/videos/{mine}", token),
        ("POST", f"/v1/videos/{mine}/cancel", token),
        ("GET", f"/v1/videos/{mine}", {"token": told["token"][:-4] + "AAAA"}),
        ("GET", f"/v1/videos/{mine}", {"token": "\x00é"}),
        ("GET", f"/v1/videos/{mine}", {"token": "x" * 5000}),
    ]
    for method, path, params in refused:
        assert gateway.http.request(method, path, params=params).status_code == 401, (method, path)
    assert gateway.http.get(f"/v1/videos/{mine}", params=token, headers=bearer("wrong")).status_code == 401
    error = error_of(gateway.http.post("/v1/tokens", json={"video_id": mine}, headers=bearer(BOB)), 404)
    assert error["code"] == "video_not_found"


def test_a_token_ends_with_its_time_and_with_its_key(start):
    gateway = start(api_keys=TWO_KEYS)
    video = make(gateway, ALICE)
    ask = {"json": {"video_id": video, "expires_in": 60}, "headers": bearer(ALICE)}
    token = {"token": gateway.http.post("/v1/tokens", **ask).json()["token"]}
    address = f"/v1/videos/{video}"
    assert gateway.http.get(address, params=token).status_code == 200
    gateway.close()
    # A gateway whose alice has another key does not take it; another one with the same keys does.
    stranger = start(api_keys=(line_for("alice", "new"),))
    assert stranger.http.get(address, params=token).status_code == 401
    stranger.close()
    again = start(api_keys=TWO_KEYS)
    assert again.http.get(address, params=token).status_code == 200
    short = {"json": {"video_id": video, "expires_in": 1}, "headers": bearer(ALICE)}
    token = {"token": again.http.post("/v1/tokens", **short).json()["token"]}
    eventually(lambda: again.http.get(address, params=token).status_code == 401)


def test_the_address_of_an_image_opens_without_a_header_and_only_to_its_owner(start):
    gateway = start(api_keys=TWO_KEYS)
    body = {"prompt": "a", "response_format": "url", "num_inference_steps": 2}
    url = gateway.http.post("/v1/images/generations", json=body, headers=bearer(ALICE)).json()["data"][0]["url"]
    assert gateway.http.get(url).headers["content-type"] == "image/png"
    bare = url.partition("?")[0]
    assert gateway.http.get(bare).status_code == 401
    assert gateway.http.get(bare, headers=bearer(ALICE)).status_code == 200
    assert error_of(gateway.http.get(bare, headers=bearer(BOB)), 404)["code"] == "image_not_found"


def test_an_id_tells_its_owner_to_who_knows_the_name():
    made = owned_id("image", "alice")
    assert made.startswith("image_")
    assert is_owned(made, "alice")
    assert not is_owned(made, "bob")
    assert not is_owned(made[:-1] + ("0" if made[-1] != "0" else "1"), "alice")
    assert not is_owned("image_00", "alice")


# ---- how much ----------------------------------------------------------------------------------------------------


def test_a_rate_is_kept_and_told(start):
    gateway = start(api_keys=(*TWO_KEYS[:1], f"{TWO_KEYS[1]}:rate=1/hour"), rate_limit="2/minute")
    for left in (1, 0):
        answer = gateway.http.post("/v1/videos", json=BODY, headers=bearer(ALICE))
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert answer.headers["x-ratelimit-reset-requests"].endswith("ms")
    answer = gateway.http.post("/v1/videos", json=BODY, headers=bearer(ALICE))
    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 0 < int(answer.headers["retry-after-ms"]) <= 60_000
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Another key has its own; looking costs nothing; what was refused as wrong was not counted.
    assert gateway.http.get("/v1/videos", headers=bearer(ALICE)).status_code == 200
    assert gateway.http.post("/v1/videos", json={"prompt": ""}, headers=bearer(BOB)).status_code == 400
    make(gateway, BOB)
    answer = gateway.http.post("/v1/videos", json=BODY, headers=bearer(BOB))
    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
    assert 3000 < int(answer.headers["retry-after"]) <= 3600
    many = {"prompt": "a", "n": 3, "num_inference_steps": 2}
    assert error_of(gateway.http.post("/v1/images/generations", json=many, headers=bearer(ALICE)), 400)["param"] == "n"


def test_a_key_has_so_many_unfinished_at_once(start, fake):
    fake.held = {"encode"}
    gateway = start(api_keys=(*TWO_KEYS[:1], f"{TWO_KEYS[1]}:concurrent=1"), max_concurrent_per_key=2)
    first, second = make(gateway, ALICE), make(gateway, ALICE)
    eventually(lambda: gateway.http.get(f"/v1/videos/{second}", headers=bearer(ALICE)).json()["eta_s"] is not None)
    answer = gateway.http.post("/v1/videos", json=BODY, headers=bearer(ALICE))
    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
    # The fake mesh predicts 3 or 4 s for whatever it has not denoised.
    assert answer.headers["retry-after"] in {"3", "4"}
    make(gateway, BOB)
    assert gateway.http.post("/v1/videos", json=BODY, headers=bearer(BOB)).status_code == 429
    two = {"prompt": "a", "n": 2, "num_inference_steps": 2}
    assert gateway.http.post("/v1/images/generations", json=two, headers=bearer(ALICE)).status_code == 429
    gateway.http.post(f"/v1/videos/{first}/cancel", headers=bearer(ALICE))
    make(gateway, ALICE)
    fake.release()


def test_the_line_has_an_end_and_the_cost_model_says_when_to_come_back(start, fake):
    fake.held = {"queued"}
    fake.backlog_s = 40.0
    gateway = start(max_queue=2)
    made = [gateway.create(), gateway.create()]
    eventually(lambda: gateway.mesh.state.backlog_s == 40.0)
    answer = gateway.http.post("/v1/videos", json=BODY)
    assert error_of(answer, 429)["code"] == "queue_full"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("20", "20000")
    client = openai.OpenAI(api_key="x", base_url=f"{gateway.url}/v1", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.images.generate(prompt="a")
    gateway.http.delete(f"/v1/videos/{made[0]}")
    assert gateway.create()
    fake.release()


def test_a_repeated_request_needs_no_room(start, fake):
    fake.held = {"queued"}
    gateway = start(max_queue=1, rate_limit="1/hour")
    key = {"idempotency-key": "again"}
    first = gateway.http.post("/v1/videos", json=BODY, headers=key).json()["id"]
    again = gateway.http.post("/v1/videos", json=BODY, headers=key)
    assert (again.status_code, again.json()["id"]) == (200, first)
    assert gateway.http.post("/v1/videos", json=BODY).status_code == 429
    fake.release()


def test_a_stream_of_an_image_holds_its_place_until_it_ends(start, fake):
    fake.held = {"encode"}
    gateway = start(max_concurrent_per_key=1)
    body = {"prompt": "a", "num_inference_steps": 2}
    with gateway.http.stream("POST", "/v1/images/generations", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert gateway.http.post("/v1/images/generations", json=body).status_code == 429
        fake.release()
        assert "image_generation.completed" in answer.read().decode()
    assert gateway.http.post("/v1/images/generations", json=body).status_code == 200
    fake.held = {"encode"}
    with gateway.http.stream("POST", "/v1/images/generations", json=body | {"stream": True}):
        fake.wait_for("encode")
    eventually(lambda: fake.cancelled)
    fake.release()
    eventually(lambda: gateway.http.post("/v1/images/generations", json=body).status_code == 200)


def test_images_that_are_made_hold_a_place(start, fake):
    fake.held = {"encode"}
    gateway = start(max_concurrent_per_key=1)
    body = {"prompt": "a", "num_inference_steps": 2}
    client = openai.OpenAI(api_key="x", base_url=f"{gateway.url}/v1", max_retries=0, timeout=1)
    with client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="a")
    # The client that left gave its place back.
    eventually(lambda: fake.cancelled)
    fake.release()
    eventually(lambda: gateway.http.post("/v1/images/generations", json=body).status_code == 200)


def test_pixels_have_a_bound(start):
    gateway = start(max_pixels=64 * 64 * 17)
    assert gateway.http.post("/v1/videos", json=BODY | {"size": "64x64", "num_frames": 17}).status_code == 200
    error = error_of(gateway.http.post("/v1/videos", json=BODY | {"size": "96x64", "num_frames": 17}), 400)
    assert (error["param"], error["code"]) == ("size", "too_many_pixels")
    assert "69632" in error["message"]


def test_what_is_not_ready_says_when(start, fake, monkeypatch):
    fake.ready = False
    monkeypatch.setattr("gateway.jobs.runner.MODEL_PATIENCE_S", 0.05)
    gateway = start()
    answer = gateway.http.post("/v1/videos", json=BODY)
    assert error_of(answer, 503)["code"] == "model_loading"
    assert 2 <= int(answer.headers["retry-after"]) <= 60
    fake.become_ready()
    eventually(lambda: gateway.http.post("/v1/videos", json=BODY).status_code == 200)
    fake.backlog_s = 7.5
    fake.drain()
    eventually(lambda: gateway.mesh.state.draining)
    answer = gateway.http.post("/v1/videos", json=BODY)
    assert (error_of(answer, 503)["code"], answer.headers["retry-after"]) == ("draining", "8")


# ---- strict and lenient ------------------------------------------------------------------------------------------


def test_strict_refuses_and_lenient_warns(start, fake):
    strange = BODY | {"sede": 1}
    picture = {"prompt": "a", "num_inference_steps": 2, "quality": "high", "background": "transparent", "style": "x"}
    strict = start()
    assert error_of(strict.http.post("/v1/videos", json=strange), 400)["param"] == "sede"
    for name in ("quality", "background", "style"):
        body = {"prompt": "a", name: picture[name]}
        error = error_of(strict.http.post("/v1/images/generations", json=body), 400)
        assert (error["param"], error["code"]) in {(name, "unsupported_value"), (name, "unknown_parameter")}
    strict.close()

    lenient = start(lenient=True)
    video = lenient.http.post("/v1/videos", json=strange).json()
    (warning,) = video["warnings"]
    assert "sede" in warning
    assert "did you mean seed?" in warning
    assert lenient.wait(video["id"])["warnings"] == [warning]
    warnings = lenient.http.post("/v1/images/generations", json=picture | {"output_format": "svg"}).json()["warnings"]
    assert sorted(warning.partition(":")[0] for warning in warnings) == [
        "background",
        "output_format",
        "quality",
        "style",
    ]
    other = BODY | {"true_cfg_scale": 4.0}
    assert lenient.http.post("/v1/videos", json=other).json()["warnings"] == [
        "true_cfg_scale: is for image models; Wan's is guidance_scale; it was ignored"
    ]
    # Nonsense stays nonsense.
    assert error_of(lenient.http.post("/v1/videos", json=BODY | {"seed": "x"}), 400)["param"] == "seed"
    assert error_of(lenient.http.post("/v1/videos", json={"seed": 1}), 400)["param"] == "prompt"
    assert error_of(lenient.http.post("/v1/tokens", json={"video_id": "video_00", "x": 1}), 400)["param"] == "x"


# ---- names -------------------------------------------------------------------------------------------------------


def test_a_model_has_a_name_and_aliases(start, fake):
    gateway = start(served_model_name=("org/wan", "gpt-image-1"))
    listed = gateway.http.get("/v1/models").json()["data"]
    assert [(model["id"], model["root"]) for model in listed] == [("org/wan", "org/wan"), ("gpt-image-1", "org/wan")]
    for path in ("org/wan", "org%2Fwan", "gpt-image-1"):
        assert gateway.http.get(f"/v1/models/{path}").json()["root"] == "org/wan"
    answer = gateway.http.post("/v1/videos", json=BODY | {"model": "gpt-image-1"}).json()
    assert answer["model"] == "org/wan"
    assert gateway.http.post("/v1/videos", json=BODY | {"model": "sora-2"}).status_code == 404


def test_any_name_can_be_the_models(start):
    gateway = start(allow_any_model=True)
    with openai.OpenAI(api_key="x", base_url=f"{gateway.url}/v1") as client:
        made = client.images.generate(model="gpt-image-1", prompt="a", extra_body={"num_inference_steps": 2})
        assert made.data[0].b64_json
        assert client.models.retrieve("dall-e-3").id == "dall-e-3"
        assert [model.id for model in client.models.list()] == ["demo"]


# ---- the shape of refusals ---------------------------------------------------------------------------------------


def test_every_refusal_has_openais_shape(gateway):
    xml = {"content": b"<prompt/>", "headers": {"content-type": "application/xml"}}
    broken = {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    nameless = {"content": b"", "headers": {"content-type": "multipart/form-data"}}
    refused = [
        (gateway.http.get("/nowhere"), 404, "not_found"),
        (gateway.http.put("/v1/videos", json={}), 405, "method_not_allowed"),
        (gateway.http.options("/v1/videos"), 405, "method_not_allowed"),
        (gateway.http.post("/v1/videos", **xml), 415, "unsupported_media_type"),
        (gateway.http.post("/v1/videos", content=b"{"), 400, "invalid_json"),
        (gateway.http.post("/v1/videos", **broken), 400, None),
        (gateway.http.post("/v1/videos", **nameless), 400, None),
        (gateway.http.post("/v1/videos", content=b" " * 100_001), 413, "request_too_large"),
        (gateway.http.get("/v1/videos", params={"limit": "x"}), 400, "invalid_value"),
    ]
    for answer, status, code in refused:
        assert error_of(answer, status)["code"] == code or code is None


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 70_000,
        b"nonsense\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n no name\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["too long", "no http", "bad header", "nul"],
)
def test_what_is_no_http_is_refused_in_the_same_shape(gateway, sent):
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: req_" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_the_description_says_whether_a_key_is_needed(start):
    described = []
    for config in ({}, {"api_keys": TWO_KEYS}):
        gateway = start(**config)
        described.append(gateway.http.get("/openapi.json").json()["paths"]["/v1/videos"]["post"])
        gateway.close()
    free, protected = described
    assert "security" not in free
    assert protected.pop("security") == [{"api_key": []}]
    assert free == protected
