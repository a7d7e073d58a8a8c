//! gemini-batch-operator: see `docs/architecture.md` for the picture of the house.
pub mod api;
pub mod callback;
pub mod controller;
pub mod gemini;
pub mod receiver;
pub mod verify;
