"""A simulator for the whole run, and clients of the official SDK that know nothing but its address."""

import json
import os
import pathlib
import subprocess
import time
import urllib.request

import pytest

# Before the SDK is imported: neither a real key, nor another endpoint, nor a proxy of the user's environment
# may play a part.
for _name in list(os.environ):
    if _name.startswith(("GOOGLE_", "GEMINI_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]

from google import genai  # noqa: E402
from google.genai import types  # noqa: E402

KEY = "the-key-of-this-test"
MODEL = "gemini-2.5-flash"
EMBEDDER = "gemini-embedding-001"
# Longer than anything takes on a loaded machine: who gets here has failed.
PATIENCE = 60


class Simulator:
    """The binary, on a port of its own."""

    def __init__(self, directory: pathlib.Path):
        binary = os.environ.get("GBO_SIMULATOR", "")
        if not os.access(binary, os.X_OK):
            pytest.exit(f"GBO_SIMULATOR ({binary!r}) names no simulator: run `make test-sdk`", returncode=2)
        port_file = directory / "address"
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                # a batch waits 10 ms and runs 50 ms
                [binary, "--listen", "127.0.0.1:0", "--port-file", port_file, "--speed", "1000", "--api-key", KEY],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        self.url = f"http://{self._address(port_file)}"

    def _address(self, port_file: pathlib.Path) -> str:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            if port_file.exists() and (address := port_file.read_text()):
                return address
            time.sleep(0.01)
        self.stop()
        pytest.exit(f"the simulator did not come up:\n{self.log.read_text()}", returncode=2)

    def control(self, method: str, path: str, body=None):
        """What no SDK can do: look into the simulator, and make it fail."""
        request = urllib.request.Request(
            f"{self.url}/_sim/{path}", method=method, data=None if body is None else json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def fault(self, op: str, effect: dict, **more):
        self.control("POST", "faults", {"op": op, "effect": effect, **more})

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    simulator = Simulator(tmp_path_factory.mktemp("simulator"))
    yield simulator
    simulator.stop()


@pytest.fixture(scope="session")
def make_client(simulator):
    """Makes clients as a user would: the address and nothing else, unless a test says more."""

    def make(api_key=KEY, **options):
        return genai.Client(api_key=api_key, http_options=types.HttpOptions(base_url=simulator.url, **options))

    return make


@pytest.fixture(scope="session", params=[None, "v1beta"], ids=["default-version", "v1beta"])
def client(request, make_client):
    """Once with the version that the SDK chooses (v1), once with v1beta."""
    return make_client(api_version=request.param) if request.param else make_client()


@pytest.fixture
def finished(client):
    """Waits for the end of a batch as a user does: it asks until the SDK says that it is over."""

    def wait(job):
        end = time.monotonic() + PATIENCE
        while not job.done:
            assert time.monotonic() < end, f"{job.name} is still {job.state}"
            time.sleep(0.02)
            job = client.batches.get(name=job.name)
        return job

    return wait


@pytest.fixture
def upload(client, tmp_path):
    """Uploads lines as a user does, from a file on disk."""

    def upload(*lines, name="input.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        config = types.UploadFileConfig(display_name=name, mime_type="application/jsonl")
        return client.files.upload(file=path, config=config)

    return upload
