//! x
use std::io::Write;
fn main() -> anyhow::Result<()> {
    std::io::stdout().write_all(gemini_batch_operator::api::crd::yaml()?.as_bytes())?;
    Ok(())
}
