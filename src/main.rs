//! Parses arguments, builds the parts, runs until a signal.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use gemini_batch_operator::config::{Cli, Command, RotateKeysArgs, RunArgs};
use gemini_batch_operator::{api, check, process, telemetry, verify};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Crd => print_crd(),
        Command::Verify(args) => return verify::run(&args),
        Command::Run(args) => run(&args),
        Command::Check(args) => {
            runtime().map_err(Into::into).and_then(|runtime| runtime.block_on(check::run(&args)))
        }
        Command::RotateKeys(args) => rotate_keys(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain: the first link alone rarely says what to change.
            let _ = writeln!(std::io::stderr(), "gemini-batch-operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_crd() -> anyhow::Result<()> {
    std::io::stdout().write_all(api::crd::yaml()?.as_bytes())?;
    Ok(())
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    args.check()?;
    telemetry::init(&args.log_level, args.log_format)?;
    runtime()?.block_on(process::run(args))
}

fn rotate_keys(args: &RotateKeysArgs) -> anyhow::Result<()> {
    let done = runtime()?.block_on(process::rotate_keys(args))?;
    writeln!(std::io::stdout(), "{done}")?;
    Ok(())
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}
