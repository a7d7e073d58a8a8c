//! See Cargo.toml.

#[path = "../../src/callback/mod.rs"]
pub mod callback;
