//! Waiting, and saying what was waited for.

use std::time::{Duration, Instant};

use anyhow::bail;

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_mins(3);

/// Until it is so: asked again and again. `Err` says what is missing, and is told when patience ends.
pub fn until<T>(what: &str, look: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error.context(format!("{what}: not after {} s", PATIENCE.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(250)),
        }
    }
}

/// Stops with `message` unless it is so.
pub fn ensure(is_so: bool, message: impl FnOnce() -> String) -> anyhow::Result<()> {
    if !is_so {
        bail!("{}", message());
    }
    Ok(())
}

/// Stops unless the text has all of these words.
pub fn ensure_contains(text: &str, words: &[&str]) -> anyhow::Result<()> {
    for word in words {
        ensure(text.contains(word), || format!("{word:?} is missing in:\n{text}"))?;
    }
    Ok(())
}
