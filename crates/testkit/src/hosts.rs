//! Several hosts on one machine: network namespaces that a test makes inside its own ([`crate::in_own_network`]), each
//! with a cluster interface and an I/O interface that can be cut one by one.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::binaries::system;
use crate::corosync::Corosync;
use crate::netns::{PREPARE, is_own_network};

/// One of a host's two interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nic {
    /// 10.9.0.0/24: membership, clients, and I/O without an interface of its own.
    Cluster,
    /// 10.9.1.0/24.
    Io,
}

impl Nic {
    /// Both.
    pub const ALL: [Nic; 2] = [Nic::Cluster, Nic::Io];

    fn number(self) -> u8 {
        match self {
            Nic::Cluster => 0,
            Nic::Io => 1,
        }
    }
}

/// Hosts with addresses 10.9.N.1, 10.9.N.2 and so on; the test itself is 10.9.N.254 and is never cut from itself.
pub struct Hosts {
    list: Vec<Host>,
}

struct Host {
    /// Keeps the namespaces alive.
    holder: Child,
}

fn ip(words: &str) {
    let output = Command::new(system("ip", "iproute2")).args(words.split(' ')).output();
    let output = output.unwrap_or_else(|e| panic!("ip: {e}"));
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Hosts {
    /// Makes `count` hosts.
    pub fn new(count: usize) -> Hosts {
        assert!(is_own_network(), "hosts are made inside in_own_network");
        for nic in Nic::ALL {
            let n = nic.number();
            ip(&format!("link add br{n} type bridge"));
            ip(&format!("addr add 10.9.{n}.254/24 dev br{n}"));
            ip(&format!("link set br{n} up"));
        }
        let list = (0..count).map(host).collect();
        Hosts { list }
    }

    /// Address of a host.
    pub fn address(&self, host: usize, nic: Nic) -> String {
        assert!(host < self.list.len());
        format!("10.9.{}.{}", nic.number(), host + 1)
    }

    /// Words before a command that runs on this host.
    pub fn inside(&self, host: usize) -> Vec<String> {
        let pid = self.list[host].holder.id().to_string();
        ["nsenter", "-t", &pid, "-n", "-m", "--"].map(String::from).to_vec()
    }

    /// Takes an interface's link down.
    pub fn cut(&self, host: usize, nic: Nic) {
        ip(&format!("link set h{host}n{} down", nic.number()));
    }

    /// Takes it up again.
    pub fn heal(&self, host: usize, nic: Nic) {
        ip(&format!("link set h{host}n{} up", nic.number()));
    }

    /// Bytes that a host sent and received on an interface.
    pub fn traffic(&self, host: usize, nic: Nic) -> u64 {
        let read = |counter: &str| {
            let path = format!("/sys/class/net/h{host}n{}/statistics/{counter}", nic.number());
            // /sys shows the namespace in which it was mounted: ask a shell that mounts its own.
            let script = format!("mount -t sysfs sysfs /sys && cat {path}");
            let output =
                Command::new(system("unshare", "util-linux")).args(["-m", "sh", "-c", &script]).output();
            let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            text.trim().parse::<u64>().unwrap_or_else(|e| panic!("{path}: {text}: {e}"))
        };
        read("rx_bytes") + read("tx_bytes")
    }

    /// Starts a corosync on each host.
    pub fn corosync(&self) -> Corosync {
        let hosts: Vec<_> =
            (0..self.list.len()).map(|i| (self.address(i, Nic::Cluster), self.inside(i))).collect();
        Corosync::start(&hosts)
    }
}

fn host(index: usize) -> Host {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "-nm", "sh", "-c"]);
    command.arg(format!("{PREPARE}; echo ready; exec sleep 3600"));
    let mut holder = command.stdout(Stdio::piped()).spawn().unwrap_or_else(|e| panic!("setpriv: {e}"));
    let mut line = String::new();
    let output = holder.stdout.take().expect("stdout is piped");
    BufReader::new(output).read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n", "host {index}");
    let pid = holder.id();
    for nic in Nic::ALL {
        let n = nic.number();
        ip(&format!("link add h{index}n{n} type veth peer name eth{n} netns {pid}"));
        ip(&format!("link set h{index}n{n} master br{n}"));
        ip(&format!("link set h{index}n{n} up"));
        let inside = format!("ip addr add 10.9.{n}.{}/24 dev eth{n} && ip link set eth{n} up", index + 1);
        let script = format!("PATH=$PATH:/usr/sbin:/sbin; {inside}");
        let status =
            Command::new("nsenter").args(["-t", &pid.to_string(), "-n", "sh", "-c", &script]).status();
        assert!(status.is_ok_and(|s| s.success()), "{inside}");
    }
    Host { holder }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &mut self.list {
            let _ = host.holder.kill();
            let _ = host.holder.wait();
        }
    }
}
