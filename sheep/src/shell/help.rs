//! The option table and the texts printed by `--help`, `--version` and for an option without its argument (spec 04,
//! 16.2). Tools scrape the table; the detailed texts are ours.

use sheepdog_cluster::{DEFAULT_DRIVER, DRIVER_NAMES};
use sheepdog_getopt::Opt;

/// Stands for `--nbd`, which has no letter.
pub const NBD: char = '\u{1}';
/// Stands for `--lock-grace`.
pub const LOCK_GRACE: char = '\u{4}';
/// Stands for `--cache`.
pub const CACHE: char = '\u{2}';

const fn flag(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { short, long, takes_value: false, help }
}

const fn value(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { short, long, takes_value: true, help }
}

/// All options; those of older releases have no help and are not listed.
pub const OPTIONS: &[Opt] = &[
    value('b', "bindaddr", "specify IP address of interface to listen on"),
    value('c', "cluster", "specify the cluster driver"),
    flag('D', "directio", "use direct IO for backend store"),
    flag('f', "foreground", "make the program run in foreground"),
    flag('g', "gateway", "make the program run as a gateway mode"),
    flag('h', "help", "display this help and exit"),
    value('i', "ioaddr", "use separate network card to handle IO requests (default: disabled)"),
    value('j', "journal", "use journal file to log all the write operations. (default: disabled)"),
    value(
        'l',
        "log",
        "specify the log level, the log directory and the log format(log level default: 6 [SDOG_INFO])",
    ),
    flag('n', "nosync", "drop O_SYNC for write of backend"),
    value('p', "port", "specify the TCP port on which to listen (default: 7000)"),
    value('P', "pidfile", "create a pid file"),
    value('r', "http", "enable http service. (default: disabled)"),
    value('R', "recovery", "specify the recovery speed throttling"),
    flag('u', "upgrade", "upgrade to the latest data layout"),
    flag('v', "version", "show the version"),
    value('V', "vnodes", "set number of vnodes"),
    value('w', "wq-threads", "specify a number of threads for workqueue"),
    flag('W', "wildcard-recovery", "wildcard recovery for first time"),
    value('x', "max-dynamic-threads", "specify the maximum number of threads for dynamic workqueue"),
    value('y', "myaddr", "specify the address advertised to other sheep"),
    value('z', "zone", "specify the zone id (default: determined by listen address)"),
    value(CACHE, "cache", "use an object cache on this node (default: disabled)"),
    value(
        LOCK_GRACE,
        "lock-grace",
        "release VDI locks of a node that is gone for so long (default: disabled)",
    ),
    value(NBD, "nbd", "serve volumes over NBD (default: disabled)"),
    flag('d', "debug", ""),
    value('F', "log-format", ""),
    value('l', "loglevel", ""),
    flag('o', "stdout", ""),
    // The long name is that of -w; this one cannot be typed.
    value('q', "\u{3}", ""),
    value('s', "disk-space", ""),
];

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The text of `--help`.
pub fn usage() -> String {
    let mut text = format!("Sheepdog daemon (version {VERSION})\n");
    text += "Usage: sheep [OPTION]... [PATH] (default: /tmp)\nOptions:\n";
    for opt in OPTIONS.iter().filter(|opt| !opt.help.is_empty()) {
        let letter = if opt.has_short() { format!("-{},", opt.short) } else { "   ".to_owned() };
        let default = if opt.short == 'c' { format!(" (default: {DEFAULT_DRIVER})") } else { String::new() };
        text += &format!("  {letter} --{:<18}{}{default}\n", opt.long, opt.help);
    }
    text + "\nTry 'sheep <option>', e.g., 'sheep -w', to get more detail about specific option\n"
}

/// The text of `--version`.
pub fn version() -> String {
    format!("Sheepdog daemon version {VERSION}\n\n{}\tMiscellaneous: nbd\n", drivers())
}

/// The drivers as version and error texts list them.
pub fn drivers() -> String {
    format!("Supported features:\n\tCluster drivers: {}\n", DRIVER_NAMES.join(" "))
}

/// The table of log levels.
pub fn levels() -> String {
    "\
Available log levels:
  0  emerg    the daemon ends
  1  alert    an operator has to act now
  2  crit     data or service is at risk
  3  err      something failed
  4  warning  something is odd
  5  notice   rare and worth knowing
  6  info     normal operation
  7  debug    for developers
"
    .to_owned()
}

