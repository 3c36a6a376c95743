//! Waiting for a condition, with a deadline. Nothing in the tests sleeps and hopes.

use std::time::{Duration, Instant};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// How long tests wait for anything unless they say otherwise. Generous: a loaded machine is slow, a failure is rare.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Looks until `probe` gives a value; panics with `what` after `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "waited {} s in vain for: {what}", limit.as_secs());
        std::thread::sleep(POLL);
    }
}

/// Looks until `condition` holds; panics with `what` after [`DEADLINE`].
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, DEADLINE, || condition().then_some(()));
}
