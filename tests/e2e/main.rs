//! What a platform team does on its first day, on a real node: helm install, kubectl apply, upgrade, roll back, uninstall.
//!
//!     make e2e                                         a cluster of its own (needs root), gone at the end
//!     make e2e E2E_KUBECONFIG=FILE E2E_LOAD=COMMAND    a cluster that is there, kind for example; COMMAND is called with
//!                                                      each image archive ("kind load image-archive")
//!
//! One program instead of tests that run in any order: the parts build on each other, as they do for a user. It prints
//! what it does, and stops at the first thing that is not as a user would expect, with what the cluster says about it.

mod checks;
mod cluster;
mod dependents;
mod gemini;
mod install;
mod jobs;
mod permissions;
mod rest;
mod scope;
mod upgrade;

use std::time::Instant;

use anyhow::Context as _;
use cluster::Cluster;

type Part = (&'static str, fn(&Cluster) -> anyhow::Result<()>);

/// In this order.
const PARTS: [Part; 9] = [
    ("helm install, of the previous version", install::previous),
    ("jobs go from apply to results", jobs::examples),
    ("helm upgrade, rollback and changed values under running jobs", upgrade::under_running_jobs),
    ("60 running jobs while pods die and roll", jobs::while_pods_die),
    ("dependents react", dependents::react),
    ("the accounts can do what is written down, and no more", permissions::are_as_written),
    ("what a replica at rest needs", rest::measure),
    ("helm uninstall keeps jobs, and a new install carries on", upgrade::uninstall_and_again),
    ("only the namespaces that are named", scope::only_named_namespaces),
];

fn main() -> anyhow::Result<()> {
    let start = Instant::now();
    let cluster = Cluster::start()?;
    for (name, part) in PARTS {
        let begun = Instant::now();
        eprintln!("\n== {name}");
        if let Err(error) = part(&cluster) {
            cluster.explain();
            return Err(error).with_context(|| format!("\"{name}\" failed"));
        }
        eprintln!("== {name}: {} s", begun.elapsed().as_secs());
    }
    cluster.end()?;
    eprintln!("\n== e2e: all {} parts in {} s", PARTS.len(), start.elapsed().as_secs());
    Ok(())
}
