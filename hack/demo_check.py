#!/usr/bin/env python3
"""Checks that the demo's exit code tells the truth: blocked ports and broken examples must fail it, with words.

    hack/demo_check.py COMMAND...     COMMAND is how hack/demo.py is called when it should succeed

Called by `make demo-check`. Only the Python standard library.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def must_fail(what: str, says: str, command: list[str], env: dict[str, str]) -> bool:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0 and says in done.stderr:
        print(f"ok: with {what} the demo ends with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        return True
    print(f"with {what} the demo ended with {done.returncode} and did not say '{says}':\n{done.stdout}{done.stderr}")
    return False


def main() -> int:
    command, good = sys.argv[1:], True
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = dict(os.environ, GBO_DEMO_SIMULATOR_PORT=str(port))
        good &= must_fail("the simulator's port taken", f"port {port}", command, env)
    for what, old, new, says in [
        ("an example that the schema refuses", "prompt: Name a prime number.", "promt: Name a prime number.", "kubectl apply"),
        ("an example that ends otherwise", "[[sim:error=3]]", "", "expected ('Succeeded', 2, 2)"),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            examples = pathlib.Path(folder) / "examples"
            shutil.copytree(ROOT / "examples", examples)
            path = examples / "partial-failure.yaml"
            path.write_text(path.read_text().replace(old, new))
            good &= must_fail(what, says, [*command, "--examples", str(examples)], dict(os.environ))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
