//! helm install, with the values that a test cluster needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::checks::{ensure, ensure_contains, until};
use crate::cluster::{Cluster, HOME, RELEASE, run};
use crate::gemini;

/// The chart of this commit.
pub const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/gemini-batch-operator");

/// What every installation here has: no registry, no internet, the simulator.
pub fn values(namespace: &str) -> Vec<String> {
    let url = format!("http://{RELEASE}-gemini-batch-operator-receiver.{namespace}.svc");
    [
        "image.repository=gemini-batch-operator".to_owned(),
        // Of this commit, whatever the chart's version is.
        format!("image.tag={}", env!("CARGO_PKG_VERSION")),
        "image.pullPolicy=Never".to_owned(),
        format!("gemini.baseURL={}", gemini::URL),
        "gemini.allowInsecure=true".to_owned(),
        format!("receiver.externalURL={url}"),
        "receiver.allowInsecureURL=true".to_owned(),
    ]
    .into()
}

/// `helm COMMAND gbo CHART` with these values and more, waiting until it runs.
pub fn helm(
    cluster: &Cluster,
    command: &str,
    chart: &Path,
    namespace: &str,
    more: &[&str],
) -> anyhow::Result<String> {
    let mut args = vec![command.to_owned(), RELEASE.to_owned(), chart.display().to_string()];
    args.extend(["--namespace", namespace, "--wait", "--timeout", "3m"].map(str::to_owned));
    for value in values(namespace).into_iter().chain(more.iter().map(|v| (*v).to_owned())) {
        args.extend(["--set".to_owned(), value]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    cluster.helm(&args)
}

/// The chart of the last release, with this image; before the first release, this chart. Its version is lowered, by which
/// the parts that follow tell the two apart.
fn previous_chart(cluster: &Cluster) -> anyhow::Result<PathBuf> {
    let copy = cluster.scratch.path().join("previous");
    let git = |args: &[&str]| run(Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(args));
    let tags = git(&["tag", "--list", "v*", "--merged", "HEAD", "--sort=-version:refname"])?;
    if let Some(tag) = tags.lines().next() {
        let archive = cluster.scratch.path().join("previous.tar");
        let into = format!("--output={}", archive.display());
        git(&["archive", &into, &format!("{tag}:charts/gemini-batch-operator")])?;
        std::fs::create_dir(&copy)?;
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&copy))?;
        eprintln!("   the previous version is {tag}");
    } else {
        run(Command::new("cp").arg("-r").arg(CHART).arg(&copy))?;
    }
    let file = copy.join("Chart.yaml");
    let text = std::fs::read_to_string(&file)?;
    let lower =
        |line: &str| if line.starts_with("version:") { "version: 0.0.1".to_owned() } else { line.to_owned() };
    std::fs::write(&file, text.lines().map(lower).collect::<Vec<_>>().join("\n"))?;
    Ok(copy)
}

pub fn previous(cluster: &Cluster) -> anyhow::Result<()> {
    gemini::start(cluster)?;
    refusals(cluster)?;
    let told = helm(cluster, "install", &previous_chart(cluster)?, HOME, &[])?;
    ensure_contains(&told, &["STATUS: deployed", "--wait"])?;
    four_replicas(cluster)?;
    let tested = cluster.helm(&["test", RELEASE, "--namespace", HOME, "--logs", "--timeout", "2m"])?;
    eprintln!("{tested}");
    Ok(())
}

/// What can't work is refused before anything is installed, with what to set.
fn refusals(cluster: &Cluster) -> anyhow::Result<()> {
    let cases: [(&[&str], &[&str]); 3] = [
        (&[], &["receiver.externalURL"]),
        (&["--set", "receiver.externalURL=http://example.com"], &["https", "receiver.allowInsecureURL"]),
        (&["--set", "receiver.externalURL=https://example.com", "--set", "noSuch.value=1"], &["noSuch"]),
    ];
    for (set, words) in cases {
        let args: Vec<&str> =
            ["install", RELEASE, CHART, "--namespace", HOME].iter().chain(set).copied().collect();
        let Err(error) = cluster.helm(&args) else { anyhow::bail!("helm {args:?} should be refused") };
        // Not in the command, which the first line repeats.
        let error = format!("{error:#}");
        ensure_contains(error.split_once('\n').map_or("", |(_, said)| said), words)?;
    }
    Ok(())
}

/// Both halves run twice, one controller leads.
pub fn four_replicas(cluster: &Cluster) -> anyhow::Result<()> {
    for half in ["controller", "receiver"] {
        let ready = pods(cluster, half)?.len();
        ensure(ready == 2, || format!("{ready} of 2 replicas of the {half} are there"))?;
    }
    until("a controller leads", || leader(cluster)).map(|_| ())
}

/// Names of the pods of one half that are not on their way out.
pub fn pods(cluster: &Cluster, half: &str) -> anyhow::Result<Vec<String>> {
    let selector = format!("app.kubernetes.io/component={half}");
    let pods = cluster.json(&["-n", HOME, "get", "pods", "-l", &selector])?;
    let pods = pods["items"].as_array().context("no items")?;
    let there = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(there.filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

/// The pod of the controller that leads.
pub fn leader(cluster: &Cluster) -> anyhow::Result<String> {
    let holder =
        cluster.kubectl(&["-n", HOME, "get", "leases", "-o", "jsonpath={.items[*].spec.holderIdentity}"])?;
    let pods = pods(cluster, "controller")?;
    let leads = pods.into_iter().find(|pod| holder.starts_with(pod.as_str()));
    leads.with_context(|| format!("the lease is held by {holder:?}, which is none of the pods"))
}