/// What an option's argument looks like, for those that have more to say than one line.
pub fn detail(short: char) -> Option<String> {
    let text = match short {
        'b' => BINDADDR,
        'c' => CLUSTER,
        'i' => IOADDR,
        'j' => JOURNAL,
        'l' => return Some(format!("{LOG}\n{}", levels())),
        'r' => HTTP,
        'R' => RECOVERY,
        'V' => VNODES,
        'y' => MYADDR,
        'z' => ZONE,
        CACHE => CACHE_DETAIL,
        LOCK_GRACE => LOCK_GRACE_DETAIL,
        NBD => NBD_DETAIL,
        _ => return None,
    };
    Some(text.to_owned())
}

const BINDADDR: &str = "\
sheep -b IP: listen on this address only, for example
\tsheep -b 192.168.2.11 /data/store
Without it sheep listens on all addresses of the machine.
";

const CLUSTER: &str = "\
sheep -c DRIVER[:OPTION]: how the nodes find each other
\tlocal[:FILE]
\t\tall sheep on this machine, through a shared file (default /tmp/sheepdog_shm)
\tcorosync[:PORT]
\t\ta corosync group
\tzookeeper:HOST:PORT[,HOST:PORT...][/CLUSTER_ID][,timeout=MILLISECONDS]
\t\ta ZooKeeper ensemble; several clusters can share it under different ids
'sheep -v' lists the drivers of this build.
";

const IOADDR: &str = "\
sheep -i host=ADDRESS[,port=PORT]: a second network for object data between nodes
\thost=  address of this node in that network
\tport=  TCP port (default 7000)
When that network fails, data takes the main network until it is back.
";

const JOURNAL: &str = "\
sheep -j size=SIZE[,dir=DIRECTORY][,skip]: write to a journal first
\tsize=  size of the journal, at least 64M (suffixes b k m g t p)
\tdir=   directory on a fast device (default: the store directory)
\tskip   do not replay what an earlier run left in the journal
";

const LOG: &str = "\
sheep -l [level=LEVEL][,dir=DIRECTORY][,format=FORMAT][,dst=DESTINATION]
\tlevel=   least severe level to log, by name or number (default info)
\tdir=     directory of sheep.log (default: the store directory)
\tformat=  server (default), default (text only) or json
\tdst=     default (the file sheep.log), stdout (implies -f) or syslog
";

const HTTP: &str = "\
sheep -r [host=HOST][,port=PORT][,buffer=SIZE][,swift]: object storage through a web server
\thost=    address to take FastCGI requests on (default localhost)
\tport=    TCP port (default 8000)
\tbuffer=  copy buffer of one request, 4M to 1024M (default 32M)
\tswift    speak the OpenStack Swift interface
";

const RECOVERY: &str = "\
sheep -R max=N,interval=MS: recover at most N objects in MS milliseconds
Without both values recovery runs as fast as it can.
";

const VNODES: &str = "\
sheep -V N: fixed weight of this node, 1 to 65535 virtual nodes
Without it the weight follows from the space the node offers. All nodes of a cluster use the same method, and a node
keeps its number when it restarts.
";

const MYADDR: &str = "\
sheep -y ADDRESS: the address under which other nodes reach this one, for example behind address translation
Without it the cluster driver finds an address.
";

const ZONE: &str = "\
sheep -z ID: failure domain of this node, 0 to 4294967295
Copies of an object go to different zones. Without it every address is a zone of its own.
";

const CACHE_DETAIL: &str = "\
sheep --cache size=SIZE[,dir=DIRECTORY][,directio]: keep objects of volumes used here on a local disk
\tsize=     size of the cache, 10M to 4194304G
\tdir=      where to keep it (default: the store directory)
\tdirectio  bypass the page cache
";

const LOCK_GRACE_DETAIL: &str = "\
sheep --lock-grace SECONDS: a VDI that is locked through a node which left the cluster, and has not returned after so
\tmany seconds, can be opened again; so can one whose client came over TCP and has had no connection to this node for so
\tlong (processes that came over the Unix socket are watched without this option). Who comes back later may not write
\twhile another client holds the VDI: no node lets anybody write to a VDI that is locked through another one. The same
\tvalue on all nodes; a client must lock and write through one node
";

const NBD_DETAIL: &str = "\
sheep --nbd ADDRESS: serve volumes as network block devices; may be given several times
\tunix:PATH      on a Unix socket
\ttcp:HOST:PORT  on a TCP port
";
