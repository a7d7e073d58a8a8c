"""client.batches: create inline and from a file, get, list, cancel, delete, results."""

import asyncio
import json
import uuid

import pytest
from conftest import EMBEDDER, MODEL
from google.genai import errors, types


def prompt(text: str) -> types.Content:
    return types.Content(role="user", parts=[types.Part(text=text)])


def inlined(key: str, text: str, **config) -> types.InlinedRequest:
    return types.InlinedRequest(
        contents=[prompt(text)],
        metadata={"key": key, "row": f"row of {key}"},
        config=types.GenerateContentConfig(**config) if config else None,
    )


def line(key: str, text: str) -> dict:
    return {"key": key, "request": {"contents": [{"role": "user", "parts": [{"text": text}]}]}}


def name_of_its_own() -> types.CreateBatchJobConfig:
    return types.CreateBatchJobConfig(display_name=f"sdk-{uuid.uuid4()}")


def running_forever(client, **more):
    """A batch that no amount of waiting ends."""
    return client.batches.create(
        model=MODEL, src=[inlined("k", "[[sim:job=stall]]")], config=name_of_its_own(), **more
    )


def answers(job) -> dict:
    return {r.metadata["key"]: r for r in job.dest.inlined_responses}


def test_inline_requests_are_answered_each_under_its_key(client, finished):
    config = name_of_its_own()
    created = client.batches.create(
        model=MODEL,
        src=[
            inlined("one", "What is one?", temperature=0.2, system_instruction="Be brief."),
            inlined("two", "What is two?"),
            inlined("bad", "What is this? [[sim:error=3]]"),
        ],
        config=config,
    )
    assert created.name.startswith("batches/")
    assert created.display_name == config.display_name
    assert created.model == f"models/{MODEL}"
    assert created.state == types.JobState.JOB_STATE_PENDING
    assert not created.done
    assert created.dest is None

    job = finished(created)
    assert job.state == types.JobState.JOB_STATE_SUCCEEDED
    assert job.name == created.name
    assert job.create_time <= job.end_time
    assert job.dest.file_name is None, "the answers are in the operation itself"
    by_key = answers(job)
    assert set(by_key) == {"one", "two", "bad"}
    assert by_key["one"].metadata["row"] == "row of one", "metadata comes back whole"
    assert "What is one?" in by_key["one"].response.text
    assert by_key["one"].response.candidates[0].finish_reason == types.FinishReason.STOP
    assert by_key["one"].response.usage_metadata.total_token_count > 0
    assert "What is two?" in by_key["two"].response.text
    assert by_key["bad"].response is None
    assert by_key["bad"].error.code == 3


def test_equal_requests_get_equal_answers(client, finished):
    def ask(*texts):
        src = [inlined(str(i), text) for i, text in enumerate(texts)]
        return [r.response.text for r in finished(client.batches.create(model=MODEL, src=src)).dest.inlined_responses]

    first, second = ask("the same", "another"), ask("the same", "yet another")
    assert first[0] == second[0]
    assert len({first[0], first[1], second[1]}) == 3


