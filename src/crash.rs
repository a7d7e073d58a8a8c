//! Ends or stops the process at a named step, for tests of restarts and for the fault bench. Does nothing without
//! the feature `crash-points`, which no release has.

/// Ends the process as SIGKILL would if `GBO_CRASH_AT` is `when:step`, stops it as SIGSTOP does if `GBO_STOP_AT` is,
/// and panics if `GBO_PANIC_AT` is. `when:step@3` means the third time that the process comes there,
/// `when:step@*` each time.
#[cfg(feature = "crash-points")]
pub(crate) fn at(when: &str, step: &str) {
    use std::sync::atomic::AtomicU32;

    static CRASHES: AtomicU32 = AtomicU32::new(0);
    static STOPS: AtomicU32 = AtomicU32::new(0);
    static PANICS: AtomicU32 = AtomicU32::new(0);
    if is_due("GBO_CRASH_AT", when, step, &CRASHES) {
        std::process::abort();
    }
    if is_due("GBO_STOP_AT", when, step, &STOPS) {
        // Comes back when somebody sends SIGCONT. The signal is taken by any thread, and this one would go on until it was:
        // so it is waited for.
        let script = r#"kill -STOP "$0"; until grep -q ') T ' "/proc/$0/stat"; do :; done"#;
        let id = std::process::id().to_string();
        let _ = std::process::Command::new("sh").args(["-c", script, &id]).status();
    }
    assert!(!is_due("GBO_PANIC_AT", when, step, &PANICS), "as a test wanted it");
}

/// Whether the variable names this step, and it was reached as often as it says.
#[cfg(feature = "crash-points")]
fn is_due(variable: &str, when: &str, step: &str, visits: &std::sync::atomic::AtomicU32) -> bool {
    let Ok(text) = std::env::var(variable) else { return false };
    let (point, number) = text.split_once('@').unwrap_or((&text, "1"));
    if point.split_once(':') != Some((when, step)) {
        return false;
    }
    if number == "*" {
        return true;
    }
    let visit = visits.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
    number.parse() == Ok(visit)
}

/// Does nothing.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn at(_when: &str, _step: &str) {}
