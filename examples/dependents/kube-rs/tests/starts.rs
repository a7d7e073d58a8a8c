//! Without a cluster it ends and says so. What it does with one is tested in `tests/operator/dependents.rs`.

use std::process::Command;

#[test]
fn without_a_cluster_it_says_so() {
    let out = Command::new(env!("CARGO_BIN_EXE_dependent-kube-rs"))
        .env("KUBECONFIG", "/nonexistent/kubeconfig")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .output()
        .unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("/nonexistent/kubeconfig"), "{said}");
}
