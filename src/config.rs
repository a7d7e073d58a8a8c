//! Every flag and environment variable, in one place.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use url::Url;

use crate::callback::Scheme;
use crate::store::Endpoints;
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
    /// Check that an installation works, as far as that can be seen without a batch.
    Check(crate::check::CheckArgs),
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

/// Whether Gemini is asked to call back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Callbacks {
    /// It is; the sweep finds what it does not tell.
    On,
    /// It is not: each API key is asked for its batches every minute. Needs no URL that Gemini reaches.
    Off,
}

/// Seconds between two sweeps for what callbacks did not tell.
const SWEEP_SECONDS: u32 = 600;

/// The same if there are no callbacks.
const POLL_SECONDS: u32 = 60;

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
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct RunArgs {
    /// Which half of the operator to run.
    #[arg(long, env = "GBO_ROLE", value_enum, default_value = "all")]
    pub role: Role,

    /// Whether Gemini is asked to call back when a batch has ended. off: the operator asks for the batches of each
    /// API key instead, and needs no --external-url and no receiver. May be changed at any time.
    #[arg(long, env = "GBO_CALLBACKS", value_enum, default_value = "on")]
    pub callbacks: Callbacks,

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

    /// The namespaces whose jobs are worked on, separated by commas; they must exist, and the operator's account must
    /// have a Role in each. Default: all. Needs --cluster-id, since the default id can't be read then.
    #[arg(
        long,
        env = "GBO_WATCH_NAMESPACES",
        value_name = "NAMESPACES",
        value_delimiter = ',',
        requires = "cluster_id"
    )]
    pub watch_namespaces: Vec<String>,

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

    /// How many inputs of object stores are read or sent at the same time, and as many results of any size read, joined
    /// and stored; further ones wait. Of one namespace one less of each, if there is more than one. Each takes about 32
    /// MiB of memory, more only for lines that are longer than some megabytes.
    #[arg(long, env = "GBO_TRANSFERS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub transfers: u16,

    /// Endpoints of object stores that jobs may name besides the clouds' own, separated by commas: for example
    /// <https://minio.example.com>, or * for all that speak https and are at no address of the operator's machine, its
    /// link or a cloud's metadata service. Default: none.
    #[arg(long, env = "GBO_OBJECT_STORE_ENDPOINTS", value_name = "URLS", default_value = "")]
    pub object_store_endpoints: Endpoints,

    /// Namespaces whose jobs may read object stores with the operator's own identity (workload identity, IRSA), or * for
    /// all. Default: none.
    #[arg(long, env = "GBO_OWN_IDENTITY_NAMESPACES", value_name = "NAMESPACES", value_delimiter = ',')]
    pub own_identity_namespaces: Vec<String>,

    /// Directories that jobs of all namespaces may read as `file://NAME/`, separated by commas: NAME=/path. Default: none.
    #[arg(
        long,
        env = "GBO_MAPPED_DIRECTORIES",
        value_name = "NAME=PATH",
        value_delimiter = ',',
        value_parser = mapped_directory
    )]
    pub mapped_directories: Vec<(String, PathBuf)>,

    /// The same for directories that jobs of all namespaces may write results to. Default: none.
    #[arg(
        long,
        env = "GBO_MAPPED_OUTPUT_DIRECTORIES",
        value_name = "NAME=PATH",
        value_delimiter = ',',
        value_parser = mapped_directory
    )]
    pub mapped_output_directories: Vec<(String, PathBuf)>,

    /// Bytes of results that may lie in the temporary directory (TMPDIR) at the same time, while they are joined with their
    /// requests. A result file takes as much as its size and about 200 bytes for each request; the keys of an input in an
    /// object store that is being checked take 24 bytes for each, if there are more than half a million. Default: 8 GiB.
    #[arg(long, env = "GBO_TEMPORARY_BYTES", default_value_t = 8 << 30)]
    pub temporary_bytes: u64,

    /// How many batches of one API key the operator lets be active at once; further jobs wait, first come first
    /// served. Gemini allows 100 for each project, whoever created them.
    #[arg(long, env = "GBO_MAX_ACTIVE_BATCHES", default_value_t = 80, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_active_batches: u16,

    /// Seconds between two sweeps for what callbacks did not tell: one list of batches for each API key. Default: 600,
    /// and 60 with --callbacks off.
    #[arg(long, env = "GBO_SWEEP_SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub sweep_seconds: Option<u32>,

    /// Seconds after which a create whose answer was lost, and whose batch is not found, is sent again behind a
    /// fence. More than a create may take (180) plus --lease-seconds.
    #[arg(long, env = "GBO_RESEND_GRACE_SECONDS", default_value_t = 600)]
    pub resend_grace_seconds: u32,

    /// For tests: seconds, on the operator's clock, that the creation of a batch may take.
    #[arg(long, env = "GBO_CREATE_TIMEOUT_SECONDS", hide = true, default_value_t = 180, value_parser = clap::value_parser!(u32).range(1..))]
    pub create_timeout_seconds: u32,

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

    /// Ask for no new batches. Those that exist are watched, collected and cancelled as ever; jobs that wait say so.
    #[arg(long, env = "GBO_PAUSE_SUBMISSIONS")]
    pub pause_submissions: bool,

    /// Secret in the operator's namespace with the API key that pays for jobs without spec.credentials, in the
    /// namespaces of --default-credential-namespaces. Default: there is none.
    #[arg(
        long,
        env = "GBO_DEFAULT_CREDENTIAL_SECRET",
        value_name = "NAME",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub default_credential_secret: Option<String>,

    /// Key in that Secret.
    #[arg(
        long,
        env = "GBO_DEFAULT_CREDENTIAL_KEY",
        value_name = "KEY",
        default_value = "apiKey",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub default_credential_key: String,

    /// Namespaces whose jobs may use that API key, or * for all. Default: none. One that is taken from the list starts
    /// nothing new; what it has at Gemini is still collected, and can be cancelled.
    #[arg(long, env = "GBO_DEFAULT_CREDENTIAL_NAMESPACES", value_name = "NAMESPACES", value_delimiter = ',')]
    pub default_credential_namespaces: Vec<String>,

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

