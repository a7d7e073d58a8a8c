//! Which custom endpoints an administrator allowed, and which addresses are never talked to. Pure, apart from the
//! resolver.
//!
//! A job's endpoint is a URL that a user chose, and the operator stands where the user does not: beside the node's
//! metadata service, with its token, and in the cluster's network. So none is allowed unless it is on the list, and one
//! that is there only by `*` reaches no address of the machine itself, of its link, or of a cloud's metadata. Names are
//! judged by what they resolve to at that very connection, so that one that changes its mind gains nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::error::{Error, Kind};

/// How far an endpoint is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// An administrator named it: wherever it is.
    Named,
    /// It is only covered by `*`.
    Any,
}

/// The endpoints that jobs may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    named: BTreeSet<String>,
    any: bool,
}

/// Something that is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is neither * nor an endpoint like https://s3.example.com or http://minio.storage.svc:9000 (without a path)"
)]
pub struct EndpointError(String);

impl FromStr for Endpoints {
    type Err = EndpointError;

    /// A list, separated by commas.
    fn from_str(list: &str) -> Result<Self, EndpointError> {
        let mut all = Self::default();
        for text in list.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            if text == "*" {
                all.any = true;
                continue;
            }
            let bare = |url: &Url| is_plain(url) && url.path() == "/";
            match Url::parse(text) {
                Ok(url) if bare(&url) => all.named.insert(origin(&url)),
                _ => return Err(EndpointError(text.to_owned())),
            };
        }
        Ok(all)
    }
}

/// Nothing in it but scheme, host, port and path.
fn is_plain(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none()
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

impl Endpoints {
    /// Whether a job may name this endpoint in `field`.endpoint, and how far it is trusted.
    pub(super) fn judge(&self, endpoint: &str, field: &str) -> Result<Trust, Error> {
        let url = Url::parse(endpoint).ok().filter(is_plain).ok_or_else(|| {
            Error::new(
                Kind::Invalid,
                format!("{field}.endpoint must be a URL like https://s3.example.com, without user, query and fragment"),
            )
        })?;
        let origin = origin(&url);
        if self.named.contains(&origin) {
            return Ok(Trust::Named);
        }
        let not_allowed = |why: &str| {
            Error::new(
                Kind::NotAllowed,
                format!(
                    "{field}.endpoint {origin} is not allowed{why}: ask the administrator to add it to \
                     --object-store-endpoints, or leave it out to use the cloud's own"
                ),
            )
        };
        if !self.any {
            return Err(not_allowed(""));
        }
        if url.scheme() != "https" {
            return Err(not_allowed(" without TLS unless it is listed by name"));
        }
        // A host that is an address is never resolved.
        let literal = match url.host() {
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
            _ => None,
        };
        match literal.filter(|ip| is_forbidden(*ip)) {
            Some(ip) => Err(Forbidden { host: ip.to_string() }.explain(field)),
            None => Ok(Trust::Any),
        }
    }
}

/// An address of the machine, of its link, or of a cloud's metadata service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{host} is an address that is not talked to")]
pub(super) struct Forbidden {
    /// What was to be connected to.
    pub(super) host: String,
}

impl Forbidden {
    pub(super) fn explain(&self, field: &str) -> Error {
        Error::new(
            Kind::NotAllowed,
            format!(
                "{field}.endpoint leads to {}, an address of the operator's own machine, of its link or of a cloud's \
                 metadata service: such a one is only talked to if the administrator lists it by name in \
                 --object-store-endpoints",
                self.host
            ),
        )
    }
}

/// Whether an endpoint that nobody named must not be reached there.
pub(super) fn is_forbidden(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_forbidden_v4(ip),
        IpAddr::V6(ip) => is_forbidden_v6(ip),
    }
}

/// Metadata services that are not link-local: Alibaba Cloud, Azure's host, Oracle Cloud's first.
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];

fn is_forbidden_v4(ip: Ipv4Addr) -> bool {
    ip.is_loopback()
        || ip.is_link_local()
        || ip.is_unspecified()
        || ip.is_broadcast()
        || ip.is_multicast()
        || ip.octets()[0] == 0
        || METADATA_V4.contains(&ip)
}

/// The same: AWS's, of which EKS Pod Identity (`::23`) is one as well as the instance's metadata, and Google Cloud's.
fn is_metadata_v6(ip: Ipv6Addr) -> bool {
    matches!(ip.segments(), [0xfd00, 0xec2, 0, 0, 0, 0, 0, _] | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254])
}

