//! Who is at the other end of a connection. Locks of a VDI outlive the connection that took them (spec 05, 16); what happens to
//! them when a client dies is for [`crate::vdi::holders`].

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use sheepdog_cluster::PidFd;
use sheepdog_proto::VdiId;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::sheep::Sheep;
use crate::vdi::holders;

/// A client process of this machine.
pub struct Process {
    /// Its id, which another process may have once it has ended.
    pub pid: i32,
    fd: AsyncFd<PidFd>,
    connections: AtomicUsize,
    watched: AtomicBool,
}

impl Process {
    fn new(pid: i32, fd: PidFd) -> Option<Arc<Process>> {
        let fd = fd.watch().ok()?;
        Some(Arc::new(Process { pid, fd, connections: AtomicUsize::new(0), watched: AtomicBool::new(false) }))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.fd.get_ref().has_ended()
    }

    /// Whether it has ended, and everything that it ever sent over connections accepted here has been executed.
    pub fn is_gone(&self) -> bool {
        self.has_ended() && self.connections.load(Ordering::Acquire) == 0
    }

    /// Whether this is the first one to ask: somebody is to wait for its end.
    pub fn begin_watch(&self) -> bool {
        !self.watched.swap(true, Ordering::AcqRel)
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        // An error means that the daemon is ending, too.
        let _ = self.fd.readable().await;
    }
}

/// Where a client is.
#[derive(Clone)]
pub enum Origin {
    /// In a process of this machine, connected by the Unix socket.
    Process(Arc<Process>),
    /// At an address.
    Address(IpAddr),
    /// On this machine, in a process that cannot be named: it is in another namespace, or was gone already.
    Unknown,
    /// In this daemon.
    Daemon,
}

impl PartialEq for Origin {
    fn eq(&self, other: &Origin) -> bool {
        match (self, other) {
            (Origin::Process(a), Origin::Process(b)) => Arc::ptr_eq(a, b),
            (Origin::Address(a), Origin::Address(b)) => a == b,
            (Origin::Unknown, Origin::Unknown) | (Origin::Daemon, Origin::Daemon) => true,
            _ => false,
        }
    }
}

/// The processes that have connections here, or hold something.
#[derive(Default)]
pub struct Processes {
    known: Mutex<HashMap<i32, Weak<Process>>>,
}

impl Processes {
    /// Where the client of a connection is.
    pub fn origin_of(&self, stream: &UnixStream) -> Origin {
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid > 0);
        let Some(pid) = pid else { return Origin::Unknown };
        let mut known = self.known.lock();
        known.retain(|_, process| process.strong_count() > 0);
        // A pid is not given to another process before the first one has ended.
        if let Some(process) = known.get(&pid).and_then(Weak::upgrade).filter(|process| !process.has_ended())
        {
            return Origin::Process(process);
        }
        let fd = PidFd::of_peer(stream.as_fd()).or_else(|| PidFd::open(pid));
        let Some(process) = fd.and_then(|fd| Process::new(pid, fd)) else { return Origin::Unknown };
        known.insert(pid, Arc::downgrade(&process));
        Origin::Process(process)
    }
}

/// A client, for as long as its connection is open or a request of it is being executed.
pub struct Client {
    sheep: Arc<Sheep>,
    /// Among all clients of this daemon.
    pub id: u64,
    /// When it connected.
    pub since: Instant,
    /// Where it is.
    pub origin: Origin,
    /// VDIs noted as used by it, and when ([`holders::Holders::touch`]).
    pub(crate) noted: Mutex<(u64, Vec<VdiId>)>,
}

static LAST_ID: AtomicU64 = AtomicU64::new(0);

impl Client {
    /// A client that is connected from now on.
    pub fn new(sheep: Arc<Sheep>, origin: Origin) -> Client {
        if let Origin::Process(process) = &origin {
            process.connections.fetch_add(1, Ordering::AcqRel);
        }
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed);
        Client { sheep, id, since: Instant::now(), origin, noted: Mutex::default() }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Origin::Process(process) = &self.origin {
            process.connections.fetch_sub(1, Ordering::AcqRel);
        }
        holders::closed(&self.sheep, self);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that waits for its end.
    pub(crate) struct Waiting {
        child: Child,
        pub(crate) process: Arc<Process>,
    }

    impl Waiting {
        pub(crate) fn start() -> Waiting {
            let child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat starts");
            let pid = child.id() as i32;
            let process = PidFd::open(pid).and_then(|fd| Process::new(pid, fd)).expect("it runs");
            Waiting { child, process }
        }

        pub(crate) fn end(&mut self) {
            self.child.kill().expect("it runs");
            self.child.wait().expect("it ends");
        }

        /// As if it had a connection more, or less.
        pub(crate) fn connect(&self) {
            self.process.connections.fetch_add(1, Ordering::AcqRel);
        }

        pub(crate) fn disconnect(&self) {
            self.process.connections.fetch_sub(1, Ordering::AcqRel);
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[tokio::test]
    async fn a_peer_is_the_process_that_connected() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let processes = Processes::default();
        let (first, second) = (processes.origin_of(&ours), processes.origin_of(&ours));
        assert!(first == second, "one process");
        let Origin::Process(process) = first else { panic!("this one") };
        assert_eq!(process.pid, std::process::id() as i32);
        assert!(!process.has_ended());
    }

    #[tokio::test]
    async fn a_process_is_gone_when_its_requests_are_executed() {
        let mut waiting = Waiting::start();
        waiting.connect();
        waiting.end();
        waiting.process.ended().await;
        assert!(waiting.process.has_ended() && !waiting.process.is_gone());
        waiting.disconnect();
        assert!(waiting.process.is_gone());
    }
}