/// Whether a namespace can be called so (RFC 1123 label).
fn is_label(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (first, last) = (name.bytes().next(), name.bytes().next_back());
    name.len() <= 63
        && first.is_some_and(letter)
        && last.is_some_and(letter)
        && name.bytes().all(|b| letter(b) || b == b'-')
}

fn mapped_directory(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if is_label(name) && path.starts_with('/') => Ok((name.to_owned(), path.into())),
        _ => {
            Err("expected NAME=/absolute/path, with a name of lower case letters, digits and '-'".to_owned())
        }
    }
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
         for example https://batch-callbacks.example.com. --callbacks off needs none: Gemini is polled then"
    )]
    NoExternalUrl,
    /// A receiver of nothing.
    #[error(
        "--role receiver has nothing to do with --callbacks off: run the controller alone (--role controller, or \
         all), or turn callbacks on"
    )]
    ReceiverWithoutCallbacks,
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
    /// A create could still be on its way when the next one is sent.
    #[error(
        "--resend-grace-seconds must be more than {least}: a create may take {create} seconds, and a controller that \
         lost its lease may have sent one up to --lease-seconds later"
    )]
    ResendGrace {
        /// Seconds, the sum of both.
        least: u64,
        /// Seconds that a create may take.
        create: u32,
    },
    /// A list that says who may use nothing.
    #[error(
        "--default-credential-namespaces says who may use the operator's own API key, but there is none: name its Secret \
         with --default-credential-secret"
    )]
    NoDefaultCredential,
    /// Something that no namespace can be called, or none at all.
    #[error(
        "--watch-namespaces takes names of namespaces, separated by commas: {0:?} is none (patterns are not supported)"
    )]
    WatchedNamespace(String),
    /// Something that no namespace can be called.
    #[error(
        "--own-identity-namespaces takes names of namespaces, separated by commas, or * for all: {0:?} is neither \
         (patterns are not supported)"
    )]
    IdentityNamespace(String),
    /// Something that no namespace can be called.
    #[error(
        "--default-credential-namespaces takes names of namespaces, separated by commas, or * for all: {0:?} is neither \
         (patterns are not supported)"
    )]
    NamespaceName(String),
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
        let create = self.create_timeout_seconds;
        let least = u64::from(create) + u64::from(self.lease_seconds);
        if u64::from(self.resend_grace_seconds) <= least {
            return Err(ConfigError::ResendGrace { least, create });
        }
        if let Some(other) = self.watch_namespaces().into_iter().find(|n| !is_label(n)) {
            return Err(ConfigError::WatchedNamespace(other));
        }
        self.check_default_credential()?;
        let lent = self.own_identity_namespaces();
        if let Some(other) = lent.into_iter().find(|n| n != "*" && !is_label(n)) {
            return Err(ConfigError::IdentityNamespace(other));
        }
        match (self.callbacks, self.role) {
            (Callbacks::On, _) => self.check_callbacks(),
            (Callbacks::Off, Role::Receiver) => Err(ConfigError::ReceiverWithoutCallbacks),
            // Flags about callbacks may stay as they are while callbacks are off.
            (Callbacks::Off, _) => Ok(()),
        }
    }

    fn check_default_credential(&self) -> Result<(), ConfigError> {
        let names = self.default_credential_namespaces();
        if let Some(other) = names.iter().find(|n| *n != "*" && !is_label(n)) {
            return Err(ConfigError::NamespaceName(other.clone()));
        }
        if self.default_credential_secret.is_none() && !names.is_empty() {
            return Err(ConfigError::NoDefaultCredential);
        }
        Ok(())
    }

    /// Whose jobs are worked on; all if none is named.
    #[must_use]
    pub fn watch_namespaces(&self) -> BTreeSet<String> {
        // Not as lenient as other lists: an empty name left out might leave no name, which would mean all.
        self.watch_namespaces.iter().map(|n| n.trim().to_owned()).collect()
    }

    /// Who may use the operator's own API key. An empty value is an empty list.
    #[must_use]
    pub fn default_credential_namespaces(&self) -> BTreeSet<String> {
        let names = self.default_credential_namespaces.iter().map(|n| n.trim());
        names.filter(|n| !n.is_empty()).map(ToOwned::to_owned).collect()
    }

    /// Who may use the operator's own identity. An empty value is an empty list.
    #[must_use]
    pub fn own_identity_namespaces(&self) -> BTreeSet<String> {
        let names = self.own_identity_namespaces.iter().map(|n| n.trim());
        names.filter(|n| !n.is_empty()).map(ToOwned::to_owned).collect()
    }

    fn check_callbacks(&self) -> Result<(), ConfigError> {
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

    /// Where Gemini is asked to call back; `None` if it is not.
    #[must_use]
    pub fn callback_base(&self) -> Option<&Url> {
        self.external_url.as_ref().filter(|_| self.callbacks == Callbacks::On)
    }

    /// Pause between two sweeps, in seconds.
    #[must_use]
    pub fn sweep_seconds(&self) -> u32 {
        self.sweep_seconds.unwrap_or(match self.callbacks {
            Callbacks::On => SWEEP_SECONDS,
            Callbacks::Off => POLL_SECONDS,
        })
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

    fn parse(args: &[&str]) -> RunArgs {
        let cli = Cli::parse_from(["gemini-batch-operator", "run"].into_iter().chain(args.iter().copied()));
        match cli.command {
            Command::Run(run) => *run,
            _ => unreachable!("the arguments say run"),
        }
    }

    fn check(args: &[&str]) -> Result<(), ConfigError> {
        parse(args).check()
    }

    #[test]
    fn without_callbacks_no_url_is_needed_and_nothing_can_be_received() {
        assert_eq!(check(&["--callbacks=off"]), Ok(()));
        assert_eq!(check(&["--callbacks=off", "--role=controller"]), Ok(()));
        let receiver = check(&["--callbacks=off", "--role=receiver"]).unwrap_err();
        assert_eq!(receiver, ConfigError::ReceiverWithoutCallbacks);
        assert!(receiver.to_string().contains("turn callbacks on"), "{receiver}");
        let lease = check(&["--callbacks=off", "--lease-seconds=10"]);
        assert_eq!(lease, Err(ConfigError::LeaseTimings), "the rest is checked all the same");
        // What was set up for callbacks may stay.
        let kept = parse(&["--callbacks=off", "--external-url=https://x"]);
        assert_eq!((kept.check(), kept.callback_base()), (Ok(()), None));
        assert!(parse(&["--external-url=https://x"]).callback_base().is_some());
        assert!(check(&[]).unwrap_err().to_string().contains("--callbacks off"));
    }

    #[test]
    fn the_namespaces_of_the_default_credential_are_names() {
        let secret = "--default-credential-secret=shared";
        let list = |names: &str| {
            let names = format!("--default-credential-namespaces={names}");
            parse(&["--callbacks=off", secret, &names])
        };
        assert_eq!(
            list("a,b-1, c").default_credential_namespaces(),
            ["a", "b-1", "c"].map(String::from).into()
        );
        for good in ["a,b-1", "*", ""] {
            assert_eq!(list(good).check(), Ok(()), "{good}");
        }
        for bad in ["team-*", "A", "-a", "a-", "a.b", "a,b_c"] {
            let error = list(bad).check().unwrap_err();
            assert!(matches!(error, ConfigError::NamespaceName(_)), "{bad}: {error}");
            assert!(error.to_string().contains("patterns are not supported"));
        }
        let nobody = check(&["--callbacks=off", "--default-credential-namespaces=a"]);
        assert_eq!(nobody, Err(ConfigError::NoDefaultCredential));
        assert!(parse(&[secret]).default_credential_namespaces().is_empty());
    }

    #[test]
    fn watched_namespaces_are_names_and_an_empty_one_is_not_all() {
        let list = |names: &str| {
            let names = format!("--watch-namespaces={names}");
            parse(&["--callbacks=off", "--cluster-id=c", &names])
        };
        assert_eq!(list("b,a, b").watch_namespaces(), ["a", "b"].map(String::from).into());
        assert_eq!(list("b,a").check(), Ok(()));
        assert!(parse(&[]).watch_namespaces().is_empty());
        for bad in ["", "a,", "*", "A"] {
            let error = list(bad).check();
            assert!(matches!(error, Err(ConfigError::WatchedNamespace(_))), "{bad:?}: {error:?}");
        }
    }

    #[test]
    fn a_poller_sweeps_more_often() {
        assert_eq!(parse(&[]).sweep_seconds(), 600);
        assert_eq!(parse(&["--callbacks=off"]).sweep_seconds(), 60);
        assert_eq!(parse(&["--callbacks=off", "--sweep-seconds=5"]).sweep_seconds(), 5);
        assert_eq!(parse(&["--sweep-seconds=5"]).sweep_seconds(), 5);
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
        for (grace, lease, least) in [("195", "15", 195), ("600", "420", 600), ("0", "15", 195)] {
            let args =
                ["--external-url", "https://x", "--resend-grace-seconds", grace, "--lease-seconds", lease];
            let refused = check(&args);
            assert_eq!(refused, Err(ConfigError::ResendGrace { least, create: 180 }), "{grace} {lease}");
            assert!(
                refused
                    .unwrap_err()
                    .to_string()
                    .contains(&format!("more than {least}: a create may take 180"))
            );
        }
        assert_eq!(check(&["--external-url", "https://x", "--resend-grace-seconds", "196"]), Ok(()));
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
