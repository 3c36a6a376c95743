//! Tests that need fixed ports, a corosync of their own, several hosts, or mounts, run in namespaces of their own.
//!
//! Captures depend on ports (they decide placement), two tests cannot listen on the same one, corosync's sockets belong
//! to a network namespace. The test executable starts itself again for just that test under `unshare`, which needs no
//! privileges where user namespaces are allowed.

use std::process::Command;

use crate::binaries::system;

const MARK: &str = "SHEEPDOG_TEST_IN_NAMESPACE";

/// Makes fresh namespaces usable: loopback up, and private copies of the directories that corosync writes to.
pub(crate) const PREPARE: &str = "PATH=$PATH:/usr/sbin:/sbin; ip link set lo up && mount --make-rprivate / && \
    for dir in /run /dev/shm /var/lib/corosync; do \
        [ ! -d $dir ] || mount -t tmpfs tmpfs $dir || exit 125; \
    done";

/// Whether this process runs where it may start a corosync and make interfaces.
pub(crate) fn is_own_network() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs the test `name` (its full path inside the executable) again in namespaces of its own and returns `true`
/// when that run is over; inside it returns `false` and the test goes on. Panics if the inner run failed.
///
/// ```no_run
/// // #[test]
/// fn replay() {
///     if sheepdog_testkit::in_own_network("wire::replay") {
///         return;
///     }
///     // ports 7120 to 7122 are free here
/// }
/// ```
pub fn in_own_network(name: &str) -> bool {
    let _needed = system("ip", "iproute2");
    again(name, "nm", &format!("{PREPARE}; exec \"$0\" \"$@\""))
}

/// As [`in_own_network`], with an own view of the mounted file systems: what the test mounts is gone with it.
pub fn in_own_mounts(name: &str) -> bool {
    again(name, "m", "exec \"$0\" \"$@\"")
}

fn again(name: &str, namespace: &str, start: &str) -> bool {
    if std::env::var(MARK).as_deref() == Ok(name) {
        return false;
    }
    let exe = std::env::current_exe().expect("the running test has a path");
    let user = if nix::unistd::geteuid().is_root() { "" } else { "Ur" };
    let output = Command::new(system("unshare", "util-linux"))
        .arg(format!("-{user}{namespace}"))
        .args(["--", "sh", "-c", start])
        .arg(&exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1", "--include-ignored"])
        .env(MARK, name)
        .output()
        .unwrap_or_else(|e| panic!("unshare: {e}"));
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    assert!(
        output.status.success(),
        "{name} in its own namespace: {}\n{text}\n\
         (if this is about namespaces: allow user namespaces, or run the tests as root)",
        output.status
    );
    assert!(text.contains("1 passed"), "no test is called {name}:\n{text}");
    print!("{text}");
    true
}
