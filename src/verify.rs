//! `gemini-batch-operator verify`: for whoever asks "why was this callback refused?".
//!
//! The same code as the receiver's, with the delivery taken from flags and a file instead of a request. What it
//! cannot check is the token in the URL.

use std::ffi::OsString;
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fmt, fs};

use clap::Args;
use jiff::{SignedDuration, Timestamp};

use crate::callback::event::MAX_BODY;
use crate::callback::jwks::{self, KeySet};
use crate::callback::signature::{HmacSecret, parse_public_key};
use crate::callback::{Accepted, Delivery, Keys, Policy, Scheme, verify};

/// Checks a callback that was received elsewhere, and says why it is refused. Exit code 0: accepted; 1: refused,
/// with the reason on stderr; 2: wrong usage.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// The webhook-id header
    #[arg(long, allow_hyphen_values = true)]
    id: OsString,
    /// The webhook-timestamp header, as it was sent
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    timestamp: OsString,
    /// The webhook-signature header, as it was sent
    #[arg(long, value_name = "HEADER", allow_hyphen_values = true)]
    signature: OsString,
    /// The body, byte for byte as it was sent ("-": standard input)
    #[arg(long, value_name = "FILE")]
    body: PathBuf,
    /// A webhook secret (`whsec_…`), for v1; may be repeated. Other users of this machine can see it while the
    /// command runs
    #[arg(long = "secret", value_name = "WHSEC", allow_hyphen_values = true)]
    secrets: Vec<Text>,
    /// A public key (`whpk_…`), for v1a; may be repeated
    #[arg(long = "public-key", value_name = "WHPK", allow_hyphen_values = true)]
    public_keys: Vec<Text>,
    /// A key set as Google publishes it, for v1a and JWTs
    #[arg(long, value_name = "FILE")]
    jwks: Option<PathBuf>,
    /// The audience that a JWT must be for: the whole callback URL
    #[arg(long, value_name = "URL")]
    audience: Option<String>,
    /// The time to judge by, in seconds since 1970 (default: now)
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    now: Option<i64>,
    /// How far the timestamp may be from that time, either way
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    tolerance: u32,
}

/// A key on the command line: not shown in debug output, and not in clap's own error messages.
#[derive(Clone)]
struct Text(String);

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(redacted)")
    }
}

/// How it ended, apart from acceptance.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    Refused(String),
    Usage(String),
}

/// Runs the subcommand: one line on stdout or stderr, and the exit code.
#[must_use]
pub fn run(args: &VerifyArgs) -> ExitCode {
    run_with(args, &mut io::stdout(), &mut io::stderr())
}

fn run_with(args: &VerifyArgs, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    // a closed pipe changes nothing about the verdict
    let code = match judge(args, Timestamp::now()) {
        Ok(message) => {
            let _ = writeln!(out, "{message}");
            0
        }
        Err(Failure::Refused(message)) => {
            let _ = writeln!(err, "refused: {message}");
            1
        }
        Err(Failure::Usage(message)) => {
            let _ = writeln!(err, "error: {message}");
            2
        }
    };
    ExitCode::from(code)
}

fn judge(args: &VerifyArgs, clock: Timestamp) -> Result<String, Failure> {
    let now = match args.now {
        None => clock,
        Some(seconds) => Timestamp::from_second(seconds)
            .map_err(|_| Failure::Usage("--now is not a time between the years -9999 and 9999".to_owned()))?,
    };
    if args.audience.as_deref().is_some_and(|audience| audience.trim().is_empty()) {
        return Err(Failure::Usage("--audience must not be empty".to_owned()));
    }
    let secrets = each("--secret", &args.secrets, HmacSecret::parse)?;
    let mut set = match &args.jwks {
        None => KeySet::default(),
        Some(file) => KeySet::parse(&read(file, Some(jwks::MAX_BYTES))?)
            .map_err(|e| Failure::Usage(format!("--jwks {}: {e}", file.display())))?,
    };
    set.ed25519.extend(each("--public-key", &args.public_keys, parse_public_key)?);
    if secrets.is_empty() && set.is_empty() {
        return Err(Failure::Usage("give at least one of --secret, --public-key and --jwks".to_owned()));
    }
    let body = read(&args.body, None)?;
    let delivery = Delivery {
        id: args.id.as_bytes(),
        timestamp: args.timestamp.as_bytes(),
        signature: args.signature.as_bytes(),
        body: &body,
    };
    let keys = Keys { public: Some(&set), secrets: &secrets, first: 0 };
    let receivers = Policy::token_bound(args.audience.iter().cloned().collect());
    let tolerance = SignedDuration::from_secs(i64::from(args.tolerance));
    let policy = Policy {
        schemes: vec![Scheme::V1a, Scheme::Jwt, Scheme::V1],
        past: tolerance,
        future: tolerance,
        audience: receivers.audience.clone(),
    };
    match verify(&delivery, &keys, &policy, now) {
        Ok(accepted) => Ok(describe(&accepted, body.len())),
        Err(refusal) => {
            let mut message = format!("{refusal} ({})", refusal.reason());
            if verify(&delivery, &keys, &receivers, now).is_ok() {
                message.push_str(
                    "; the receiver would have accepted it: when the token in the URL fits, it takes deliveries \
                     up to 26 hours old",
                );
            }
            Err(Failure::Refused(message))
        }
    }
}

