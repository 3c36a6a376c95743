//! When recovery may begin its next object, so that clients notice little of it.
//!
//! Three modes, looked up anew before every object:
//!
//! - **Throttled** (`-R`, `dog node recovery set-throttle`): so many objects per interval, whether there are clients or not.
//!   The operator's word replaces the rules below, in both directions.
//! - **Clients about** (this node served one in the last [`QUIET`]): one object at a time, and after it a rest of [`REST`]
//!   times as long as it took. The disk is thus left to clients for most of the time, however fast or slow it is. At least
//!   one object is begun every [`LEAST`] while there is room for it, so recovery never stops and a source that does not
//!   answer does not hold up the others.
//! - **Nobody about**: as many objects in flight as there is room for.
//!
//! Objects that requests wait for are not paced at all (`round::pass`). This node looks at its own clients only: it does not
//! know those of the nodes that it copies from.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use sheepdog_proto::admin::RecoveryThrottling;

/// So long after its last request a client counts as being about.
pub const QUIET: Duration = Duration::from_millis(500);
/// The rest after an object, in multiples of the time that it took.
pub const REST: u32 = 3;
/// While clients are about an object is begun at least so often.
pub const LEAST: Duration = Duration::from_secs(1);
/// Shorter rests are saved up: objects that are here already are passed over in microseconds, a timer takes a millisecond.
const SHORTEST: Duration = Duration::from_millis(2);

/// When this node last served a client.
pub struct Clients {
    since: Instant,
    /// Milliseconds from `since`, plus one; 0 = never.
    last: AtomicU64,
}

impl Default for Clients {
    fn default() -> Self {
        Clients { since: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Clients {
    /// A request of a client came.
    pub fn seen(&self) {
        self.seen_at(Instant::now());
    }

    fn seen_at(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.since).as_millis();
        let mark = u64::try_from(millis).unwrap_or(u64::MAX - 1) + 1;
        if self.last.load(Relaxed) != mark {
            self.last.store(mark, Relaxed);
        }
    }

    /// Until when clients count as being about, if no further request comes; `None` = they do not.
    pub fn about(&self, now: Instant) -> Option<Instant> {
        let last = self.last.load(Relaxed).checked_sub(1)?;
        let until = self.since + Duration::from_millis(last) + QUIET;
        (now < until).then_some(until)
    }
}

/// What is known when the next object could begin.
pub struct Moment {
    /// The time.
    pub now: Instant,
    /// What the operator set.
    pub limits: RecoveryThrottling,
    /// As [`Clients::about`].
    pub clients: Option<Instant>,
    /// Objects in flight, without those that requests wait for.
    pub flying: usize,
    /// Most objects in flight.
    pub width: usize,
}

/// Whether the next object may begin.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Now.
    Begin,
    /// Ask again at that time, or earlier when an object has ended or the limits have changed.
    Wait(Instant),
    /// Ask again when an object has ended or the limits have changed.
    Full,
}

/// Paces the objects of a round.
#[derive(Default)]
pub struct Pace {
    /// When throttled: beginning of the present interval, and objects begun in it.
    interval: Option<(Instant, u32)>,
    last_begun: Option<Instant>,
    /// End of the rest, and what was saved up for the next one.
    rest_until: Option<Instant>,
    owed: Duration,
}

impl Pace {
    /// Whether another object may begin. If so, and it does, call [`Pace::begun`].
    pub fn verdict(&mut self, at: &Moment) -> Verdict {
        if at.limits.throttling == 0 {
            self.interval = None;
        }
        if at.flying >= at.width {
            return Verdict::Full;
        }
        if at.limits.throttling != 0 {
            return self.throttled(at);
        }
        let Some(quiet) = at.clients else { return Verdict::Begin };
        let rested = match (at.flying, self.rest_until) {
            (0, None) => at.now,
            (0, Some(until)) => until,
            _ => quiet, // one at a time
        };
        let least = self.last_begun.map_or(at.now, |begun| begun + LEAST);
        let when = rested.min(least);
        if when <= at.now { Verdict::Begin } else { Verdict::Wait(when.min(quiet)) }
    }

    fn throttled(&mut self, at: &Moment) -> Verdict {
        let length = Duration::from_millis(at.limits.queue_work_interval);
        let (since, begun) = *self.interval.get_or_insert((at.now, 0));
        if begun < at.limits.max_exec_count {
            return Verdict::Begin;
        }
        match since.checked_add(length) {
            Some(end) if end <= at.now => {
                self.interval = Some((at.now, 0));
                Verdict::Begin
            }
            Some(end) => Verdict::Wait(end),
            None => Verdict::Full, // an interval of ages
        }
    }

    /// An object begins.
    pub fn begun(&mut self, now: Instant) {
        if let Some((_, begun)) = &mut self.interval {
            *begun += 1;
        }
        self.last_begun = Some(now);
    }

