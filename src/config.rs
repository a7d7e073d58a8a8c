//! Every flag and environment variable, in one place.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use url::Url;

use crate::callback::Scheme;
use crate::telemetry::LogFormat;

/// Takes Gemini batch jobs from `kubectl apply` to finished.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the operator.
    Run(Box<RunArgs>),
    /// Print the `CustomResourceDefinition` as YAML.
    Crd,
    /// Add a key to the ring that callback URLs are signed with.
    RotateKeys(RotateKeysArgs),
    /// Say why a callback is accepted or refused.
    Verify(Box<crate::verify::VerifyArgs>),
}

/// Which half of the operator to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Both: for demos and small installations.
    All,
    /// Submits jobs and collects results.
    Controller,
    /// Takes callbacks. May patch the status of jobs and read the key ring, nothing else.
    Receiver,
}

impl Role {
    /// Whether the controller runs.
    #[must_use]
    pub fn has_controller(self) -> bool {
        self != Self::Receiver
    }

    /// Whether the receiver runs.
    #[must_use]
    pub fn has_receiver(self) -> bool {
        self != Self::Controller
    }
}

/// Name of the key ring's Secret, unless an administrator gives another.
const KEY_RING_SECRET: &str = "gemini-batch-operator-callback-keys";

/// Flags of `rotate-keys`.
#[derive(Args, Clone, Debug)]
pub struct RotateKeysArgs {
    /// Namespace of the operator: where its key ring is. Default: the namespace of the pod, or of the
    /// kubeconfig's context.
    #[arg(long, env = "GBO_NAMESPACE")]
    pub namespace: Option<String>,

    /// Secret that holds the key ring.
    #[arg(long, env = "GBO_KEY_RING_SECRET", default_value = KEY_RING_SECRET)]
    pub key_ring_secret: String,
}

