//! Leaves out one protection of the submission, so that the fault bench can be seen to fail. Does nothing without the
//! feature `break-submission`, which no release has.

#[cfg(all(feature = "break-submission", not(debug_assertions)))]
compile_error!(
    "break-submission leaves out what keeps a batch from being paid for twice: never in a release"
);

/// Whether `GBO_BREAK` says that `protection` (`grace`, `fence` or `adoption`) is left out.
#[cfg(feature = "break-submission")]
pub(crate) fn without(protection: &str) -> bool {
    std::env::var("GBO_BREAK").is_ok_and(|broken| broken == protection)
}

/// No.
#[cfg(not(feature = "break-submission"))]
pub(crate) fn without(_protection: &str) -> bool {
    false
}
