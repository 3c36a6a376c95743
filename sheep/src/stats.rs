//! Counters of requests (STAT, spec 01, section 15).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use sheepdog_proto::admin::SdStat;
use sheepdog_proto::{Flags, Opcode, Request};

use crate::recovery::pace::Clients;

/// Counters of one class of requests.
#[derive(Default)]
struct Class {
    active: AtomicU64,
    total: AtomicU64,
    rx: AtomicU64,
    tx: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    removes: AtomicU64,
    flushes: AtomicU64,
}

/// All counters of this node, since it started.
#[derive(Default)]
pub struct Stats {
    gateway: Class,
    peer: Class,
    /// When a client was last served, by this node's gateway or from its disks.
    pub clients: Clients,
}

/// Counts a request as active until dropped.
pub struct Active<'a>(&'a AtomicU64);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Class {
    fn begin(&self, request: &Request) -> Active<'_> {
        self.active.fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
        let bytes = if request.flags.contains(Flags::WRITE) { &self.rx } else { &self.tx };
        bytes.fetch_add(request.data_length.into(), Relaxed);
        let counter = match request.opcode {
            Opcode::READ_OBJ | Opcode::READ_PEER => &self.reads,
            Opcode::WRITE_OBJ
            | Opcode::CREATE_AND_WRITE_OBJ
            | Opcode::WRITE_PEER
            | Opcode::CREATE_AND_WRITE_PEER => &self.writes,
            Opcode::REMOVE_PEER => &self.removes,
            Opcode::FLUSH_VDI => &self.flushes,
            _ => return Active(&self.active),
        };
        counter.fetch_add(1, Relaxed);
        Active(&self.active)
    }
}

impl Stats {
    /// Counts a gateway request (FLUSH_VDI is one).
    pub fn gateway(&self, request: &Request) -> Active<'_> {
        self.clients.seen();
        self.gateway.begin(request)
    }

    /// Counts a peer request.
    pub fn peer(&self, request: &Request) -> Active<'_> {
        if !request.flags.contains(Flags::RECOVERY) {
            self.clients.seen();
        }
        self.peer.begin(request)
    }

    /// The answer of STAT.
    pub fn snapshot(&self) -> SdStat {
        let get = |c: &AtomicU64| c.load(Relaxed);
        let (g, p) = (&self.gateway, &self.peer);
        SdStat {
            gway_active_nr: get(&g.active),
            peer_active_nr: get(&p.active),
            gway_total_nr: get(&g.total),
            peer_total_nr: get(&p.total),
            gway_total_rx: get(&g.rx),
            gway_total_tx: get(&g.tx),
            peer_total_rx: get(&p.rx),
            peer_total_tx: get(&p.tx),
            gway_total_remove_nr: get(&g.removes),
            gway_total_read_nr: get(&g.reads),
            gway_total_write_nr: get(&g.writes),
            gway_total_flush_nr: get(&g.flushes),
            peer_total_remove_nr: get(&p.removes),
            peer_total_read_nr: get(&p.reads),
            peer_total_write_nr: get(&p.writes),
        }
    }
}
