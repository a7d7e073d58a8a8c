#!/bin/sh
# Something that depends on a job without knowing this operator: it waits for the condition Finished and
# reads the output. Runs wherever kubectl does; in a Kubernetes Job its ServiceAccount needs get, list and
# watch on geminibatchjobs.geminibatch.dev and get on the output ConfigMap.
#
#   examples/wait-and-read.sh JOB [TIMEOUT]
set -eu
job=${1:?usage: wait-and-read.sh JOB [TIMEOUT]}
timeout=${2:-24h}

kubectl wait --for=condition=Finished "gbj/$job" --timeout="$timeout" >&2
state=$(kubectl get gbj "$job" -o 'jsonpath={.status.state}')
if [ "$state" != Succeeded ]; then
  kubectl get gbj "$job" -o 'jsonpath={.status.conditions[?(@.type=="Failed")].message}{"\n"}' >&2
  exit 1
fi
output=$(kubectl get gbj "$job" -o 'jsonpath={.status.output.configMap}')
kubectl get configmap "$output" -o 'jsonpath={.data.results\.jsonl}'
