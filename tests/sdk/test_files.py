"""client.files: uploads of every size, get, list, delete."""

import asyncio
import base64
import datetime
import hashlib
import io

import pytest
from google.genai import errors, types

CHUNK = 8 << 20  # the SDK's


def content_of(size: int) -> bytes:
    """Bytes that are different everywhere, so that a chunk lost or swapped shows in the hash."""
    line = b"".join(b"%015d\n" % i for i in range(size // 16 + 1))
    return line[:size]


@pytest.mark.parametrize(
    "size", [0, 1, 202, CHUNK, 2 * CHUNK + 4321], ids=["empty", "one-byte", "small", "one-chunk", "three-chunks"]
)
def test_an_upload_arrives_whole(client, simulator, size):
    content = content_of(size)
    config = types.UploadFileConfig(display_name="in.jsonl", mime_type="jsonl")
    file = client.files.upload(file=io.BytesIO(content), config=config)

    assert file.name.startswith("files/")
    assert file.display_name == "in.jsonl"
    assert file.mime_type == "jsonl", "the type is echoed word for word"
    assert file.size_bytes == size
    assert file.state == types.FileState.ACTIVE
    assert file.source == types.FileSource.UPLOADED
    assert file.uri.endswith(f"/v1beta/{file.name}")
    assert file.expiration_time - file.create_time == datetime.timedelta(hours=48)
    # of the text of the hash, not of its bytes
    assert base64.b64decode(file.sha256_hash) == hashlib.sha256(content).hexdigest().encode()
    assert client.files.get(name=file.name) == file.model_copy(update={"sdk_http_response": None})

    log = simulator.control("GET", "log")["entries"]
    started = max(e["seq"] for e in log if e["op"] == "UploadStart")
    chunks = [e["bytes"] for e in log[started:] if e["op"] == "UploadChunk"]
    assert chunks == [CHUNK] * (size // CHUNK) + ([size % CHUNK] if size % CHUNK or not size else [])


def test_a_path_and_a_chosen_name(client, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}\n")
    name = f"chosen-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]}"
    config = types.UploadFileConfig(name=name, mime_type="application/jsonl")
    file = client.files.upload(file=path, config=config)
    assert file.name == f"files/{name}"
    with pytest.raises(errors.ClientError) as refused:
        client.files.upload(file=path, config=config)
    assert (refused.value.code, refused.value.status) == (409, "ALREADY_EXISTS")


def test_list_pages_and_delete(client):
    mine = [
        client.files.upload(file=io.BytesIO(b"%d" % i), config=types.UploadFileConfig(mime_type="text/plain")).name
        for i in range(5)
    ]
    pager = client.files.list(config=types.ListFilesConfig(page_size=2))
    assert len(pager.page) == 2
    assert [f.name for f in pager.page] == mine[:-3:-1], "newest first"
    listed = [f.name for f in pager]
    assert set(mine) <= set(listed)
    assert len(listed) == len(set(listed)), "no file comes twice"

    client.files.delete(name=mine[0])
    assert mine[0] not in [f.name for f in client.files.list()]
    with pytest.raises(errors.ClientError) as gone:
        client.files.get(name=mine[0])
    assert (gone.value.code, gone.value.status) == (403, "PERMISSION_DENIED"), "not 404"


def test_uploads_cannot_be_downloaded(client, upload):
    file = upload("{}")
    with pytest.raises(ValueError, match="can't be downloaded"):
        client.files.download(file=file)
    with pytest.raises(errors.ClientError) as refused:
        client.files.download(file=file.name)
    assert refused.value.code == 400


def test_the_asynchronous_client_uploads_too(client):
    content = content_of(CHUNK + 77)

    async def upload():
        return await client.aio.files.upload(
            file=io.BytesIO(content), config=types.UploadFileConfig(mime_type="text/plain")
        )

    file = asyncio.run(upload())
    assert file.size_bytes == len(content)
    assert base64.b64decode(file.sha256_hash) == hashlib.sha256(content).hexdigest().encode()


class TestFaults:
    """What an upload meets when Google's side misbehaves."""

    @staticmethod
    def upload(client, size=CHUNK + 5):
        return client.files.upload(
            file=io.BytesIO(content_of(size)), config=types.UploadFileConfig(mime_type="text/plain")
        )

    def test_a_missing_status_header_makes_the_sdk_send_the_chunk_again(self, client, simulator):
        # The first chunk is taken, but the answer doesn't say so.
        simulator.fault("UploadChunk", {"header": {"name": "x-goog-upload-status"}})
        file = self.upload(client)
        assert file.size_bytes == CHUNK + 5
        assert base64.b64decode(file.sha256_hash) == hashlib.sha256(content_of(CHUNK + 5)).hexdigest().encode()

    def test_active_after_the_last_byte_is_an_error(self, client, simulator):
        simulator.fault("UploadChunk", {"header": {"name": "x-goog-upload-status", "value": "active"}})
        with pytest.raises(ValueError, match="not finalized"):
            self.upload(client, size=5)

    def test_a_refused_chunk_is_raised_at_once(self, client, simulator):
        before = len(simulator.control("GET", "log")["entries"])
        simulator.fault("UploadChunk", {"status": {"code": 403, "envelope": True}})
        with pytest.raises(errors.ClientError) as refused:
            self.upload(client, size=5)
        assert refused.value.code == 403
        entries = simulator.control("GET", "log")["entries"][before:]
        assert [e["op"] for e in entries] == ["UploadStart", "UploadChunk"], "it was not sent again"
