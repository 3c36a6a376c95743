//! The text after `zookeeper:` on the command line (spec 04, 12.1).

use std::time::Duration;

use crate::DriverError;

/// Session timeout asked for without `timeout=`.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_millis(30_000);
/// Path of the cluster without `/CLUSTER_ID`.
const DEFAULT_CLUSTER: &str = "/sheepdog";
/// Longest option.
const MAX_LEN: usize = 255;

/// Where the ensemble is, which cluster is meant, how long a silent session lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `HOST:PORT[,HOST:PORT...]`.
    pub hosts: String,
    /// Path of the cluster's root znode, with the leading slash.
    pub root: String,
    /// Session timeout to ask for.
    pub timeout: Duration,
}

impl Options {
    /// Parses the option; `None` is `-c zookeeper` without a colon.
    pub fn parse(option: Option<&str>) -> Result<Options, DriverError> {
        let bad = |reason: &str| DriverError::BadOption { driver: "zookeeper", reason: reason.to_owned() };
        let text = option.unwrap_or_default();
        if text.len() > MAX_LEN {
            return Err(bad(&format!("{} characters, at most {MAX_LEN}", text.len())));
        }
        let (left, timeout) = match text.split_once('=') {
            None => (text, DEFAULT_TIMEOUT),
            Some((left, number)) => {
                let left = left.strip_suffix(",timeout").ok_or(DriverError::BadTimeout)?;
                let ms = number.parse::<u32>().ok().filter(|ms| *ms > 0 && *ms <= i32::MAX as u32);
                (left, Duration::from_millis(ms.ok_or(DriverError::BadTimeout)?.into()))
            }
        };
        let (hosts, root) = left.find('/').map_or((left, DEFAULT_CLUSTER), |at| left.split_at(at));
        if hosts.is_empty() {
            return Err(DriverError::NoServers);
        }
        for host in hosts.split(',') {
            check_host(host).map_err(|reason| bad(&format!("'{host}' {reason}")))?;
        }
        let root = root.trim_end_matches('/');
        let fine = |name: &str| !name.is_empty() && name != "." && name != ".." && name != "zookeeper";
        if root.is_empty() || !root[1..].split('/').all(fine) || root.chars().any(char::is_control) {
            return Err(bad("the cluster id is empty or not a path"));
        }
        Ok(Options { hosts: hosts.to_owned(), root: root.to_owned(), timeout })
    }

    /// Hosts and root as one connect string.
    pub fn connect_string(&self) -> String {
        format!("{}{}", self.hosts, self.root)
    }
}

/// A host name, IPv4 address or bracketed IPv6 address, with or without a port.
fn check_host(host: &str) -> Result<(), &'static str> {
    let rest = match host.strip_prefix('[') {
        Some(inner) => {
            let (address, rest) = inner.split_once(']').ok_or("has no ']'")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "is not an IPv6 address")?;
            rest
        }
        None => {
            let (name, _) = host.split_once(':').unwrap_or((host, ""));
            if name.is_empty() {
                return Err("has no host name");
            }
            &host[name.len()..]
        }
    };
    match rest.strip_prefix(':') {
        None if rest.is_empty() => Ok(()),
        Some(port) if port.parse::<u16>().is_ok_and(|port| port != 0) => Ok(()),
        _ => Err("has no usable port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_cut_at_the_first_equals_sign_and_the_first_slash() {
        let parse = |text: &str| {
            let o = Options::parse(Some(text)).expect(text);
            (o.hosts, o.root, o.timeout.as_millis())
        };
        let is = |hosts: &str, root: &str, ms| (hosts.to_owned(), root.to_owned(), ms);
        assert_eq!(parse("h:2181"), is("h:2181", "/sheepdog", 30_000));
        assert_eq!(parse("a:1,b:2,[::1]:3"), is("a:1,b:2,[::1]:3", "/sheepdog", 30_000));
        assert_eq!(parse("a:1/c1,timeout=4000"), is("a:1", "/c1", 4000));
        assert_eq!(parse("a:1,b:2,timeout=4000"), is("a:1,b:2", "/sheepdog", 4000));
        assert_eq!(parse("a:1/deep/er/"), is("a:1", "/deep/er", 30_000));
    }

    #[test]
    fn unusable_options_are_refused_with_the_known_texts() {
        let text = |option| Options::parse(option).expect_err("unusable").to_string();
        assert_eq!(text(None), "You must specify zookeeper servers.");
        assert_eq!(text(Some("")), "You must specify zookeeper servers.");
        assert_eq!(text(Some("/c,timeout=1")), "You must specify zookeeper servers.");
        for option in ["a:1,timeout=x", "a:1,timeout=", "a:1=3", "a:1,timeout=-1", "a:1,timeout=9999999999"] {
            assert_eq!(text(Some(option)), "Invalid parameter for timeout", "{option}");
        }
        let bad = "invalid option of cluster driver 'zookeeper': ";
        assert_eq!(text(Some("a:b")), format!("{bad}'a:b' has no usable port"));
        assert_eq!(text(Some("a:1,,b:1")), format!("{bad}'' has no host name"));
        assert_eq!(text(Some("a:1//")), format!("{bad}the cluster id is empty or not a path"));
        assert_eq!(text(Some(&"h".repeat(256))), format!("{bad}256 characters, at most 255"));
    }
}
