//! What an administrator decided for all jobs, by flags. Pure: no client required.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::ResourceExt as _;

use super::{Problem, decide};
use crate::api::{GeminiBatchJob, Reason};

/// What an administrator decided for all jobs.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Whether no new batch is asked for.
    pub pause_submissions: bool,
    /// What pays for jobs that name no Secret.
    pub default_credential: Option<DefaultCredential>,
    /// What Events in the operator's namespace are about: its Lease.
    pub home: ObjectReference,
}

/// The operator's own API key, and who may spend with it.
#[derive(Clone, Debug)]
pub struct DefaultCredential {
    /// The operator's namespace.
    pub namespace: String,
    /// Name of the Secret.
    pub secret: String,
    /// Key in the Secret.
    pub key: String,
    /// Namespaces whose jobs may use it; `*` stands for all.
    pub namespaces: BTreeSet<String>,
}

impl DefaultCredential {
    fn allows(&self, namespace: &str) -> bool {
        self.namespaces.contains("*") || self.namespaces.contains(namespace)
    }
}

impl Policy {
    /// Why nothing may be submitted for the job with the operator's own credential; `None` if it may, or if the job
    /// brings one.
    #[must_use]
    pub fn refuses(&self, job: &GeminiBatchJob) -> Option<Problem> {
        if job.spec.credentials.is_some() {
            return None;
        }
        let namespace = job.namespace().unwrap_or_default();
        let ask = match &self.default_credential {
            // The schema refuses such a job; an older one may not have.
            _ if !job.spec.has_own_input() => {
                return Some(not_found(
                    "spec.credentials is missing, which is needed with importFrom and input.geminiFile: name the Secret \
                     with the API key in spec.credentials.secretRef",
                ));
            }
            Some(default) if default.allows(&namespace) => return None,
            Some(_) => format!(
                "this namespace may not use the operator's own credential. Name the Secret with an API key in \
                 spec.credentials.secretRef, or ask the administrator to add {namespace} to the namespaces that may \
                 (--default-credential-namespaces)"
            ),
            None => "the operator has no credential of its own. Name the Secret with an API key in \
                     spec.credentials.secretRef, or ask the administrator to set one up (--default-credential-secret)"
                .to_owned(),
        };
        Some(not_found(format!("spec.credentials is missing, and {ask}")))
    }

    /// Why the key with this fingerprint may not be used for the job; `None` if it may.
    ///
    /// A batch that was paid for with the operator's own key is watched, collected and cancelled with it whatever the
    /// list of namespaces says by now: nobody gains anything by money that is spent without a result, or goes on
    /// being spent. Only what would be a new submission is refused. That it was this very key is known by its
    /// fingerprint. That the batch is the job's own is seen by its display name (`act::may_see`): a status alone, which
    /// somebody may have written, proves nothing.
    #[must_use]
    pub fn withholds(
        &self,
        job: &GeminiBatchJob,
        fingerprint: &str,
        only_to_submit: bool,
    ) -> Option<Problem> {
        let ours = decide::current_attempt(job).is_some_and(|a| a.credential_fingerprint == fingerprint);
        self.refuses(job).filter(|_| only_to_submit || !ours)
    }
}

fn not_found(message: impl Into<String>) -> Problem {
    Problem::new(Reason::CredentialsNotFound, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
    fn job(spec: Value) -> GeminiBatchJob {
        let attempt = json!({"number": 1, "sendId": "s", "displayName": "d", "inputFile": "files/f",
            "credentialFingerprint": "ours", "intentTime": "2026-01-01T00:00:00.000000Z"});
        serde_json::from_value(json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": "job", "namespace": "team-a"}, "spec": spec,
            "status": {"state": "Pending", "attempts": [attempt]}}))
        .unwrap()
    }

    fn keyless() -> GeminiBatchJob {
        job(json!({"model": "m", "input": {"requests": [{"key": "k", "prompt": "x"}]}}))
    }

    fn policy(namespaces: &[&str]) -> Policy {
        let default_credential = Some(DefaultCredential {
            namespace: "home".to_owned(),
            secret: "shared".to_owned(),
            key: "apiKey".to_owned(),
            namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
        });
        Policy { default_credential, ..Policy::default() }
    }

    #[test]
    fn only_listed_namespaces_may_spend_with_the_operators_key() {
        for allowed in [&["team-a"][..], &["*"], &["b", "team-a"]] {
            assert_eq!(policy(allowed).refuses(&keyless()), None, "{allowed:?}");
        }
        for allowed in [&[][..], &["team"], &["team-ab"], &["b"]] {
            let problem = policy(allowed).refuses(&keyless()).unwrap();
            assert_eq!(problem.reason, Reason::CredentialsNotFound);
            for words in ["spec.credentials.secretRef", "add team-a to", "--default-credential-namespaces"] {
                assert!(problem.message.contains(words), "{}", problem.message);
            }
        }
        let none = Policy::default().refuses(&keyless()).unwrap();
        assert!(none.message.contains("--default-credential-secret"), "{}", none.message);
    }

    #[test]
    fn whoever_brings_a_key_needs_no_permission() {
        let own = job(json!({"model": "m", "credentials": {"secretRef": {"name": "s"}},
            "input": {"requests": [{"key": "k", "prompt": "x"}]}}));
        assert_eq!(Policy::default().refuses(&own), None);
    }

    #[test]
    fn what_somebody_else_put_at_gemini_is_not_read_with_it() {
        for spec in [
            json!({"model": "m", "input": {"geminiFile": {"name": "files/theirs"}}}),
            json!({"model": "m", "importFrom": {"batchName": "batches/theirs"}}),
        ] {
            assert!(policy(&["*"]).refuses(&job(spec)).is_some());
        }
    }

    #[test]
    fn a_batch_that_was_paid_for_is_looked_after_and_no_other() {
        let (listed, unlisted) = (policy(&["*"]), policy(&[]));
        assert_eq!(unlisted.withholds(&keyless(), "ours", false), None);
        assert!(unlisted.withholds(&keyless(), "ours", true).is_some(), "a new submission");
        assert!(unlisted.withholds(&keyless(), "other", false).is_some(), "not sent with this key");
        assert_eq!(listed.withholds(&keyless(), "other", true), None);
    }
}
