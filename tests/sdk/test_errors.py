"""What the SDK raises when something is wrong."""

import pytest
from conftest import MODEL
from google.genai import errors, types


def create(client, src, model=MODEL):
    return client.batches.create(model=model, src=src)


def hello(text="hello"):
    return [types.InlinedRequest(contents=text, metadata={"key": "k"})]


def refused(call) -> tuple:
    with pytest.raises(errors.ClientError) as caught:
        call()
    return caught.value.code, caught.value.status, caught.value.message


def test_a_bad_key(make_client, tmp_path):
    client = make_client(api_key="not-the-key")
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    config = types.UploadFileConfig(mime_type="application/jsonl")
    for call in (
        lambda: create(client, hello()),
        lambda: list(client.batches.list()),
        lambda: list(client.files.list()),
        lambda: client.files.upload(file=path, config=config),
    ):
        code, status, message = refused(call)
        assert (code, status) == (400, "INVALID_ARGUMENT")
        assert "API key not valid" in message


def test_an_unknown_model(client):
    code, status, message = refused(lambda: create(client, hello(), model="no-such-model"))
    assert (code, status) == (404, "NOT_FOUND")
    assert "models/no-such-model is not found" in message


def test_missing_things(client):
    missing = "batches/" + "x" * 36
    for call in (
        lambda: client.batches.get(name=missing),
        lambda: client.batches.cancel(name=missing),
        lambda: client.batches.delete(name=missing),
    ):
        assert refused(call)[:2] == (404, "NOT_FOUND")
    for call in (
        lambda: client.files.get(name="files/not-there"),
        lambda: client.files.delete(name="files/not-there"),
        lambda: client.files.download(file="files/not-there"),
        lambda: client.files.download(file=f"files/batch-{'x' * 36}"),
        lambda: create(client, "files/not-there"),
    ):
        code, status, message = refused(call)
        assert (code, status) == (403, "PERMISSION_DENIED"), "files that are missing are forbidden"
        assert "may not exist" in message


def test_every_bad_line_is_named(client, upload):
    good = {"key": "a", "request": {"contents": [{"parts": [{"text": "fine"}]}]}}
    unknown = {"key": "c", "request": {"contents": [], "thinking_config": {}}}
    file = upload(good, "{this is not JSON", good | {"key": "b"}, unknown)
    code, status, message = refused(lambda: create(client, file.name))
    assert (code, status) == (400, "INVALID_ARGUMENT")
    assert "Error on line 2: invalid JSON" in message
    assert "Error on line 4" in message
    assert "no such field: 'thinking_config'" in message
    assert "line 1" not in message
    assert "line 3" not in message


def test_an_inline_job_over_20_mib(client):
    code, _, message = refused(lambda: create(client, hello("x" * (20 << 20))))
    assert code == 400
    assert "20971520 bytes" in message


def test_a_quota_error_holds_only_a_link_to_help(client, simulator):
    simulator.fault("BatchCreate", {"status": {"code": 429, "envelope": True}})
    with pytest.raises(errors.ClientError) as caught:
        create(client, hello())
    assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
    (detail,) = caught.value.details["error"]["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.Help"


def test_no_retries_unless_asked_for(client, make_client, simulator):
    job = create(client, hello())
    simulator.fault("BatchGet", {"status": {"code": 503, "envelope": True}}, contains=job.name)
    with pytest.raises(errors.ServerError) as caught:
        client.batches.get(name=job.name)
    assert (caught.value.code, caught.value.status) == (503, "UNAVAILABLE")

    simulator.fault("BatchGet", {"status": {"code": 503}}, contains=job.name)
    patient = make_client(retry_options=types.HttpRetryOptions(initial_delay=0.01, attempts=2))
    assert patient.batches.get(name=job.name).name == job.name