fn is_forbidden_v6(ip: Ipv6Addr) -> bool {
    let v4 = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    // Ways to write an IPv4 address as one of IPv6: mapped and compatible, NAT64, 6to4.
    let embedded = match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff | 0, high, low]
        | [0x64, 0xff9b, 0 | 1, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => Some(v4(high, low)),
        _ => None,
    };
    ip.is_loopback()
        || ip.is_unspecified()
        || ip.is_multicast()
        || ip.is_unicast_link_local()
        || is_metadata_v6(ip)
        || embedded.is_some_and(is_forbidden_v4)
}

/// Resolves names, and gives no address that is forbidden.
#[derive(Debug)]
pub(super) struct Wary;

impl Resolve for Wary {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            // One bad address among good ones is somebody's trick: nothing of it is believed.
            if found.iter().any(|at| is_forbidden(at.ip())) {
                return Err(Box::new(Forbidden { host }) as Box<dyn std::error::Error + Send + Sync>);
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// As reqwest wants it.
pub(super) fn wary() -> Arc<Wary> {
    Arc::new(Wary)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(list: &str, endpoint: &str) -> Result<Trust, String> {
        list.parse::<Endpoints>().unwrap().judge(endpoint, "f").map_err(|e| e.to_string())
    }

    #[test]
    fn only_what_is_listed_is_allowed() {
        let list = "https://s3.example.com, http://127.0.0.1:9000";
        for good in [
            "https://s3.example.com",
            "https://s3.example.com:443/",
            "https://S3.example.com/base",
            "http://127.0.0.1:9000",
        ] {
            assert_eq!(judge(list, good), Ok(Trust::Named), "{good}");
        }
        for bad in [
            "http://s3.example.com",
            "https://s3.example.com:444",
            "https://s3.example.com.evil.org",
            "http://localhost:9000",
            "https://other.org",
        ] {
            let message = judge(list, bad).unwrap_err();
            assert!(message.contains("--object-store-endpoints"), "{message}");
        }
        assert!(judge("", "https://s3.example.com").is_err(), "by default none is allowed");
    }

    #[test]
    fn an_endpoint_is_a_url_with_nothing_else_in_it() {
        for bad in [
            "",
            "s3.example.com",
            "ftp://x",
            "https://user@x",
            "https://x/?a",
            "https://x/#a",
            "https://:p@x",
        ] {
            assert!(judge("*", bad).unwrap_err().contains("must be a URL"), "{bad}");
        }
        for bad in ["x", "https://x/path", "https://*.example.com/a", "file:///x", "https://u@x"] {
            assert!(bad.parse::<Endpoints>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_star_covers_no_address_of_the_machine_or_its_cloud() {
        assert_eq!(judge("*", "https://s3.example.com"), Ok(Trust::Any));
        assert_eq!(judge("*", "https://10.1.2.3:9000"), Ok(Trust::Any));
        assert!(judge("*", "http://s3.example.com").unwrap_err().contains("without TLS"));
        for bad in [
            "https://127.0.0.1",
            "https://127.9.9.9:9000",
            "https://[::1]",
            "https://0.0.0.0",
            "https://169.254.169.254",
            "https://169.254.170.23",
            "https://[fe80::1]",
            "https://[fd00:ec2::254]",
            "https://[fd00:ec2::23]",
            "https://100.100.100.200",
            "https://168.63.129.16",
            "https://192.0.0.192",
            "https://[::ffff:169.254.169.254]",
            "https://[::ffff:7f00:1]",
            "https://[64:ff9b::a9fe:a9fe]",
            "https://[64:ff9b:1::a9fe:a9fe]",
            "https://[2002:a9fe:a9fe::1]",
            "https://2130706433",
            "https://0x7f.1",
            "https://[::]",
            "https://255.255.255.255",
            "https://[fd20:ce::254]",
            "https://[::127.0.0.1]",
        ] {
            let message = judge("*", bad).unwrap_err();
            assert!(message.contains("lists it by name"), "{bad}: {message}");
        }
        assert_eq!(
            judge("*,http://169.254.169.254", "http://169.254.169.254"),
            Ok(Trust::Named),
            "named, on purpose"
        );
    }

    #[tokio::test]
    async fn a_name_is_judged_by_what_it_resolves_to() {
        let name = |text: &str| Name::from_str(text).unwrap();
        let refused = Wary.resolve(name("localhost")).await.err().unwrap();
        assert!(refused.downcast_ref::<Forbidden>().is_some(), "{refused}");
        let mut good = Wary.resolve(name("192.0.2.7")).await.unwrap();
        assert_eq!(good.next().unwrap().ip(), IpAddr::from([192, 0, 2, 7]));
    }
}
