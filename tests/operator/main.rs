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

mod bad_input;
mod callbacks;
mod crashes;
mod endings;
mod harness;
mod keys;
mod kubectl;
mod leader;
mod least_privilege;
mod main_job;
mod outages;
mod rules;
mod unknown_outcomes;
