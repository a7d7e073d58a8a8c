#!/bin/sh
# Something that depends on a job without knowing this operator: it waits for the condition Finished and
# reads the output. Runs wherever kubectl does; examples/dependent-job.yaml does the same as a Kubernetes Job,
# and has the permissions that it takes.
#
#   examples/wait-and-read.sh JOB [TIMEOUT]
#
# The job need not be there yet. Exit code 0: the results are on stdout. 1: there are none, the reason is on
# stderr. 2: it has not finished in time, what it waits for is on stderr. 3: it has no spec.output, so its results
# are still with Gemini.
set -eu
job=${1:?usage: wait-and-read.sh JOB [TIMEOUT]}
timeout=${2:-24h}

if ! kubectl wait --for=create "gbj/$job" --timeout="$timeout" >&2 ||
  ! kubectl wait --for=condition=Finished "gbj/$job" --timeout="$timeout" >&2; then
  kubectl get gbj "$job" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].message}{"\n"}' >&2 || true
  exit 2
fi
state=$(kubectl get gbj "$job" -o 'jsonpath={.status.state}')
if [ "$state" != Succeeded ]; then
  kubectl get gbj "$job" -o 'jsonpath={.status.conditions[?(@.type=="Failed")].message}{"\n"}' >&2
  exit 1
fi
output=$(kubectl get gbj "$job" -o 'jsonpath={.status.output.configMap}')
if [ -z "$output" ]; then
  file=$(kubectl get gbj "$job" -o 'jsonpath={.status.output.fileName}')
  echo "$job has no spec.output: its results stay with Gemini, in the file $file (status.output.fileName)" >&2
  exit 3
fi
kubectl get configmap "$output" -o 'jsonpath={.data.results\.jsonl}'
