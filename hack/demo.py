#!/usr/bin/env python3
"""The main job, from `kubectl apply` to results, on an embedded control plane and the simulator.

    hack/demo.py          run it once, print what it cost, exit 0 only if everything came true
    hack/demo.py --keep   the same, then leave it running to play with until Ctrl-C

Called by `make demo` and `make up`, which build what it needs. Only the Python standard library.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import pathlib
import select
import shutil
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
STALLED_PATIENCE = 3  # seconds that a job may be Stalled: it waits for somebody, and here is nobody
HEARTBEAT = 5  # seconds between two signs of life while something is waited for

START = time.monotonic()


class Failed(Exception):
    """The demo did not work; the message says why."""


def say(text: str) -> None:
    try:
        print(f"[{time.monotonic() - START:5.1f}s] {text}", flush=True)
    except OSError:
        pass  # the terminal was closed; the parts must be taken down all the same


def port_from(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise Failed(f"{name} is '{text}', which is no port: set it to a number from 1 to 65535, or unset it")
    return int(text)


def dies_with_this_process():
    """What a child calls before it becomes its program, so that not even SIGKILL leaves it behind (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent, set_parent_death_signal = ctypes.CDLL(None).prctl, os.getpid(), 1

    def in_the_child() -> None:
        prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return in_the_child


class Demo:
    def __init__(self, args: argparse.Namespace, work: pathlib.Path) -> None:
        self.args = args
        self.work = work
        self.children: list[tuple[str, subprocess.Popen]] = []
        self.dies_with_this_process = dies_with_this_process()
        # The end of a log that says why a part ended is its error, not where in the code that came from.
        self.env = {"RUST_LIB_BACKTRACE": "0", **os.environ}
        self.simulator = port_from("GBO_DEMO_SIMULATOR_PORT", 18080)
        self.callbacks = port_from("GBO_DEMO_CALLBACK_PORT", 18081)
        self.admin = port_from("GBO_DEMO_ADMIN_PORT", 18082)

    # ------------------------------------------------------------------ processes

    def spawn(self, name: str, command: list[str], **kwargs) -> subprocess.Popen:
        log = open(self.work / f"{name}.log", "wb")
        # A session of its own: Ctrl-C reaches only this script, which takes the parts down in order.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=log, env=self.env, start_new_session=True, **kwargs
        )
        self.children.append((name, child))
        return child

    def log_of(self, name: str) -> list[str]:
        return (self.work / f"{name}.log").read_text(errors="replace").strip().splitlines()

    def check_children(self) -> None:
        for name, child in self.children:
            if child.poll() is not None:
                tail = self.log_of(name)[-12:]
                raise Failed(f"{name} ended with exit code {child.returncode}:\n  " + "\n  ".join(tail))

    def stop(self) -> None:
        for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(again, signal.SIG_IGN)  # it ends already
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
                raise Failed(f"{what} did not come up within {PATIENCE} s")
            time.sleep(0.1)

    def kubectl(self, *args: str) -> str:
        try:
            done = subprocess.run(
                [self.args.kubectl, *args], env=self.env, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired as e:
            raise Failed(f"kubectl {' '.join(args)}: no answer within {PATIENCE} s") from e
        if done.returncode != 0:
            raise Failed(f"kubectl {' '.join(args)}:\n  {done.stderr.strip()}")
        return done.stdout

    # ------------------------------------------------------------------ parts

    def start(self) -> None:
        for name, port in [("simulator", self.simulator), ("operator", self.callbacks), ("operator", self.admin)]:
            free_or_fail(name, port)

        say("starting etcd, kube-apiserver and kube-controller-manager")
        kubeconfig = self.control_plane()
        self.env["KUBECONFIG"] = kubeconfig
        self.audit_log = pathlib.Path(kubeconfig).parent / "audit.log"

        say(f"starting the simulator of the Gemini API on port {self.simulator}")
        command = [self.args.simulator, "--listen", f"127.0.0.1:{self.simulator}", "--speed", str(self.args.speed)]
        self.spawn("simulator", command, preexec_fn=self.dies_with_this_process)
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
        ], preexec_fn=self.dies_with_this_process)
        self.wait_for("the operator", lambda: http_ok(f"http://127.0.0.1:{self.admin}/readyz"))

    def control_plane(self) -> str:
        """Starts it, and returns the path of its kubeconfig when it is ready."""
        # It looks after its own components, and ends with this process.
        command = [self.args.devcluster, "up", f"--parent-pid={os.getpid()}"]
        up = self.spawn("control-plane", command, stdout=subprocess.PIPE)
        out, line = up.stdout.fileno(), b""
        deadline, beat = time.monotonic() + PATIENCE, time.monotonic() + HEARTBEAT
        while not line.endswith(b"\n"):
            if select.select([out], [], [], 0.5)[0]:
                read = os.read(out, 4096)
                if not read:
                    up.wait()
                    self.check_children()
                line += read
            now = time.monotonic()
            if now > deadline:
                tail = self.log_of("control-plane")[-12:]
                raise Failed("\n  ".join([f"the control plane did not come up within {PATIENCE} s:", *tail]))
            if now > beat:
                beat = now + HEARTBEAT
                say("  not ready yet: " + "".join(self.log_of("control-plane")[-1:]))
        return line.decode().strip()

    def run_examples(self) -> None:
        for name in EXAMPLES:
            path = self.args.examples / name
            say(f"kubectl apply -f examples/{name}")
            self.kubectl("apply", "-f", str(path))
        applied = time.monotonic()

        last: dict[str, str] = {}
        stalled: dict[str, float] = {}  # since when
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
            now = time.monotonic()
            names = [job["metadata"]["name"] for job in jobs if condition(job, "Stalled").get("status") == "True"]
            stalled = {name: stalled.get(name, now) for name in names}
            if any(now - since > STALLED_PATIENCE for since in stalled.values()):
                raise Failed(f"{' and '.join(stalled)} can't go on by itself; unfinished:\n{unfinished(jobs)}")
            if now > applied + PATIENCE:
                raise Failed(f"not all jobs finished within {PATIENCE} s; unfinished:\n{unfinished(jobs)}")
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


def unfinished(jobs: list[dict]) -> str:
    """Each job that is not finished, with reason and message."""
    lines, seen = [], {job["metadata"]["name"]: job for job in jobs}
    for name in sorted({*EXPECTED, *seen}):
        job = seen.get(name)
        if job is None:
            lines.append(f"  {name}: does not exist")
        elif not is_finished(job):
            why = condition(job, "Stalled")
            why = why if why.get("status") == "True" else condition(job, "Ready")
            lines.append(f"  {name}: {why.get('reason', 'not looked at yet')}: {why.get('message', '')}")
    return "\n".join(lines)


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
    for asked in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(asked) != signal.SIG_IGN:  # nohup
            signal.signal(asked, lambda number, _: sys.exit(128 + number))

    work = pathlib.Path(tempfile.mkdtemp(prefix="gbo-demo-"))
    demo, keep_logs = None, True
    try:
        demo = Demo(args, work)
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
        keep_logs = False
    except KeyboardInterrupt:
        keep_logs = False
        return 0 if args.keep else 130
    except SystemExit:
        keep_logs = False
        raise
    except Failed as e:
        print(f"\ndemo failed: {e}", file=sys.stderr)
        return 1
    finally:
        if demo:
            demo.stop()
        if keep_logs and any(work.iterdir()):
            print(f"logs are in {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
