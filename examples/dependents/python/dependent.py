#!/usr/bin/env python3
"""Does something once for each GeminiBatchJob that succeeded, in one namespace, for as long as it runs.

The API server picks the jobs: status.state is a selectable field, so this program is not told of others, nor of
what happens to them before their end.

Once: what it does is to create an object whose name is made of the job's UID. Whoever comes second, a restart or
another replica, is told that it exists. Here it is a ConfigMap with the number of results; it could as well be a
Kubernetes Job that works on them. It belongs to the GeminiBatchJob, so it goes with it; a job that is created anew
under the old name has another UID and counts as new.

The cluster is the one of KUBECONFIG, of ~/.kube/config or the one that it runs in; the namespace is the one that is
current there, or --namespace. Needs the package `kubernetes` (requirements.txt), and these permissions:
geminibatchjobs: list, watch; configmaps: get, create.
"""

import argparse
import pathlib
import sys
import time

import urllib3
from kubernetes import client, config, watch

GROUP, VERSION, PLURAL = "geminibatch.dev", "v1alpha1", "geminibatchjobs"
SELECTOR = "status.state=Succeeded"
GONE = 410
CONFLICT = 409
WATCH_SECONDS = 300  # then the API server ends the watch, and the next one goes on where it was
PAUSE_SECONDS = 2  # after an error


def say(text):
    print(text, file=sys.stderr, flush=True)


def current_namespace():
    inside = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        return config.list_kube_config_contexts()[1]["context"].get("namespace", "default")
    except config.ConfigException:
        return inside.read_text() if inside.exists() else "default"


class Dependent:
    def __init__(self, namespace):
        self.namespace = namespace
        self.jobs = client.CustomObjectsApi()
        self.core = client.CoreV1Api()

    def run(self):
        """Never returns. `version` is how far it has seen; without one, all jobs are listed."""
        version = None
        while True:
            try:
                version = version or self.list()
                version = self.watch(version)
            except client.ApiException as error:
                if error.status == GONE:
                    say("the API server does not remember that far back: listing all jobs again")
                    version = None
                else:
                    say(f"the API server says {error.status} {error.reason}")
                    time.sleep(PAUSE_SECONDS)
            except urllib3.exceptions.HTTPError as error:
                say(f"the API server can't be reached: {error}")
                time.sleep(PAUSE_SECONDS)

    def list(self):
        """Does what is to be done for all jobs there are, and returns the version to watch from."""
        answer = self.jobs.list_namespaced_custom_object(
            GROUP, VERSION, self.namespace, PLURAL, field_selector=SELECTOR
        )
        for job in answer["items"]:
            self.succeeded(job)
        return answer["metadata"]["resourceVersion"]

    def watch(self, version):
        """Until the API server ends the watch. Returns the version to go on from."""
        events = watch.Watch().stream(
            self.jobs.list_namespaced_custom_object,
            GROUP,
            VERSION,
            self.namespace,
            PLURAL,
            field_selector=SELECTOR,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(10, WATCH_SECONDS + 30),  # a connection that is dead without saying so
        )
        for event in events:
            job = event["object"]
            if event["type"] in ("ADDED", "MODIFIED"):  # ADDED: matches the selector from now on
                self.succeeded(job)
            # Only now: what was not done is seen again. A bookmark has a version and nothing else.
            version = job["metadata"]["resourceVersion"]
        return version

    def succeeded(self, job):
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        done = client.V1ConfigMap(
            metadata=client.V1ObjectMeta(
                name=f"python-{uid}",
                owner_references=[
                    client.V1OwnerReference(
                        api_version=job["apiVersion"], kind=job["kind"], name=name, uid=uid
                    )
                ],
            ),
            data={"job": name, "results": str(len(self.results(job)))},
        )
        try:
            self.core.create_namespaced_config_map(self.namespace, done)
        except client.ApiException as error:
            if error.status != CONFLICT:
                raise
            return  # done before
        say(f"{name}: done")

    def results(self, job):
        """The lines of the results. They are there: the operator stores them before it says Succeeded."""
        output = job["status"].get("output", {}).get("configMap")
        if output is None:
            return []  # they stay with Gemini
        try:
            stored = self.core.read_namespaced_config_map(output, self.namespace)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return []  # somebody has deleted them since
        return (stored.data or {}).get("results.jsonl", "").splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespace", help="where the jobs are (default: the current one)")
    args = parser.parse_args()
    config.load_config()
    namespace = args.namespace or current_namespace()
    say(f"waiting for jobs that succeed in namespace {namespace}")
    Dependent(namespace).run()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
