//! What a callback is and when to believe it.
//!
//! Everything here is pure: bytes, keys and a clock value in, a verdict with a reason out. No I/O, no clock,
//! no sibling module of the crate. The controller mints callback URLs with [`token`], the receiver checks
//! deliveries against the same code, and `gemini-batch-operator verify` explains them.

pub mod event;
pub mod jwks;
mod jwt;
pub mod keyring;
pub mod signature;
#[cfg(test)]
pub(crate) mod testing;
pub mod token;
pub mod verdict;

pub use verdict::{Accepted, Delivery, Keys, Policy, Refusal, Scheme, check_headers, verify};