    /// An object that took so long has ended.
    pub fn ended(&mut self, now: Instant, took: Duration) {
        self.owed = self.owed.saturating_add(took.saturating_mul(REST)).min(LEAST);
        if self.owed >= SHORTEST {
            self.rest_until = Some(now + std::mem::take(&mut self.owed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limits(max: u32, interval: u64) -> RecoveryThrottling {
        RecoveryThrottling {
            max_exec_count: max,
            queue_work_interval: interval,
            throttling: (max > 0 && interval > 0).into(),
        }
    }

    /// A pace with its clock.
    struct World {
        pace: Pace,
        now: Instant,
        limits: RecoveryThrottling,
        busy: bool,
        flying: usize,
    }

    impl World {
        fn new(limits: RecoveryThrottling, busy: bool) -> World {
            World { pace: Pace::default(), now: Instant::now(), limits, busy, flying: 0 }
        }

        fn verdict(&mut self) -> Verdict {
            let clients = self.busy.then(|| self.now + QUIET);
            let (now, limits, flying) = (self.now, self.limits, self.flying);
            self.pace.verdict(&Moment { now, limits, clients, flying, width: 4 })
        }

        /// Begins as many objects as may begin now; how many.
        fn begin(&mut self) -> usize {
            let before = self.flying;
            while self.verdict() == Verdict::Begin {
                self.pace.begun(self.now);
                self.flying += 1;
            }
            self.flying - before
        }

        fn end(&mut self, took: Duration) {
            self.flying -= 1;
            self.pace.ended(self.now, took);
        }

        /// Objects done in a time, if each takes `takes`.
        fn run(&mut self, time: Duration, takes: Duration) -> usize {
            let (end, mut done, mut ends) = (self.now + time, 0, Vec::new());
            while self.now < end {
                while ends.first().is_some_and(|at| *at <= self.now) {
                    ends.remove(0);
                    self.end(takes);
                    done += 1;
                }
                let begun = self.begin();
                ends.extend(std::iter::repeat_n(self.now + takes, begun));
                self.now += MS;
            }
            done
        }
    }

    #[test]
    fn without_clients_all_places_are_used() {
        let mut world = World::new(limits(0, 0), false);
        assert_eq!(world.begin(), 4);
        assert_eq!(world.verdict(), Verdict::Full);
        world.end(100 * MS);
        assert_eq!(world.begin(), 1);
        assert_eq!(World::new(limits(0, 0), false).run(1000 * MS, 10 * MS), 396);
    }

    #[test]
    fn with_clients_one_object_at_a_time_takes_a_quarter_of_the_time() {
        for (takes, done) in [(10, 25), (50, 5)] {
            assert_eq!(World::new(limits(0, 0), true).run(1000 * MS, takes * MS), done);
        }
    }

    #[test]
    fn a_slow_source_holds_up_nobody() {
        let mut world = World::new(limits(0, 0), true);
        let mut begun = world.begin();
        for _ in 0..10 {
            world.now += LEAST;
            begun += world.begin();
        }
        assert_eq!((begun, world.flying), (4, 4));
        // Objects that take longer than the rest may last: one a second.
        assert_eq!(World::new(limits(0, 0), true).run(10_000 * MS, 900 * MS), 10);
    }

    #[test]
    fn what_is_here_already_is_passed_over_quickly() {
        let mut world = World::new(limits(0, 0), true);
        let mut passed = 0;
        for _ in 0..100 {
            while world.verdict() == Verdict::Begin {
                world.pace.begun(world.now);
                world.pace.ended(world.now, Duration::from_micros(10));
                passed += 1;
            }
            world.now += MS;
        }
        assert!(passed > 1000, "{passed}");
    }

    #[test]
    fn full_speed_as_soon_as_clients_are_gone() {
        let mut world = World::new(limits(0, 0), true);
        world.begin();
        world.end(300 * MS);
        assert!(matches!(world.verdict(), Verdict::Wait(until) if until <= world.now + QUIET));
        world.busy = false;
        assert_eq!(world.begin(), 4);
    }

    #[test]
    fn the_operators_limits_replace_the_rules() {
        for busy in [false, true] {
            let mut world = World::new(limits(2, 400), busy);
            assert_eq!(world.begin(), 2);
            assert_eq!(world.verdict(), Verdict::Wait(world.now + 400 * MS));
            world.end(MS);
            world.end(MS);
            world.now += 399 * MS;
            assert_eq!(world.begin(), 0);
            world.now += MS;
            assert_eq!(world.begin(), 2);
        }
    }

    #[test]
    fn changed_limits_hold_at_once() {
        let mut world = World::new(limits(1, 3_600_000), false);
        assert_eq!(world.begin(), 1);
        world.limits = limits(2, 3_600_000);
        assert_eq!(world.begin(), 1);
        world.limits = limits(2, 100);
        world.now += 100 * MS;
        assert_eq!(world.begin(), 2);
        world.end(MS);
        world.limits = limits(0, 0);
        assert_eq!(world.begin(), 1);
        world.limits = limits(1, u64::MAX);
        world.end(MS);
        assert_eq!(world.begin(), 1);
        world.end(MS);
        assert_eq!(world.begin(), 0);
    }

    #[test]
    fn clients_are_about_for_a_while_after_their_last_request() {
        let clients = Clients::default();
        let now = clients.since + 7 * MS;
        assert_eq!(clients.about(now), None);
        clients.seen_at(now);
        assert_eq!(clients.about(now), Some(now + QUIET));
        assert_eq!(clients.about(now + QUIET - MS), Some(now + QUIET));
        assert_eq!(clients.about(now + QUIET), None);
    }
}
