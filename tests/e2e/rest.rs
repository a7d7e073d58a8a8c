//! What a replica needs that has nothing to do, as kubelet counts it. Printed, for docs/benchmarks.md: what the chart
//! requests comes from it. Judged is memory only, since time on a shared machine says little.

use anyhow::Context as _;
use serde_json::Value;

use crate::checks::{ensure, until};
use crate::cluster::{Cluster, HOME};
use crate::install;

const MIB: f64 = 1024.0 * 1024.0;
/// After so long a replica has done what it does after its start.
const AT_REST_SECONDS: i64 = 45;
/// Of the working set, for each replica.
const MOST_MIB: f64 = 30.0;

pub fn measure(cluster: &Cluster) -> anyhow::Result<()> {
    // Fresh ones: those that are there have worked.
    cluster.kubectl(&["-n", HOME, "rollout", "restart", "deployment"])?;
    for deployment in cluster.kubectl(&["-n", HOME, "get", "deployment", "-o", "name"])?.lines() {
        cluster.kubectl(&["-n", HOME, "rollout", "status", deployment, "--timeout=180s"])?;
    }
    install::four_replicas(cluster)?;
    for half in ["controller", "receiver"] {
        for pod in install::pods(cluster, half)? {
            let node =
                cluster.kubectl(&["-n", HOME, "get", "pod", &pod, "-o", "jsonpath={.spec.nodeName}"])?;
            // Kubelet looks every ten seconds or so; the rate is over the time between two looks. What it took to start
            // does not count.
            let (memory, cpu) = until(&format!("kubelet has measured {pod}"), || {
                let path = format!("/api/v1/nodes/{node}/proxy/stats/summary");
                let summary: Value = serde_json::from_str(&cluster.kubectl(&["get", "--raw", &path])?)?;
                let pods = summary["pods"].as_array().context("no pods")?;
                let its =
                    pods.iter().find(|p| p["podRef"]["name"] == pod.as_str()).context("not there yet")?;
                let container = &its["containers"][0];
                let time = |value: &Value| value.as_str().and_then(|t| t.parse::<jiff::Timestamp>().ok());
                let up = time(&container["cpu"]["time"]).zip(time(&container["startTime"]));
                let up = up.map_or(0, |(seen, start)| seen.duration_since(start).as_secs());
                ensure(up >= AT_REST_SECONDS, || format!("up for {up} s when it was last looked at"))?;
                let memory = container["memory"]["workingSetBytes"].as_f64().context("no memory yet")?;
                let cpu = container["cpu"]["usageNanoCores"].as_f64().context("no rate yet")?;
                Ok((memory / MIB, cpu / 1e6))
            })?;
            eprintln!("   {half} {pod}: {memory:.1} MiB, {cpu:.1} m CPU");
            ensure(memory <= MOST_MIB, || format!("{pod} needs {memory:.1} MiB, more than {MOST_MIB}"))?;
        }
    }
    Ok(())
}