fn describe(accepted: &Accepted, body: usize) -> String {
    let mut message = format!("accepted: {}, {} s old", accepted.scheme.as_str(), accepted.age);
    if body > MAX_BODY {
        message.push_str("; the receiver would have refused it, since its body is larger than 64 KiB");
    }
    message
}

/// Reads every key of one flag. Names the flag and the position, never the value.
fn each<T, E: fmt::Display>(
    flag: &str,
    texts: &[Text],
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<Vec<T>, Failure> {
    let one = |(n, text): (usize, &Text)| {
        parse(&text.0).map_err(|e| Failure::Usage(format!("{flag} number {}: {e}", n + 1)))
    };
    texts.iter().enumerate().map(one).collect()
}

/// Reads a file, and one byte more than the limit if there is one: enough to be refused for its length.
fn read(file: &Path, limit: Option<usize>) -> Result<Vec<u8>, Failure> {
    let failed = |e: io::Error| Failure::Usage(format!("{}: {e}", file.display()));
    let source: Box<dyn io::Read> = if file == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(fs::File::open(file).map_err(failed)?)
    };
    let mut bytes = Vec::new();
    match limit {
        Some(limit) => source.take(limit as u64 + 1).read_to_end(&mut bytes),
        None => { source }.read_to_end(&mut bytes),
    }
    .map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches as _};
    use serde_json::json;

    use super::*;
    use crate::callback::testing::{jwk, jwks, rsa_jwk, sign_jwt, sign_v1a};

    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const SENT: &str = "1614265330";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const V1: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    const KEY: &str = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=";
    const V1A: &str =
        "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==";

    struct Files {
        dir: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("body"), BODY).unwrap();
            fs::write(dir.path().join("jwks"), jwks(&[jwk(1), jwk(2), rsa_jwk("a")])).unwrap();
            Self { dir }
        }

        fn path(&self, name: &str) -> String {
            self.dir.path().join(name).to_str().unwrap().to_owned()
        }

        fn parse(&self, signature: &str, more: &[&str]) -> Result<VerifyArgs, clap::Error> {
            let body = self.path("body");
            let mut line = vec!["verify", "--id", ID, "--timestamp", SENT, "--signature", signature];
            if !more.contains(&"--body") {
                line.extend(["--body", &body]);
            }
            line.extend(more);
            let command = VerifyArgs::augment_args(Command::new("verify")).args_override_self(true);
            VerifyArgs::from_arg_matches(&command.try_get_matches_from(line)?)
        }

        fn judge(&self, signature: &str, more: &[&str]) -> Result<String, Failure> {
            judge(&self.parse(signature, more).unwrap(), Timestamp::from_second(1_614_265_330).unwrap())
        }

        fn refusal(&self, signature: &str, more: &[&str]) -> String {
            match self.judge(signature, more) {
                Err(Failure::Refused(message)) => message,
                other => panic!("{other:?}"),
            }
        }

        fn usage(&self, more: &[&str]) -> String {
            match self.judge(V1, more) {
                Err(Failure::Usage(message)) => message,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn accepts_each_scheme() {
        let files = Files::new();
        assert_eq!(files.judge(V1, &["--secret", SECRET]).unwrap(), "accepted: v1, 0 s old");
        assert_eq!(files.judge(V1A, &["--public-key", KEY]).unwrap(), "accepted: v1a, 0 s old");
        let set = files.path("jwks");
        let signature = sign_v1a(2, ID, SENT, BODY);
        assert_eq!(files.judge(&signature, &["--jwks", &set]).unwrap(), "accepted: v1a, 0 s old");
        assert!(files.judge(V1A, &["--jwks", &set, "--public-key", KEY]).is_ok());
        let jwt = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": "https://u", "exp": 1_614_265_400}));
        assert!(files.judge(&jwt, &["--jwks", &set, "--audience", "https://u"]).is_ok());
        assert!(files.refusal(&jwt, &["--jwks", &set]).contains("jwt_audience"));
        let other = format!("whsec_{}", "A".repeat(32));
        assert!(files.judge(V1, &["--secret", &other, "--secret", SECRET]).is_ok());
    }

    #[test]
    fn the_time_can_be_given() {
        let files = Files::new();
        let with = |more: &[&str]| files.judge(V1A, &[&["--public-key", KEY], more].concat());
        assert!(with(&["--now", "1614265630"]).is_ok());
        let too_old = files.refusal(V1A, &["--public-key", KEY, "--now", "1614265631"]);
        assert!(too_old.contains("301 s old") && too_old.contains("too_old"), "{too_old}");
        assert!(too_old.contains("the receiver would have accepted it"), "{too_old}");
        assert!(with(&["--now", "1614265631", "--tolerance", "301"]).is_ok());
        let far = files.refusal(V1A, &["--public-key", KEY, "--now", "1614358931"]);
        assert!(!far.contains("would have accepted"), "{far}");
        let early = files.refusal(V1A, &["--public-key", KEY, "--now", "1614265029"]);
        assert!(early.contains("too_new") && !early.contains("would have"), "{early}");
        let v1 = files.refusal(V1, &["--secret", SECRET, "--now", "1614265631"]);
        assert!(!v1.contains("would have"), "the receiver takes no v1 there: {v1}");
        assert!(files.usage(&["--secret", SECRET, "--now", "9223372036854775807"]).contains("--now"));
        assert!(files.refusal(V1A, &["--public-key", KEY, "--now", "-5"]).contains("too_new"));
    }

    #[test]
    fn refusals_say_why() {
        let files = Files::new();
        assert!(files.refusal(V1, &["--public-key", KEY]).contains("no key"));
        assert!(files.refusal("", &["--secret", SECRET]).contains("no_signature"));
        assert!(files.refusal(V1, &["--secret", SECRET, "--id", "a.b"]).contains("id_invalid"));
        for odd in ["-1", "1.7e9", "", "+123"] {
            let refusal = files.refusal(V1, &["--secret", SECRET, "--timestamp", odd]);
            assert!(refusal.contains("timestamp_invalid"), "{odd}");
        }
        let other = files.path("other");
        fs::write(&other, b"x").unwrap();
        assert!(files.refusal(V1, &["--secret", SECRET, "--body", &other]).contains("bad_signature"));
    }

    #[test]
    fn wrong_usage_is_told_apart_and_quotes_no_key() {
        let files = Files::new();
        assert!(files.usage(&[]).contains("at least one of"));
        let short = files.usage(&["--secret", SECRET, "--secret", "whsec_Y2FuYXJ5"]);
        assert!(short.contains("--secret number 2") && !short.contains("Y2FuYXJ5"), "{short}");
        assert!(files.usage(&["--secret", ""]).contains("whsec_"));
        assert!(files.usage(&["--secret", "whsec_"]).contains("24 to 64"));
        assert!(files.usage(&["--public-key", SECRET]).contains("whpk_"));
        assert!(files.usage(&["--jwks", &files.path("missing")]).contains("missing"));
        assert!(files.usage(&["--jwks", &files.path("body")]).contains("keys"));
        let large = files.path("large");
        fs::write(&large, vec![b' '; 70_000]).unwrap();
        assert!(files.usage(&["--jwks", &large]).contains("larger than"));
        assert!(files.usage(&["--secret", SECRET, "--body", &files.path("missing")]).contains("missing"));
        assert!(!format!("{:?}", files.parse(V1, &["--secret", SECRET]).unwrap()).contains(SECRET));
        assert!(files.parse(V1, &["--tolerance", "-1"]).is_err());
        assert!(files.parse(V1, &["--now", "soon"]).is_err());
    }

    #[test]
    fn bodies_of_any_size() {
        let files = Files::new();
        let set = files.path("jwks");
        let large = files.path("large");
        for (size, note) in [(0, false), (64 * 1024, false), (64 * 1024 + 1, true), (3 << 20, true)] {
            let body = vec![0xfe; size];
            fs::write(&large, &body).unwrap();
            let signature = sign_v1a(1, ID, SENT, &body);
            let message = files.judge(&signature, &["--jwks", &set, "--body", &large]).unwrap();
            assert_eq!(message.contains("larger than 64 KiB"), note, "{message}");
        }
    }

    #[test]
    fn exit_codes_and_streams() {
        let files = Files::new();
        let run = |more: &[&str]| {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let args = files.parse(V1, &[&["--now", SENT], more].concat()).unwrap();
            let code = run_with(&args, &mut out, &mut err);
            (format!("{code:?}"), String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
        };
        let code = |n: u8| format!("{:?}", ExitCode::from(n));
        assert_eq!(run(&["--secret", SECRET]), (code(0), "accepted: v1, 0 s old\n".into(), String::new()));
        let (refused, out, err) = run(&["--public-key", KEY]);
        assert_eq!((refused, out.as_str()), (code(1), ""));
        assert!(err.starts_with("refused: ") && err.ends_with("(no_key)\n"), "{err}");
        let (usage, out, err) = run(&[]);
        assert_eq!((usage, out.as_str()), (code(2), ""));
        assert!(err.starts_with("error: "), "{err}");
    }
}
