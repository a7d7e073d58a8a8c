//! The operator against a real kube-apiserver and the simulator of the Gemini API.
//!
//! The control plane comes from `hack/devcluster`; each test has a namespace, a simulator and an operator
//! of its own. Nothing here sleeps to synchronise: tests wait for what a user would see.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by panicking"
)]

mod administration;
mod bad_input;
mod callbacks;
mod crashes;
mod dependents;
mod embeddings;
mod endings;
mod harness;
mod keys;
mod kubectl;
mod leader;
mod least_privilege;
mod lifecycle;
mod main_job;
mod metrics;
mod object_store;
mod outages;
mod quota;
mod retry;
mod rules;
mod sharded_output;
mod sharding;
mod stored_output;
mod stores;
mod sweep;
mod unknown_outcomes;
