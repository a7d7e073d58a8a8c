//! Ends the process at a named step, for tests of restarts. Does nothing without the feature
//! `crash-points`, which no release has.

/// Ends the process as SIGKILL would, if `GBO_CRASH_AT` is `when:step`.
#[cfg(feature = "crash-points")]
pub(crate) fn at(when: &str, step: &str) {
    if std::env::var("GBO_CRASH_AT").is_ok_and(|at| at.split_once(':') == Some((when, step))) {
        std::process::abort();
    }
}

/// Does nothing.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn at(_when: &str, _step: &str) {}
