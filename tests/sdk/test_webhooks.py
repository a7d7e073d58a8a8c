"""client.webhooks, and deliveries as a receiver sees them."""

import base64
import hashlib
import hmac
import http.server
import json
import queue
import threading
import urllib.request

import pytest
from conftest import MODEL, PATIENCE
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.genai import errors, types


@pytest.fixture
def receiver():
    """An endpoint that takes everything; `get` waits for the next delivery."""
    received = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
            received.put((self.headers, body))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    received.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield received
    server.shutdown()
    server.server_close()


def hello():
    return [types.InlinedRequest(contents="hello", metadata={"key": "k"})]


def signed_text(headers, body: bytes) -> bytes:
    return f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body


def test_a_batch_calls_back_with_an_ed25519_signature(client, simulator, receiver):
    hooks = types.WebhookConfig(uris=[receiver.url])
    job = client.batches.create(model=MODEL, src=hello(), config=types.CreateBatchJobConfig(webhook_config=hooks))
    headers, body = receiver.get(timeout=PATIENCE)
    event = json.loads(body)
    assert event["type"] == "batch.succeeded"
    assert event["version"] == "v1"
    assert event["data"]["id"] in job.name
    assert client.batches.get(name=job.name).state == types.JobState.JOB_STATE_SUCCEEDED

    scheme, _, signature = headers["webhook-signature"].partition(",")
    assert scheme == "v1a"
    with urllib.request.urlopen(f"{simulator.url}/.well-known/jwks.json", timeout=PATIENCE) as answer:
        keys = json.load(answer)["keys"]
    assert [(k["kty"], k["crv"], k.get("kid")) for k in keys] == [("OKP", "Ed25519", None)] * 3

    def verifies(key) -> bool:
        public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
        try:
            public.verify(base64.b64decode(signature), signed_text(headers, body))
        except InvalidSignature:
            return False
        return True

    assert [verifies(key) for key in keys].count(True) == 1


def test_user_metadata_is_refused_as_it_was_in_may_2026(client):
    hooks = types.WebhookConfig(uris=["http://127.0.0.1:9/hook"], user_metadata={"a": "b"})
    with pytest.raises(errors.ClientError, match="Unknown name"):
        client.batches.create(model=MODEL, src=hello(), config=types.CreateBatchJobConfig(webhook_config=hooks))


def test_a_registered_webhook(client, receiver):
    events = ["batch.succeeded", "batch.failed", "batch.expired"]
    created = client.webhooks.create(name="ops", uri=receiver.url, subscribed_events=events)
    secret = created.new_signing_secret
    assert secret.startswith("whsec_")
    assert created.state == "enabled"

    got = client.webhooks.get(id=created.id)
    assert (got.name, got.uri, got.subscribed_events) == ("ops", receiver.url, events)
    assert got.new_signing_secret is None, "a secret is told once"
    assert got.signing_secrets[0].truncated_secret.endswith(secret[-4:])
    assert created.id in [w.id for w in client.webhooks.list(page_size=1000).webhooks]

    def entries(headers):
        return headers["webhook-signature"].split(" ")

    def signature(secret, headers, body):
        key = base64.b64decode(secret.removeprefix("whsec_"))
        return "v1," + base64.b64encode(hmac.digest(key, signed_text(headers, body), hashlib.sha256)).decode()

    job = client.batches.create(model=MODEL, src=hello())
    headers, body = receiver.get(timeout=PATIENCE)
    assert json.loads(body)["data"]["id"] in job.name
    assert entries(headers) == [signature(secret, headers, body)]

    # During rotation there is a signature for each secret.
    rotated = client.webhooks.rotate_signing_secret(
        id=created.id, revocation_behavior="revoke_previous_secrets_after_h24"
    ).secret
    client.batches.create(model=MODEL, src=hello())
    headers, body = receiver.get(timeout=PATIENCE)
    assert set(entries(headers)) == {signature(s, headers, body) for s in (secret, rotated)}

    client.webhooks.ping(id=created.id)
    headers, body = receiver.get(timeout=PATIENCE)
    assert signature(rotated, headers, body) in entries(headers)

    updated = client.webhooks.update(id=created.id, name="renamed", state="disabled")
    assert (updated.name, updated.state) == ("renamed", "disabled")
    client.webhooks.delete(id=created.id)
    # The class of this error is in a private module of the SDK.
    with pytest.raises(Exception, match="Requested entity was not found") as gone:
        client.webhooks.get(id=created.id)
    assert gone.value.status_code == 404
