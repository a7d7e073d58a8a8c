//! `gemini-batch-operator check`: whether an installation works, as far as that can be seen without a batch. This is
//! what `helm test` runs.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use http::StatusCode;
use kube::{Client, Resource as _};
use url::Url;

use crate::api::GeminiBatchJob;

/// Longer than anything takes that works.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Checks that the resource is served, that parts are ready, and that the receiver refuses a callback that nobody
/// signed. Prints each, and fails if one does not hold.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// Where a replica tells whether it is ready, for example <http://controller-metrics:8081/readyz>; may be repeated
    #[arg(long = "ready-url", value_name = "URL")]
    ready: Vec<Url>,
    /// The receiver, as seen from here: a callback without a signature is sent to it. Default: there is none
    #[arg(long, value_name = "URL")]
    receiver_url: Option<Url>,
    /// Do not check the receiver's certificate, which is for its external name
    #[arg(long)]
    any_certificate: bool,
}

/// Runs all checks.
pub async fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let http = reqwest::Client::builder()
        .timeout(TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .danger_accept_invalid_certs(args.any_certificate)
        .build()?;
    let mut failed = 0;
    let mut told = |what: &str, result: anyhow::Result<()>| -> anyhow::Result<()> {
        let mut out = std::io::stdout();
        match result {
            Ok(()) => writeln!(out, "ok      {what}")?,
            Err(error) => {
                failed += 1;
                writeln!(out, "FAILED  {what}: {error:#}")?;
            }
        }
        Ok(())
    };
    told(&format!("the API server serves {} of {}", resource(), api_version()), served().await)?;
    for url in &args.ready {
        told(&format!("{url} is ready"), ready(&http, url).await)?;
    }
    if let Some(url) = &args.receiver_url {
        told(&format!("{url} refuses a callback that nobody signed"), refuses(&http, url).await)?;
    }
    if failed > 0 {
        bail!("{failed} of the checks failed");
    }
    Ok(())
}

fn resource() -> String {
    GeminiBatchJob::plural(&()).into_owned()
}

fn api_version() -> String {
    GeminiBatchJob::api_version(&()).into_owned()
}

/// Every account may ask what is served.
async fn served() -> anyhow::Result<()> {
    let client = Client::try_default().await.context("no Kubernetes to talk to")?;
    let group = api_version();
    let list = tokio::time::timeout(TIMEOUT, client.list_api_group_resources(&group));
    let list = list.await.context("no answer")?.context("is the CustomResourceDefinition installed?")?;
    let resource_name = resource();
    if !list.resources.iter().any(|resource| resource.name == resource_name) {
        bail!("the group is served without it: install the CustomResourceDefinition of this version");
    }
    Ok(())
}

async fn ready(http: &reqwest::Client, url: &Url) -> anyhow::Result<()> {
    let answer = http.get(url.clone()).send().await?;
    let status = answer.status();
    if !status.is_success() {
        bail!("HTTP {status}: {}", answer.text().await.unwrap_or_default().trim());
    }
    Ok(())
}

/// It says 401 whatever is wrong with a callback, and 404 to all that is none.
async fn refuses(http: &reqwest::Client, base: &Url) -> anyhow::Result<()> {
    let url = format!("{}/v1/callbacks/default/nobody/not-a-token", base.as_str().trim_end_matches('/'));
    let status = http.post(url).body("{}").send().await?.status();
    match status {
        StatusCode::UNAUTHORIZED => Ok(()),
        status if status.is_success() => {
            bail!("it was accepted (HTTP {status}): this is no receiver of this operator")
        }
        status => {
            bail!("HTTP {status} instead of 401: this is no receiver of this operator, or it does not work")
        }
    }
}