def test_a_file_in_and_a_file_out(client, finished, upload, tmp_path):
    file = upload(line("a", "Alpha?"), line("b", "Beta?"), line("c", "[[sim:error=13]]"))
    job = finished(client.batches.create(model=MODEL, src=file.name, config=name_of_its_own()))

    assert job.state == types.JobState.JOB_STATE_SUCCEEDED
    assert job.dest.inlined_responses is None
    assert job.dest.file_name == f"files/batch-{job.name.removeprefix('batches/')}"
    content = client.files.download(file=job.dest.file_name)
    lines = [json.loads(text) for text in content.splitlines()]
    assert [sorted(entry) for entry in lines] == [["key", "response"], ["key", "response"], ["error", "key"]]
    by_key = {entry["key"]: entry for entry in lines}
    assert set(by_key) == {"a", "b", "c"}
    assert "Alpha?" in by_key["a"]["response"]["candidates"][0]["content"]["parts"][0]["text"]
    assert "Beta?" in by_key["b"]["response"]["candidates"][0]["content"]["parts"][0]["text"]
    assert by_key["c"]["error"]["code"] == 13

    # straight to disk
    client.files.download(file=job.dest.file_name, destination=tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == content

    # The result file has metadata of its own, which is enough for a download.
    result = client.files.get(name=job.dest.file_name)
    assert result.source == types.FileSource.GENERATED
    assert result.size_bytes == len(content)
    assert client.files.download(file=result) == content
    # as users were told until at least September 2026
    with pytest.raises(errors.ClientError, match="40 characters"):
        client.files.delete(name=job.dest.file_name)


def test_snake_case_will_do(client, finished, upload):
    request = {
        "contents": [{"parts": [{"text": "Gamma?"}]}],
        "generation_config": {"temperature": 0.5},
        "system_instruction": {"parts": [{"text": "Be brief."}]},
    }
    file = upload({"key": "g", "request": request})
    job = finished(client.batches.create(model=f"models/{MODEL}", src=types.BatchJobSource(file_name=file.name)))
    assert b"Gamma?" in client.files.download(file=job.dest.file_name)


def test_a_list_has_pages_newest_first_and_leaves_inline_answers_out(client, finished):
    jobs = [
        client.batches.create(model=MODEL, src=[inlined("k", f"number {i}")], config=name_of_its_own())
        for i in range(5)
    ]
    for job in jobs:
        finished(job)
    names = [job.name for job in jobs]
    pager = client.batches.list(config=types.ListBatchJobsConfig(page_size=2))
    assert len(pager.page) == 2
    listed = list(pager)
    listed_names = [job.name for job in listed]
    assert listed_names[:5] == names[::-1]
    assert len(listed_names) == len(set(listed_names)), "no batch comes twice"
    assert all(job.state == types.JobState.JOB_STATE_SUCCEEDED for job in listed[:5])
    assert all(job.dest is None or not job.dest.inlined_responses for job in listed[:5])
    assert len(client.batches.list(config=types.ListBatchJobsConfig(page_size=100)).page) >= 5
    assert [job.name for job in client.batches.list()][:5] == names[::-1], "the default page size will do"


def test_empty_pages_with_a_token_do_not_end_a_list(client, simulator, finished):
    jobs = {finished(client.batches.create(model=MODEL, src=[inlined("k", "x")])).name for _ in range(3)}
    simulator.control("PATCH", "switches", {"emptyPages": True})
    try:
        # The SDK's pager takes an empty page for the end, so the tokens are followed by hand.
        found, token, empty = set(), None, 0
        while True:
            pager = client.batches.list(config=types.ListBatchJobsConfig(page_size=2, page_token=token))
            found |= {job.name for job in pager.page}
            empty += not pager.page
            token = pager.config.get("page_token")
            if not token:
                break
    finally:
        simulator.control("PATCH", "switches", {"emptyPages": False})
    assert jobs <= found
    assert empty >= 2


def test_cancel(client, finished):
    job = running_forever(client)
    assert client.batches.get(name=job.name).state == types.JobState.JOB_STATE_PENDING
    assert client.batches.cancel(name=job.name) is None
    job = finished(job)
    assert job.state == types.JobState.JOB_STATE_CANCELLED
    assert job.dest is None
    assert client.batches.cancel(name=job.name) is None, "again, on one that has ended: no harm"
    assert client.batches.get(name=job.name).state == types.JobState.JOB_STATE_CANCELLED


def test_delete(client):
    job = running_forever(client)
    client.batches.delete(name=job.name)
    with pytest.raises(errors.ClientError) as gone:
        client.batches.get(name=job.name)
    assert (gone.value.code, gone.value.status) == (404, "NOT_FOUND")
    assert job.name not in [j.name for j in client.batches.list()]
    with pytest.raises(errors.ClientError) as again:
        client.batches.delete(name=job.name)
    assert again.value.code == 404


@pytest.mark.parametrize(
    ("directive", "state"),
    [("fail", types.JobState.JOB_STATE_FAILED), ("expire", types.JobState.JOB_STATE_EXPIRED)],
)
def test_other_ends(client, finished, directive, state):
    job = finished(client.batches.create(model=MODEL, src=[inlined("k", f"[[sim:job={directive}]]")]))
    assert job.state == state
    assert job.dest is None


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_embeddings(client, finished, upload):
    contents = ["first text", "second text"]
    src = types.EmbeddingsBatchJobSource(
        inlined_requests=types.EmbedContentBatch(
            contents=contents, config=types.EmbedContentConfig(output_dimensionality=5, task_type="CLUSTERING")
        )
    )
    job = finished(client.batches.create_embeddings(model=EMBEDDER, src=src))
    assert job.state == types.JobState.JOB_STATE_SUCCEEDED
    vectors = [r.response.embedding.values for r in job.dest.inlined_embed_content_responses]
    assert [len(v) for v in vectors] == [5, 5]
    assert vectors[0] != vectors[1]

    request = {"content": {"parts": [{"text": "first text"}]}, "outputDimensionality": 7}
    file = upload({"key": "e", "request": request})
    src = types.EmbeddingsBatchJobSource(file_name=file.name)
    job = finished(client.batches.create_embeddings(model=EMBEDDER, src=src))
    (result,) = client.files.download(file=job.dest.file_name).splitlines()
    result = json.loads(result)
    assert result["key"] == "e"
    assert len(result["response"]["embedding"]["values"]) == 7


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_batches_of_embeddings_are_batches_like_others(client, finished, upload):
    def embed(text, key="e"):
        file = upload({"key": key, "request": {"content": {"parts": [{"text": text}]}}})
        config = types.CreateEmbeddingsBatchJobConfig(display_name=f"sdk-{uuid.uuid4()}")
        src = types.EmbeddingsBatchJobSource(file_name=file.name)
        return config.display_name, client.batches.create_embeddings(model=EMBEDDER, src=src, config=config)

    name, job = embed("[[sim:job=stall]]")
    assert (job.display_name, job.model) == (name, f"models/{EMBEDDER}")
    assert job.state == types.JobState.JOB_STATE_PENDING
    assert job.name in [j.name for j in client.batches.list()]
    client.batches.cancel(name=job.name)
    assert finished(job).state == types.JobState.JOB_STATE_CANCELLED
    client.batches.delete(name=job.name)
    assert job.name not in [j.name for j in client.batches.list()]

    failed, good = (json.loads(client.files.download(file=finished(j).dest.file_name)) for _, j in (
        embed("[[sim:error=3]]"), embed("fine")))
    assert (failed["key"], failed["error"]["code"]) == ("e", 3)
    assert good["response"]["usageMetadata"]["promptTokenCount"] > 0


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_the_older_shape_of_an_embedding_is_the_one_that_the_sdk_counts_tokens_of(client, finished):
    batch = types.EmbedContentBatch(contents=["a text [[sim:token-count]]"])
    src = types.EmbeddingsBatchJobSource(inlined_requests=batch)
    job = finished(client.batches.create_embeddings(model=EMBEDDER, src=src))
    (answer,) = job.dest.inlined_embed_content_responses
    assert answer.response.token_count == 7
    assert answer.response.embedding.values


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_a_model_embeds_or_generates(client):
    src = types.EmbeddingsBatchJobSource(inlined_requests=types.EmbedContentBatch(contents=["x"]))
    with pytest.raises(errors.ClientError, match="not supported for asyncBatchEmbedContent") as refused:
        client.batches.create_embeddings(model=MODEL, src=src)
    assert refused.value.code == 404
    with pytest.raises(errors.ClientError, match="not supported for batchGenerateContent"):
        client.batches.create(model=EMBEDDER, src=[inlined("k", "x")])


def test_the_asynchronous_client(client):
    async def use():
        job = await client.aio.batches.create(model=MODEL, src=[inlined("k", "asynchronous")])
        while not job.done:
            await asyncio.sleep(0.02)
            job = await client.aio.batches.get(name=job.name)
        pager = await client.aio.batches.list(config=types.ListBatchJobsConfig(page_size=2))
        names = []
        async for entry in pager:
            names.append(entry.name)
            if entry.name == job.name:
                break
        await client.aio.batches.delete(name=job.name)
        return job, names

    job, names = asyncio.run(use())
    assert "asynchronous" in job.dest.inlined_responses[0].response.text
    assert job.name in names
