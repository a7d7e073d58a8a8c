//! gemini-batch-operator: takes Gemini batch jobs from `kubectl apply` to finished. `docs/architecture.md`
//! has the picture of the house and its reasons.
//!
//! The library exists for the binary, the tests and the fuzz targets; its API is not stable.

pub mod admin;
pub mod api;
mod broken;
pub mod callback;
pub mod check;
pub mod clock;
pub mod config;
pub mod controller;
mod crash;
pub mod gemini;
pub mod lease;
pub mod process;
pub mod receiver;
pub mod store;
pub mod telemetry;
pub mod verify;
