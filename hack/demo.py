#!/usr/bin/env python3
"""The main job, from `kubectl apply` to results, on an embedded control plane and the simulator.

    hack/demo.py          run it once, print what it cost, exit 0 only if everything came true
    hack/demo.py --keep   the same, then leave it running to play with until Ctrl-C

Called by `make demo` and `make up`, which build what it needs. Only the Python standard library.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ["credentials.yaml", "minimal.yaml", "configmap-100.yaml", "partial-failure.yaml"]
# name -> (state, succeeded, failed): what the examples promise
EXPECTED = {"minimal": ("Succeeded", 3, 0), "hundred": ("Succeeded", 100, 0), "partial-failure": ("Succeeded", 2, 2)}
PATIENCE = 120  # seconds until a part that does not come up, or a job that does not end, is a failure

START = time.monotonic()


class Failed(Exception):
    """The demo did not work; the message says why."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.1f}s] {text}", flush=True)


def port_from(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


class Demo:
    def __init__(self, args: argparse.Namespace, work: pathlib.Path) -> None:
        self.args = args
        self.work = work
        self.children: list[tuple[str, subprocess.Popen]] = []
        self.env = dict(os.environ)
        self.simulator = port_from("GBO_DEMO_SIMULATOR_PORT", 18080)
        self.callbacks = port_from("GBO_DEMO_CALLBACK_PORT", 18081)
        self.admin = port_from("GBO_DEMO_ADMIN_PORT", 18082)

    # ------------------------------------------------------------------ processes

    def spawn(self, name: str, command: list[str], **kwargs) -> subprocess.Popen:
        log = open(self.work / f"{name}.log", "wb")
        # A session of its own: Ctrl-C reaches only this script, which takes the parts down in order.
        child = subprocess.Popen(command, stderr=log, env=self.env, start_new_session=True, **kwargs)
        self.children.append((name, child))
        return child

    def check_children(self) -> None:
        for name, child in self.children:
            if child.poll() is not None:
                tail = (self.work / f"{name}.log").read_text(errors="replace").strip().splitlines()[-12:]
                raise Failed(f"{name} ended with exit code {child.returncode}:\n  " + "\n  ".join(tail))

    def stop(self) -> None:
        for name, child in reversed(self.children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    say(f"{name} does not stop, it is killed")
                    child.kill()
                    child.wait()

    def wait_for(self, what: str, probe) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self.check_children()
            if probe():
                return
            if time.monotonic() > deadline:
                raise Failed(f"{what} did not come up within {PATIENCE} s; logs are in {self.work}")
            time.sleep(0.1)

    def kubectl(self, *args: str) -> str:
        done = subprocess.run([self.args.kubectl, *args], env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"kubectl {' '.join(args)}:\n  {done.stderr.strip()}")
        return done.stdout

    # ------------------------------------------------------------------ parts

    def start(self) -> None:
        for name, port in [("simulator", self.simulator), ("operator", self.callbacks), ("operator", self.admin)]:
            free_or_fail(name, port)

        say("starting etcd, kube-apiserver and kube-controller-manager")
        up = self.spawn("control-plane", [self.args.devcluster, "up", f"--parent-pid={os.getpid()}"], stdout=subprocess.PIPE, text=True)
        kubeconfig = (up.stdout.readline() if up.stdout else "").strip()
        if not kubeconfig:
            up.wait()
            self.check_children()
        self.env["KUBECONFIG"] = kubeconfig
        self.audit_log = pathlib.Path(kubeconfig).parent / "audit.log"

        say(f"starting the simulator of the Gemini API on port {self.simulator}")
        self.spawn("simulator", [self.args.simulator, "--listen", f"127.0.0.1:{self.simulator}", "--speed", str(self.args.speed)])
        self.wait_for("the simulator", lambda: http_ok(f"http://127.0.0.1:{self.simulator}/_sim/healthz"))

        say("installing the GeminiBatchJob resource")
        self.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        self.kubectl("wait", "--for=condition=Established", "crd/geminibatchjobs.geminibatch.dev", "--timeout=30s")

        say("starting the operator")
        base = f"http://127.0.0.1:{self.simulator}"
        self.spawn("operator", [
            self.args.operator, "run", "--namespace", "default",
            "--gemini-base-url", base, "--allow-insecure-upstream",
            "--external-url", f"http://127.0.0.1:{self.callbacks}", "--allow-insecure-callbacks",
            "--listen", f"127.0.0.1:{self.callbacks}", "--admin-listen", f"127.0.0.1:{self.admin}",
        ])
        self.wait_for("the operator", lambda: http_ok(f"http://127.0.0.1:{self.admin}/readyz"))

    def run_examples(self) -> None:
        for name in EXAMPLES:
            path = self.args.examples / name
            say(f"kubectl apply -f examples/{name}")
            self.kubectl("apply", "-f", str(path))
        applied = time.monotonic()

        last: dict[str, str] = {}
        deadline = applied + PATIENCE
        while True:
            self.check_children()
            jobs = json.loads(self.kubectl("get", "gbj", "-o", "json"))["items"]
            for job in jobs:
                name, line = job["metadata"]["name"], describe(job)
                if last.get(name) != line:
                    last[name] = line
                    say(f"  {name:16} {line}")
            if len(jobs) == len(EXPECTED) and all(is_finished(job) for job in jobs):
                break
            if time.monotonic() > deadline:
                raise Failed(f"not all jobs finished within {PATIENCE} s; logs are in {self.work}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - applied
        for job in jobs:
            check(job)

    def show_results(self) -> None:
        say("results of minimal, read by a script that knows only kubectl (examples/wait-and-read.sh):")
        env = dict(self.env, PATH=f"{pathlib.Path(self.args.kubectl).parent}{os.pathsep}{self.env.get('PATH', '')}")
        done = subprocess.run([str(ROOT / "examples/wait-and-read.sh"), "minimal", "60s"], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"examples/wait-and-read.sh:\n  {done.stderr.strip()}")
        lines = done.stdout.splitlines()
        if len(lines) != EXPECTED["minimal"][1]:
            raise Failed(f"minimal has {len(lines)} results, not {EXPECTED['minimal'][1]}")
        for line in lines:
            print("    " + (line if len(line) <= 150 else line[:149] + "…"))
        print()
        print(self.kubectl("get", "gbj", "-o", "wide").rstrip())
        print()

    def show_cost(self) -> None:
        jobs = len(EXPECTED)
        log = json.loads(http_get(f"http://127.0.0.1:{self.simulator}/_sim/log"))
        entries = log["entries"] if isinstance(log, dict) else log
        by_op = collections.Counter(e["op"] for e in entries if e["op"] != "Jwks")
        writes = events = 0
        for line in self.audit_log.read_text().splitlines():
            entry = json.loads(line)
            ref = entry.get("objectRef", {})
            if entry.get("stage") != "ResponseComplete" or entry["verb"] not in ("create", "update", "patch", "delete"):
                continue
            if "gemini-batch" not in entry.get("userAgent", ""):
                continue
            if ref.get("resource") in ("geminibatchjobs", "configmaps"):
                writes += 1
            elif ref.get("resource") == "events":
                events += 1
        print(
            f"Cost of {jobs} jobs: {sum(by_op.values())} Gemini requests "
            f"({', '.join(f'{n} {op}' for op, n in sorted(by_op.items()))}), "
            f"{writes} Kubernetes writes, {events} Events, {self.seconds:.1f} seconds."
        )


def free_or_fail(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise Failed(
                f"port {port} of 127.0.0.1, which the {name} needs, is taken ({e.strerror}): stop what uses it, or set "
                "GBO_DEMO_SIMULATOR_PORT, GBO_DEMO_CALLBACK_PORT or GBO_DEMO_ADMIN_PORT"
            ) from e


def http_get(url: str) -> bytes:
    # No proxy: everything is on loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return answer.read()


def http_ok(url: str) -> bool:
    try:
        http_get(url)
        return True
    except OSError:
        return False


def condition(job: dict, kind: str) -> dict:
    return next((c for c in job.get("status", {}).get("conditions", []) if c["type"] == kind), {})


def is_finished(job: dict) -> bool:
    return condition(job, "Finished").get("status") == "True"


def describe(job: dict) -> str:
    status = job.get("status", {})
    ready = condition(job, "Ready")
    reason = ready.get("reason", "")
    text = f"{status.get('state', 'Pending'):10} {reason}"
    if is_finished(job) or condition(job, "Stalled").get("status") == "True":
        text += f": {ready.get('message', '')}"
    return text


def check(job: dict) -> None:
    name, status = job["metadata"]["name"], job["status"]
    requests = status.get("requests", {})
    got = (status["state"], requests.get("succeeded"), requests.get("failed"))
    if got != EXPECTED[name]:
        raise Failed(f"{name} ended as {got}, expected {EXPECTED[name]}: {condition(job, 'Ready').get('message')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devcluster", required=True)
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--operator", required=True)
    parser.add_argument("--simulator", required=True)
    parser.add_argument("--speed", type=float, default=30.0)
    parser.add_argument("--examples", type=pathlib.Path, default=ROOT / "examples")
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    work = pathlib.Path(tempfile.mkdtemp(prefix="gbo-demo-"))
    demo = Demo(args, work)
    try:
        demo.start()
        demo.run_examples()
        demo.show_results()
        demo.show_cost()
        if args.keep:
            print(f"\nStill running. In another terminal:\n  export KUBECONFIG={demo.env['KUBECONFIG']}\n  kubectl get gbj -w")
            print(f"The simulator's log: http://127.0.0.1:{demo.simulator}/_sim/log   Logs: {work}\nCtrl-C ends it.", flush=True)
            while True:
                demo.check_children()
                time.sleep(0.5)
    except KeyboardInterrupt:
        return 0 if args.keep else 130
    except Failed as e:
        print(f"\ndemo failed: {e}", file=sys.stderr)
        return 1
    finally:
        demo.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
