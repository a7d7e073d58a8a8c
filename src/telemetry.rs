//! Logs. Structured, to stderr, with the level from `--log-level`.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Starts logging. Levels are those of `tracing`: `info`, or `warn,gemini_batch_operator=debug`.
pub fn init(level: &str, format: LogFormat) -> Result<(), tracing_subscriber::filter::ParseError> {
    // kube logs the whole answer of the API server when it can't read it, at the level WARN: prompts of jobs,
    // and Secrets. Its errors come back to us, and we log them in our own words.
    let filter = EnvFilter::builder().parse(level)?.add_directive("kube_client::client=off".parse()?);
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(BoxMakeWriter::new(std::io::stderr));
    match format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.init(),
    }
    Ok(())
}
