//! Benchmarks that compare within one run: `make bench` measures the whole operator beside what its API server can
//! take, `make bench-receiver` the receiver beside bare axum, `make bench-io` large inputs and results beside a plain copy.
//!
//! What is compared is a ratio: absolute numbers say more about the machine. Some statements are hard, and the exit
//! code is 1 if one of them does not hold.

mod io;
mod machine;
mod numbers;
mod operator;
mod parts;
mod receiver;
mod table;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole operator, with 10,000 jobs on a real API server.
    Operator(operator::Args),
    /// A job of a gigabyte from an S3 server and back to it, beside a plain copy.
    Io(io::Args),
    /// The receiver beside bare axum.
    Receiver {
        /// Only the cases whose name contains this.
        #[arg(default_value = "")]
        only: String,
    },
    /// A server under load, started by `receiver`.
    #[command(hide = true)]
    Serve,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Operator(args) => operator::measure(&args),
        Command::Io(args) => io::measure(&args),
        Command::Receiver { only } => receiver::measure(&only),
        Command::Serve => receiver::server::serve().map(|()| Vec::new()),
    };
    match result {
        Ok(broken) if broken.is_empty() => ExitCode::SUCCESS,
        Ok(broken) => {
            for statement in broken {
                let _ = writeln!(std::io::stderr(), "NOT MET: {statement}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "gemini-batch-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a line.
fn say(line: &str) {
    // a closed pipe changes nothing about the numbers
    let _ = writeln!(std::io::stdout(), "{line}");
}