/// Flags of `run`. Each has an environment variable of the same name, with the prefix `GBO_`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Which half of the operator to run.
    #[arg(long, env = "GBO_ROLE", value_enum, default_value = "all")]
    pub role: Role,

    /// Namespace of the operator: where its key ring is. Default: the namespace of the pod, or of the
    /// kubeconfig's context.
    #[arg(long, env = "GBO_NAMESPACE")]
    pub namespace: Option<String>,

    /// Secret in the operator's namespace that holds the keys of callback URLs. The controller creates it.
    #[arg(long, env = "GBO_KEY_RING_SECRET", default_value = KEY_RING_SECRET)]
    pub key_ring_secret: String,

    /// Make a new key ring although the old one is gone and unfinished jobs were submitted with it. Their
    /// callbacks will be refused; the sweep finds their ends.
    #[arg(long, env = "GBO_RECREATE_KEY_RING")]
    pub recreate_key_ring: bool,

    /// Identifies this cluster in the names of batches. Default: the UID of the namespace kube-system.
    #[arg(long, env = "GBO_CLUSTER_ID")]
    pub cluster_id: Option<String>,

    /// The one namespace whose jobs are worked on. Default: all. Needs --cluster-id, since the default id
    /// can't be read then.
    #[arg(long, env = "GBO_WATCH_NAMESPACE", requires = "cluster_id")]
    pub watch_namespace: Option<String>,

    /// Where Gemini reaches the receiver, for example <https://batch-callbacks.example.com>. The controller
    /// puts it into the callback URL of each batch, the receiver checks that callbacks were meant for it.
    #[arg(long, env = "GBO_EXTERNAL_URL")]
    pub external_url: Option<Url>,

    /// Accept an external URL that is not https: for tests on one machine.
    #[arg(long, env = "GBO_ALLOW_INSECURE_CALLBACKS")]
    pub allow_insecure_callbacks: bool,

    /// Where the receiver listens for callbacks.
    #[arg(long, env = "GBO_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// Certificate chain (PEM) of the receiver, if it shall speak TLS itself. Read again when the file changes.
    #[arg(long, env = "GBO_TLS_CERT_FILE", value_name = "FILE", requires = "tls_key_file")]
    pub tls_cert_file: Option<PathBuf>,

    /// Private key (PEM) of that certificate.
    #[arg(long, env = "GBO_TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,

    /// How callbacks may be signed: v1a (Ed25519, what Gemini was seen to send), jwt (RS256, what its guide
    /// describes).
    #[arg(
        long,
        env = "GBO_CALLBACK_SCHEMES",
        value_delimiter = ',',
        default_value = "v1a,jwt",
        value_parser = callback_scheme
    )]
    pub callback_schemes: Vec<Scheme>,

    /// Audience that a JWT must be for; may be repeated. Default: the callback URL itself.
    #[arg(long, env = "GBO_CALLBACK_AUDIENCE", value_delimiter = ',')]
    pub callback_audience: Vec<String>,

    /// How old a callback may be, in seconds. Gemini retries for 24 hours and may not refresh the timestamp; a
    /// replay only makes the operator look.
    #[arg(long, env = "GBO_CALLBACK_MAX_AGE_SECONDS", default_value_t = 93_600)]
    pub callback_max_age_seconds: u32,

    /// How far a callback's timestamp may be ahead of our clock, in seconds.
    #[arg(long, env = "GBO_CALLBACK_MAX_SKEW_SECONDS", default_value_t = 300)]
    pub callback_max_skew_seconds: u32,

    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "GBO_ADMIN_LISTEN", default_value = "0.0.0.0:8081")]
    pub admin_listen: SocketAddr,

    /// The Gemini API.
    #[arg(long, env = "GBO_GEMINI_BASE_URL", default_value = "https://generativelanguage.googleapis.com")]
    pub gemini_base_url: Url,

    /// Version of the Gemini API.
    #[arg(long, env = "GBO_GEMINI_API_VERSION", default_value = "v1beta")]
    pub gemini_api_version: String,

    /// Where the keys that sign callbacks are published. Default: /.well-known/jwks.json of the Gemini API.
    #[arg(long, env = "GBO_JWKS_URL")]
    pub jwks_url: Option<Url>,

    /// Accept a Gemini API and a JWKS URL that are not https: for the simulator.
    #[arg(long, env = "GBO_ALLOW_INSECURE_UPSTREAM")]
    pub allow_insecure_upstream: bool,

    /// Largest input of a job, in bytes. Gemini takes 2 GB.
    #[arg(long, env = "GBO_MAX_INPUT_BYTES", default_value_t = 2_000_000_000)]
    pub max_input_bytes: u64,

    /// How many jobs are worked on at the same time.
    #[arg(long, env = "GBO_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub concurrency: u16,

    /// Seconds between two sweeps for what callbacks did not tell.
    #[arg(long, env = "GBO_SWEEP_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub sweep_seconds: u32,

    /// Lease in the operator's namespace by which one of several controllers is elected.
    #[arg(long, env = "GBO_LEASE_NAME", default_value = "gemini-batch-operator")]
    pub lease_name: String,

    /// Who this process is in the election. Default: the name of the pod (or host) and a random suffix.
    #[arg(long, env = "GBO_LEASE_IDENTITY")]
    pub lease_identity: Option<String>,

    /// Seconds without a renewal after which another controller may take over.
    #[arg(long, env = "GBO_LEASE_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    pub lease_seconds: u32,

    /// Seconds without a renewal of its own after which a controller stops leading. Less than --lease-seconds.
    #[arg(long, env = "GBO_LEASE_RENEW_DEADLINE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub lease_renew_deadline_seconds: u32,

    /// Seconds between renewals, and between looks at a lease that another controller holds.
    #[arg(long, env = "GBO_LEASE_RETRY_SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub lease_retry_seconds: u32,

    /// Log level, for example info, debug, or `warn,gemini_batch_operator=debug`.
    #[arg(long, env = "GBO_LOG_LEVEL", default_value = "info")]
    pub log_level: String,

    /// Log format.
    #[arg(long, env = "GBO_LOG_FORMAT", value_enum, default_value = "json")]
    pub log_format: LogFormat,

    /// For tests: the moment (Unix milliseconds) from which on the clock runs faster.
    #[arg(long, env = "GBO_CLOCK_ORIGIN_UNIX_MS", hide = true, default_value_t = 0)]
    pub clock_origin_unix_ms: u64,

    /// For tests: how many times faster.
    #[arg(long, env = "GBO_CLOCK_FACTOR", hide = true, default_value_t = 1.0)]
    pub clock_factor: f64,
}

fn callback_scheme(text: &str) -> Result<Scheme, String> {
    match text.parse()? {
        // Its secret belongs to a webhook of the whole project; a batch's own webhook has none.
        Scheme::V1 => Err("v1 is for webhooks that are set up per project: expected v1a or jwt".to_owned()),
        scheme => Ok(scheme),
    }
}

/// A combination of flags that can't work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Both roles need the external URL.
    #[error(
        "--external-url is missing: the address at which Gemini reaches the callback receiver, \
         for example https://batch-callbacks.example.com"
    )]
    NoExternalUrl,
    /// An external URL must be https.
    #[error(
        "--external-url must be https, Gemini's callbacks cross the internet; \
         --allow-insecure-callbacks permits http for tests on one machine"
    )]
    InsecureExternalUrl,
    /// It has parts that can't be kept.
    #[error("--external-url must not have a query, a fragment, a user name or a password")]
    ExternalUrlParts,
    /// Keys from there would be anybody's.
    #[error(
        "--jwks-url must be https: whoever answers there decides which callbacks are believed; \
         --allow-insecure-upstream permits http for the simulator"
    )]
    InsecureJwksUrl,
    /// Nobody's audience.
    #[error(
        "--callback-audience must not be empty: leave it out, and the callback URL itself is the audience"
    )]
    EmptyAudience,
    /// Timings of the election under which two could lead at once, or none for long.
    #[error(
        "--lease-retry-seconds must be less than --lease-renew-deadline-seconds, and that less than \
         --lease-seconds: else two controllers could lead at once"
    )]
    LeaseTimings,
    /// A clock that stands still or runs backwards.
    #[error("--clock-factor must be a number above 0")]
    ClockFactor,
}

