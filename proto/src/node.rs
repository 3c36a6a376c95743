//! Node identities and node records (spec 02, section 2; spec 04, 2.1 and 2.2).

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::Wire;

/// Address, port and optional I/O address of a node, 40 bytes. Equality, order and hash are those of `(addr, port)`.
#[derive(Clone, Copy, Default)]
pub struct NodeId {
    /// IPv6 address, or 12 zero bytes and an IPv4 address.
    pub addr: [u8; 16],
    /// TCP port.
    pub port: u16,
    /// Address of the separate I/O network, zero if unused.
    pub io_addr: [u8; 16],
    /// Its port, 0 = none.
    pub io_port: u16,
}

impl Wire for NodeId {
    const SIZE: usize = 40;
    const NAME: &'static str = "NodeId";
    fn get(bytes: &[u8]) -> Self {
        NodeId {
            addr: Wire::get(bytes),
            port: Wire::get(&bytes[16..]),
            io_addr: Wire::get(&bytes[18..]),
            io_port: Wire::get(&bytes[34..]),
        }
    }
    fn put(&self, out: &mut [u8]) {
        self.addr.put(out);
        self.port.put(&mut out[16..]);
        self.io_addr.put(&mut out[18..]);
        self.io_port.put(&mut out[34..]);
    }
}

impl PartialEq for NodeId {
    fn eq(&self, other: &Self) -> bool {
        self.addr == other.addr && self.port == other.port
    }
}
impl Eq for NodeId {}
impl std::hash::Hash for NodeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.addr.hash(state);
        self.port.hash(state);
    }
}
impl PartialOrd for NodeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for NodeId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.addr.cmp(&other.addr).then(self.port.cmp(&other.port))
    }
}

/// The 16 address bytes of an IP address: IPv4 sits in bytes 12..16 behind zeros, not in the mapped form.
pub fn addr_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[12..].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The IP address of 16 address bytes: IPv4 iff bytes 0..12 are zero and byte 12 is not.
pub fn addr_from_bytes(bytes: [u8; 16]) -> IpAddr {
    if bytes[..12].iter().all(|b| *b == 0) && bytes[12] != 0 {
        IpAddr::V4(Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]))
    } else {
        IpAddr::V6(Ipv6Addr::from(bytes))
    }
}

impl NodeId {
    /// All bytes zero.
    pub fn zeroed() -> NodeId {
        NodeId::default()
    }

    /// The identity of a node without an I/O network.
    pub fn new(ip: IpAddr, port: u16) -> NodeId {
        NodeId { addr: addr_bytes(ip), port, ..NodeId::default() }
    }

    /// Where the node listens.
    pub fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(addr_from_bytes(self.addr), self.port)
    }

    /// Where the node listens for I/O, if it announced a separate network.
    pub fn io_socket_addr(&self) -> Option<SocketAddr> {
        (self.io_port != 0 && self.io_addr != [0; 16])
            .then(|| SocketAddr::new(addr_from_bytes(self.io_addr), self.io_port))
    }

    /// `host:port` as tools print it: IPv6 without brackets, the port left out when it is 0.
    pub fn host_port(&self) -> String {
        let ip = addr_from_bytes(self.addr);
        if self.port == 0 { ip.to_string() } else { format!("{ip}:{}", self.port) }
    }

    /// Seed of the node's ring points: the hash of the first 18 bytes (spec 02, 5.2).
    pub fn ring_seed(&self) -> u64 {
        let mut bytes = [0; 18];
        self.addr.put(&mut bytes);
        self.port.put(&mut bytes[16..]);
        crate::hash::sd_hash(&bytes)
    }

    /// Default zone: the last four address bytes as a little-endian number (spec 02, section 3).
    pub fn default_zone(&self) -> u32 {
        u32::get(&self.addr[12..])
    }
}

/// The node string of logs and drivers: `IPv4 ip:127.0.0.1 port:7000`.
impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = addr_from_bytes(self.addr);
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        write!(f, "{family} ip:{ip} port:{}", self.port)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host_port())
    }
}

impl NodeId {
    /// Parses a node string ([`fmt::Display`]).
    pub fn parse(text: &str) -> Option<NodeId> {
        let mut words = text.split_ascii_whitespace();
        let _family = words.next()?;
        let ip: IpAddr = words.next()?.strip_prefix("ip:")?.parse().ok()?;
        let port = words.next()?.strip_prefix("port:")?.parse().ok()?;
        Some(NodeId::new(ip, port))
    }
}

wire! {
    /// A member of a cluster, 80 bytes. The first 24 are the sender's memory addresses in the original: ignored, sent
    /// as zeros.
    NodeRecord [80] {
        /// Identity.
        24 => nid: NodeId,
        /// Weight; 0 = gateway.
        64 => nr_vnodes: u16,
        /// Failure domain.
        68 => zone: u32,
        /// Bytes offered; 0 on a gateway.
        72 => space: u64,
    }
}

/// Decodes consecutive node records; trailing bytes that are no whole record are ignored.
pub fn decode_nodes(bytes: &[u8]) -> Vec<NodeRecord> {
    bytes.chunks_exact(NodeRecord::LEN).map(NodeRecord::get).collect()
}

/// Encodes consecutive node records.
pub fn encode_nodes(nodes: &[NodeRecord]) -> Vec<u8> {
    nodes.iter().flat_map(|n| n.to_bytes()).collect()
}
