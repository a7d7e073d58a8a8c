#!/usr/bin/env python3
"""Checks that the demo's exit code tells the truth: blocked ports and broken examples must fail it, with words
and without delay, and nothing of it may stay behind.

    hack/demo_check.py COMMAND...     COMMAND is how hack/demo.py is called when it should succeed

Called by `make demo-check`. Only the Python standard library.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PORTS = [
    int(os.environ.get(f"GBO_DEMO_{name}_PORT") or default)
    for name, default in [("SIMULATOR", 18080), ("CALLBACK", 18081), ("ADMIN", 18082)]
]


def must_fail(what: str, says: list[str], command: list[str], logs: bool = False, **env: str) -> bool:
    """Runs the demo, which must fail with these words, and keep its logs exactly if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        done = subprocess.run(command, env=dict(os.environ, TMPDIR=folder, **env), capture_output=True, text=True)
        took = time.monotonic() - begin
        kept = [str(path) for path in pathlib.Path(folder).glob("gbo-demo-*")]
    wrong = [f"it did not say '{words}'" for words in says if words not in done.stderr]
    if done.returncode == 0:
        wrong.append("it ended with 0")
    if logs and not any(f"logs are in {path}" in done.stderr for path in kept):
        wrong.append(f"it did not keep its logs and say where: {kept}")
    if not logs and kept:
        wrong.append(f"it left {kept}")
    # It may take its time until an example stalls, and to end; but not wait for what can't come.
    stalled = re.search(r"\[ *([0-9.]+)s\]   \S+ +\S+ CredentialsNotFound", done.stdout)
    if stalled and took - float(stalled[1]) > 30:
        wrong.append(f"it ended {took - float(stalled[1]):.0f} s after a job had stalled")
    if not wrong:
        failure = done.stderr.strip().splitlines()
        print(f"ok: with {what} the demo ends with {done.returncode}: {' '.join(failure)}")
        return True
    print(f"with {what} the demo was wrong: {'; '.join(wrong)}\n{done.stdout}{done.stderr}")
    return False


def broken_example(what: str, old: str, new: str, says: list[str], command: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        examples = pathlib.Path(folder) / "examples"
        shutil.copytree(ROOT / "examples", examples)
        path = examples / "partial-failure.yaml"
        text = path.read_text()
        if old not in text:
            print(f"{path.name} does not hold '{old}' any more: change hack/demo_check.py")
            return False
        path.write_text(text.replace(old, new))
        return must_fail(what, says, [*command, "--examples", str(examples)], logs=True)


def in_use() -> list[int]:
    def answers(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return [port for port in PORTS if answers(port)]


def leaves_nothing(how: signal.Signals, command: list[str]) -> bool:
    """A demo that is ended in the midst of it takes its parts with it."""
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, TMPDIR=folder)
        demo = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        for line in demo.stdout:
            said.append(line)
            if "kubectl apply -f" in line:
                break
        running = in_use()
        demo.send_signal(how)
        demo.wait()
        demo.stdout.close()  # not read to its end, which does not come while a part of the demo is left

        def left() -> list[str]:
            # Nobody but itself can remove the folder of a demo that was killed.
            folders = [str(path) for path in pathlib.Path(folder).glob("gbo-*")]
            return [path for path in folders if how != signal.SIGKILL or "gbo-demo-" not in path]

        deadline = time.monotonic() + 10
        while (in_use() or left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if running == PORTS and not in_use() and not left():
            print(f"ok: after {how.name} nothing of the demo is left")
            return True
        print(f"{running} were in use; after {how.name} {in_use()} still are, and there is {left()}:\n{''.join(said)}")
        return False


def main() -> int:
    command, good = sys.argv[1:], True
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        good &= must_fail("the simulator's port taken", [f"port {port}"], command, GBO_DEMO_SIMULATOR_PORT=port)
    for port in ["abc", "0", "65536", "-1"]:
        says = [f"GBO_DEMO_ADMIN_PORT is '{port}'", "set it to a number from 1 to 65535"]
        good &= must_fail(f"the port {port}", says, command, GBO_DEMO_ADMIN_PORT=port)
    for what, old, new, says in [
        (
            "an example that the schema refuses",
            "prompt: Name a prime number.",
            "promt: Name a prime number.",
            ["kubectl apply"],
        ),
        ("an example that ends otherwise", "[[sim:error=3]]", "", ["expected ('Succeeded', 2, 2)"]),
        (
            "an example that stalls",
            "name: gemini\n",
            "name: nope\n",
            ["partial-failure: CredentialsNotFound: ", "Secret nope does not exist"],
        ),
    ]:
        good &= broken_example(what, old, new, says, command)
    for how in [signal.SIGHUP, signal.SIGKILL]:
        good &= leaves_nothing(how, command)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
