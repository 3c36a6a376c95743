//! Which driver `-c NAME[:OPTION]` means (spec 04, 4.3).

use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::corosync::CorosyncDriver;
use crate::local::{DEFAULT_PATH, LocalDriver};
use crate::zookeeper::ZookeeperDriver;
use crate::{Driver, DriverError, Event};

/// All driver names in the order in which version and error texts print them.
pub const DRIVER_NAMES: [&str; 3] = ["zookeeper", "corosync", "local"];

/// The driver used without `-c`. The original takes corosync where it is built in, else local; here corosync is always
/// built in and seldom running.
pub const DEFAULT_DRIVER: &str = "local";

/// A known driver and the text after its colon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection<'a> {
    /// One of [`DRIVER_NAMES`].
    pub name: &'static str,
    /// The option, absent without a colon.
    pub option: Option<&'a str>,
}

/// Finds the driver whose name is a prefix of `spec`, followed by `:` or the end.
pub fn select(spec: &str) -> Result<Selection<'_>, DriverError> {
    DRIVER_NAMES
        .into_iter()
        .find_map(|name| {
            let rest = spec.strip_prefix(name)?;
            match rest.strip_prefix(':') {
                Some(option) => Some(Selection { name, option: Some(option) }),
                None => rest.is_empty().then_some(Selection { name, option: None }),
            }
        })
        .ok_or_else(|| DriverError::UnknownDriver(spec.to_owned()))
}

/// Starts the driver of `spec`. The process identity must be final: call it after daemonising, from a process that
/// called [`crate::block_event_signal`] before it had threads.
pub fn open(spec: &str) -> Result<(Arc<dyn Driver>, UnboundedReceiver<Event>), DriverError> {
    let selection = select(spec)?;
    match selection.name {
        "local" => {
            let path = selection.option.unwrap_or(DEFAULT_PATH);
            if path.is_empty() {
                let reason = "the path of the queue file is empty".to_owned();
                return Err(DriverError::BadOption { driver: "local", reason });
            }
            let (driver, events) = LocalDriver::open(Path::new(path))?;
            Ok((Arc::new(driver), events))
        }
        "zookeeper" => {
            let (driver, events) = ZookeeperDriver::open(selection.option)?;
            Ok((Arc::new(driver), events))
        }
        _ => {
            // As by the original, whose users write an address here.
            if let Some(option) = selection.option.filter(|o| !o.is_empty()) {
                tracing::warn!(
                    "the corosync driver takes no option, '{option}' is ignored; -y chooses the address"
                );
            }
            let (driver, events) = CorosyncDriver::open()?;
            Ok((Arc::new(driver), events))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_matches_by_whole_name() {
        let table = [
            ("local", Some(("local", None))),
            ("local:", Some(("local", Some("")))),
            ("local:/a:b", Some(("local", Some("/a:b")))),
            ("zookeeper:h:1,h:2/x,timeout=3", Some(("zookeeper", Some("h:1,h:2/x,timeout=3")))),
            ("corosync", Some(("corosync", None))),
            ("loc", None),
            ("locally", None),
            ("", None),
            ("Local", None),
        ];
        for (spec, want) in table {
            let got = select(spec).ok().map(|s| (s.name, s.option));
            assert_eq!(got, want, "{spec}");
        }
    }

    #[test]
    fn unknown_drivers_and_unusable_options_are_refused() {
        let text = |spec| open(spec).err().map(|e| e.to_string());
        assert_eq!(text("nosuch:x").as_deref(), Some("Invalid cluster driver 'nosuch:x'"));
        assert_eq!(
            text("local:").as_deref(),
            Some("invalid option of cluster driver 'local': the path of the queue file is empty")
        );
        assert_eq!(text("zookeeper").as_deref(), Some("You must specify zookeeper servers."));
    }
}