impl RunArgs {
    /// Checks what clap can't.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(self.clock_factor.is_finite() && self.clock_factor > 0.0) {
            return Err(ConfigError::ClockFactor);
        }
        let (retry, deadline) = (self.lease_retry_seconds, self.lease_renew_deadline_seconds);
        if retry >= deadline || deadline >= self.lease_seconds {
            return Err(ConfigError::LeaseTimings);
        }
        let url = self.external_url.as_ref().ok_or(ConfigError::NoExternalUrl)?;
        if url.scheme() != "https" && !(url.scheme() == "http" && self.allow_insecure_callbacks) {
            return Err(ConfigError::InsecureExternalUrl);
        }
        let with_user = !url.username().is_empty() || url.password().is_some();
        if url.query().is_some() || url.fragment().is_some() || with_user {
            return Err(ConfigError::ExternalUrlParts);
        }
        let jwks = self.jwks_url();
        if jwks.scheme() != "https" && !(jwks.scheme() == "http" && self.allow_insecure_upstream) {
            return Err(ConfigError::InsecureJwksUrl);
        }
        if self.callback_audience.iter().any(|audience| audience.trim().is_empty()) {
            return Err(ConfigError::EmptyAudience);
        }
        Ok(())
    }

    /// Where signing keys are published.
    #[must_use]
    pub fn jwks_url(&self) -> Url {
        self.jwks_url.clone().unwrap_or_else(|| {
            let mut url = self.gemini_base_url.clone();
            url.set_path("/.well-known/jwks.json");
            url
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &[&str]) -> Result<(), ConfigError> {
        let cli = Cli::parse_from(["gemini-batch-operator", "run"].into_iter().chain(args.iter().copied()));
        match cli.command {
            Command::Run(run) => run.check(),
            _ => unreachable!("the arguments say run"),
        }
    }

    #[test]
    fn both_roles_need_an_https_url() {
        for role in ["all", "controller", "receiver"] {
            assert_eq!(check(&["--role", role]), Err(ConfigError::NoExternalUrl));
        }
        assert_eq!(check(&["--external-url", "http://x"]), Err(ConfigError::InsecureExternalUrl));
        assert_eq!(check(&["--external-url", "http://x", "--allow-insecure-callbacks"]), Ok(()));
        assert_eq!(
            check(&["--external-url", "ftp://x", "--allow-insecure-callbacks"]),
            Err(ConfigError::InsecureExternalUrl)
        );
        assert_eq!(check(&["--external-url", "https://x/prefix"]), Ok(()));
        for url in ["https://x/?a=b", "https://user@x", "https://:secret@x", "https://x/#y"] {
            assert_eq!(check(&["--external-url", url]), Err(ConfigError::ExternalUrlParts), "{url}");
        }
        let jwks = ["--external-url", "https://x", "--jwks-url", "http://y", "--allow-insecure-upstream"];
        assert_eq!(check(&jwks[..4]), Err(ConfigError::InsecureJwksUrl));
        assert_eq!(check(&jwks), Ok(()));
        let audience = ["--external-url", "https://x", "--callback-audience", ""];
        assert_eq!(check(&audience), Err(ConfigError::EmptyAudience));
        assert_eq!(
            check(&["--external-url", "https://x", "--lease-seconds", "10"]),
            Err(ConfigError::LeaseTimings)
        );
        assert_eq!(
            check(&["--external-url", "https://x", "--clock-factor", "0"]),
            Err(ConfigError::ClockFactor)
        );
    }

    #[test]
    fn callbacks_are_accepted_as_the_administrator_says() {
        let run = |args: &[&str]| {
            let all = ["gemini-batch-operator", "run"].into_iter().chain(args.iter().copied());
            match Cli::try_parse_from(all).map_err(|e| e.to_string())?.command {
                Command::Run(run) => Ok(*run),
                _ => unreachable!("the arguments say run"),
            }
        };
        assert_eq!(run(&[]).unwrap().callback_schemes, [Scheme::V1a, Scheme::Jwt]);
        assert_eq!(run(&["--callback-schemes", "jwt"]).unwrap().callback_schemes, [Scheme::Jwt]);
        let refused: Result<RunArgs, String> = run(&["--callback-schemes", "v1a,v1"]);
        assert!(refused.unwrap_err().contains("set up per project: expected v1a or jwt"));
        let half: Result<RunArgs, String> = run(&["--tls-cert-file", "x"]);
        assert!(half.unwrap_err().contains("--tls-key-file"));
    }

    #[test]
    fn the_cli_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
