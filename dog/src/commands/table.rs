//! The rows. Long names and help texts are those of the original, oddities included.

use sheepdog_getopt::Opt;

use super::{Command, Subcommand};
use crate::args::{
    apply_benchmark, apply_cluster, apply_node, apply_nothing, apply_top, apply_upgrade, apply_vdi,
};
use crate::context::{Context, Handler, Running};
use crate::{benchmark, cluster, completions, manual, nbd, nfs, node, top, upgrade, vdi, vm};

/// An async function as a handler.
macro_rules! handler {
    ($path:path) => {{
        fn run(context: &Context) -> Running<'_> {
            Box::pin($path(context))
        }
        Some(run as Handler)
    }};
}

const fn flag(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { short, long, takes_value: false, help }
}

const fn value(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { short, long, takes_value: true, help }
}

const ADDRESS: Opt = value('a', "address", "specify the daemon address (default: localhost)");
const PORT: Opt = value('p', "port", "specify the daemon port");
const RAW: Opt = flag(
    'r',
    "raw",
    "raw output mode: omit headers, separate fields with\n                          single spaces and print all sizes \
     in decimal bytes",
);
const VERBOSE: Opt = flag('v', "verbose", "print more information than default");
const HELP: Opt = flag('h', "help", "display this help and exit");
const TIME: Opt = flag('T', "time", "show elapsed time");

const VDI_OPTIONS: &[Opt] = &[
    flag('P', "prealloc", "preallocate all the data objects"),
    flag('n', "no-share", "share nothing with its parent"),
    value('i', "index", "specify the index of data objects"),
    value('s', "snapshot", "specify a snapshot id or tag name"),
    flag('x', "exclusive", "write in an exclusive mode"),
    flag('d', "delete", "delete a key"),
    flag('w', "writeback", "use writeback mode"),
    value('c', "copies", "specify the data redundancy level"),
    value('F', "from", "create a differential backup from the snapshot"),
    flag('f', "force", "do operation forcibly"),
    flag('y', "hyper", "create a hyper volume"),
    value('o', "oid", "specify the object id of the tracking object"),
    flag(
        'e',
        "exist",
        "only check objects exist or not,\n                          neither comparing nor repairing",
    ),
    value('z', "block_size_shift", "specify the bit shift num for data object size"),
    flag(
        'R',
        "reduce-identical-snapshots",
        "do not create snapshot if working VDI doesn't have its own objects",
    ),
    value('B', "nr-batched-reclamation", "specify a number of batchedreclamation during VDI deletion"),
    value(
        'I',
        "reclamation-interval",
        "specify how long (unit: second)in reclamation loop during VDI deletion",
    ),
    value(
        'm',
        "max-reclaim",
        "specify the maximum number of reclaimed objects (if this option is specified, an inode object won't be \
         reclaimed)",
    ),
    value('O', "format", "format of the file: raw or qcow2 (import finds out by itself)"),
    ADDRESS,
    PORT,
    RAW,
    VERBOSE,
    HELP,
    TIME,
];

const NODE_OPTIONS: &[Opt] = &[
    flag('A', "all", "show md information of all the nodes"),
    flag('P', "progress", "show progress of recovery in the node"),
    flag('w', "watch", "watch the stat every second"),
    flag('l', "local", "issue request to local node"),
    flag('f', "force", "ignore the confirmation"),
    ADDRESS,
    PORT,
    RAW,
    VERBOSE,
    HELP,
    TIME,
];

const CLUSTER_OPTIONS: &[Opt] = &[
    value('b', "store", "specify backend store"),
    value('c', "copies", "specify the default data redundancy (number of copies)"),
    flag('f', "force", "do not prompt for confirmation"),
    flag('F', "avoid-diskfull", "skip recovery if recovery process can cause disk full"),
    flag('l', "lock", "Lock vdi to exclude multiple users"),
    flag('m', "multithread", "use multi-thread for 'cluster snapshot save'"),
    flag('R', "recyclevid", "enable recycling of VID"),
    flag('t', "strict", "do not serve write request if number of nodes is not sufficient"),
    value('z', "block_size_shift", "specify the shift num of default data object size"),
    flag('V', "fixedvnodes", "disable automatic vnodes calculation"),
    flag('d', "diff", "just output the changes between the two adjacent epochesfor cluster info"),
    ADDRESS,
    PORT,
    RAW,
    VERBOSE,
    HELP,
    TIME,
];

const TOP_OPTIONS: &[Opt] = &[
    flag('o', "once", "print one frame and exit"),
    value('i', "interval", "seconds between two frames (default: 1)"),
    ADDRESS,
    PORT,
    HELP,
];

const TEXT_OPTIONS: &[Opt] = &[HELP];

const PLAIN_OPTIONS: &[Opt] = &[ADDRESS, PORT, HELP];

const UPGRADE_OPTIONS: &[Opt] = &[value('o', "orig-version", "version of converting file"), HELP, TIME];

const BENCHMARK_OPTIONS: &[Opt] = &[
    value('w', "workqueue", "specify workqueue type"),
    flag('f', "force", "do not prompt for confirmation"),
    value('t', "total", "a number of total operation (e.g. I/O request)"),
    value('n', "nr-threads", "a number of worker threads (only used for fixed workqueue)"),
    ADDRESS,
    PORT,
    RAW,
    HELP,
    TIME,
];

/// Which of the two preconditions a row has: node list, operand.
#[derive(Clone, Copy)]
struct Needs(bool, bool);
const NOTHING: Needs = Needs(false, false);
const NODES: Needs = Needs(true, false);
const OPERAND: Needs = Needs(false, true);
const BOTH: Needs = Needs(true, true);

const fn row(
    name: &'static str,
    operands: &'static str,
    letters: &'static str,
    needs: Needs,
    help: &'static str,
    run: Option<Handler>,
) -> Subcommand {
    let Needs(needs_nodes, needs_operand) = needs;
    Subcommand {
        name,
        hidden: false,
        json: false,
        help,
        operands,
        letters,
        unlisted: "",
        needs_nodes,
        needs_operand,
        nested: &[],
        run,
    }
}

const fn with(row: Subcommand, nested: &'static [Subcommand]) -> Subcommand {
    Subcommand { nested, ..row }
}

/// A row that understands `--json`.
const fn json(row: Subcommand) -> Subcommand {
    Subcommand { json: true, ..row }
}

/// A row that takes further options.
const fn also(row: Subcommand, unlisted: &'static str) -> Subcommand {
    Subcommand { unlisted, ..row }
}

/// A row of ours among the original's.
const fn ours(row: Subcommand) -> Subcommand {
    Subcommand { hidden: true, ..row }
}

const fn nested(name: &'static str, needs: Needs, help: &'static str, run: Option<Handler>) -> Subcommand {
    row(name, "", "", needs, help, run)
}

/// Every command, in the order of the overview.
pub const COMMANDS: &[Command] = &[
    Command {
        name: "vdi",
        hidden: false,
        historic: false,
        options: VDI_OPTIONS,
        apply: apply_vdi,
        subcommands: VDI,
    },
    Command {
        name: "node",
        hidden: false,
        historic: false,
        options: NODE_OPTIONS,
        apply: apply_node,
        subcommands: NODE,
    },
    Command {
        name: "cluster",
        hidden: false,
        historic: false,
        options: CLUSTER_OPTIONS,
        apply: apply_cluster,
        subcommands: CLUSTER,
    },
    Command {
        name: "nfs",
        hidden: false,
        historic: false,
        options: PLAIN_OPTIONS,
        apply: apply_nothing,
        subcommands: NFS,
    },
    Command {
        name: "upgrade",
        hidden: false,
        historic: false,
        options: UPGRADE_OPTIONS,
        apply: apply_upgrade,
        subcommands: UPGRADE,
    },
    Command {
        name: "benchmark",
        hidden: false,
        historic: false,
        options: BENCHMARK_OPTIONS,
        apply: apply_benchmark,
        subcommands: BENCHMARK,
    },
    Command {
        name: "top",
        hidden: true,
        historic: false,
        options: TOP_OPTIONS,
        apply: apply_top,
        subcommands: TOP,
    },
    Command {
        name: "completions",
        hidden: true,
        historic: false,
        options: TEXT_OPTIONS,
        apply: apply_nothing,
        subcommands: COMPLETIONS,
    },
    Command {
        name: "man",
        hidden: true,
        historic: false,
        options: TEXT_OPTIONS,
        apply: apply_nothing,
        subcommands: MAN,
    },
    Command {
        name: "nbd",
        hidden: true,
        historic: false,
        options: PLAIN_OPTIONS,
        apply: apply_nothing,
        subcommands: NBD,
    },
    Command {
        name: "vm",
        hidden: true,
        historic: true,
        options: PLAIN_OPTIONS,
        apply: apply_nothing,
        subcommands: VM,
    },
];

const NAME: &str = "<vdiname>";

const VDI: &[Subcommand] = &[
    row("check", NAME, "seaphT", BOTH, "check and repair image's consistency", handler!(vdi::check::run)),
    row("create", "<vdiname> <size>", "PycaphrvzT", BOTH, "create an image", handler!(vdi::create::run)),
    // -y: also of a hypervolume, which nodes of the original would get wrong.
    also(row("snapshot", NAME, "saphrvTR", OPERAND, "create a snapshot", handler!(vdi::snapshot::run)), "y"),
    row("clone", "<src vdi> <dst vdi>", "sPnaphrvT", OPERAND, "clone an image", handler!(vdi::clone::run)),
    row("delete", NAME, "saphTBIm", OPERAND, "delete an image", handler!(vdi::delete::run)),
    row("rollback", NAME, "saphfrvTBI", OPERAND, "rollback to a snapshot", handler!(vdi::rollback::run)),
    json(row("list", "[vdiname]", "aprhoT", NOTHING, "list images", handler!(vdi::list::run))),
    json(row("tree", "", "aphT", NOTHING, "show images in tree view format", handler!(vdi::tree::run))),
    row("graph", "", "aphT", NOTHING, "show images in Graphviz dot format", handler!(vdi::graph::run)),
    with(
        row("object", NAME, "isaphT", OPERAND, "show object information in the image", None),
        &[
            json(nested(
                "location",
                BOTH,
                "show object location information",
                handler!(vdi::object::location),
            )),
            json(nested("map", OPERAND, "show object map information", handler!(vdi::object::map))),
            nested("dump-inode", OPERAND, "dump inode information", handler!(vdi::dump_inode::run)),
        ],
    ),
    json(row(
        "track",
        NAME,
        "isaphoT",
        BOTH,
        "show the object epoch trace in the image",
        handler!(vdi::track::run),
    )),
    row(
        "setattr",
        "<vdiname> <key> [value]",
        "dxaphT",
        OPERAND,
        "set a VDI attribute",
        handler!(vdi::attr::set),
    ),
    row("getattr", "<vdiname> <key>", "aphT", OPERAND, "get a VDI attribute", handler!(vdi::attr::get)),
    row("resize", "<vdiname> <new size>", "aphT", OPERAND, "resize an image", handler!(vdi::resize::run)),
    row(
        "read",
        "<vdiname> [<offset> [<len>]]",
        "saphT",
        OPERAND,
        "read data from an image",
        handler!(vdi::read::run),
    ),
    row(
        "write",
        "<vdiname> [<offset> [<len>]]",
        "apwhT",
        OPERAND,
        "write data to an image",
        handler!(vdi::write::run),
    ),
    row(
        "backup",
        NAME,
        "sFaphT",
        BOTH,
        "create an incremental backup between two snapshots and outputs to STDOUT",
        handler!(vdi::backup::run),
    ),
    row(
        "restore",
        NAME,
        "saphTBI",
        BOTH,
        "restore snapshot images from a backup provided in STDIN",
        handler!(vdi::restore::run),
    ),
    row("alter-copy", NAME, "caphTf", BOTH, "set the vdi's redundancy level", handler!(vdi::alter_copy::run)),
    with(
        row("lock", "", "saphT", OPERAND, "See 'dog vdi lock' for more information", None),
        &[
            json(nested("list", NOTHING, "list locked VDIs", handler!(vdi::lock::list))),
            nested("unlock", OPERAND, "unlock locked VDI forcibly", handler!(vdi::lock::unlock)),
        ],
    ),
    ours(json(row(
        "du",
        "[vdiname]",
        "aprhT",
        NOTHING,
        "show the space that images use",
        handler!(vdi::du::run),
    ))),
    ours(row(
        "import",
        "<vdiname> <file|-|http(s)://...>",
        "OyczaphT",
        OPERAND,
        "create an image from a file, standard input or a web server",
        handler!(vdi::import::run),
    )),
    ours(row(
        "export",
        "<vdiname> <file|->",
        "OsfaphT",
        OPERAND,
        "write an image to a file or standard output",
        handler!(vdi::export::run),
    )),
];

const NODE: &[Subcommand] = &[
    row("kill", "<node id>", "aprhlT", NODES, "kill node", handler!(node::kill::run)),
    json(row("list", "", "aprhT", NODES, "list nodes", handler!(node::list::run))),
    json(row("info", "", "aprhT", NODES, "show information about each node", handler!(node::info::run))),
    with(
        row(
            "recovery",
            "<max> <interval>",
            "aphPrT",
            NOTHING,
            "show recovery information or set/get recovery speed throttling of nodes",
            None,
        ),
        &[
            json(nested(
                "info",
                NODES,
                "show recovery information of nodes (default)",
                handler!(node::recovery::info),
            )),
            nested("set-throttle", BOTH, "set new throttling", handler!(node::recovery::set_throttle)),
            json(nested(
                "get-throttle",
                NODES,
                "get current throttling",
                handler!(node::recovery::get_throttle),
            )),
        ],
    ),
    with(
        row("md", "[disks]", "aprAfhT", OPERAND, "See 'dog node md' for more information", None),
        &[
            json(nested("info", NODES, "show multi-disk information", handler!(node::md::info))),
            nested("plug", OPERAND, "plug more disk(s) into node", handler!(node::md::plug)),
            nested("unplug", OPERAND, "unplug disk(s) from node", handler!(node::md::unplug)),
        ],
    ),
    json(row(
        "stat",
        "",
        "aprwhT",
        NOTHING,
        "show stat information about the node",
        handler!(node::stat::run),
    )),
    with(
        row("log", "", "aphT", OPERAND, "show or set log level of the node", None),
        &[with(
            nested("level", OPERAND, "manipulate loglevel", None),
            &[
                nested("set", OPERAND, "set new loglevel", handler!(node::loglevel::set)),
                json(nested("get", NOTHING, "get current loglevel", handler!(node::loglevel::get))),
                json(nested("list", NOTHING, "list available loglevels", handler!(node::loglevel::list))),
            ],
        )],
    ),
    with(
        row("vnodes", "<num of vnodes>", "aph", OPERAND, "set new vnodes", None),
        &[nested("set", OPERAND, "set new vnodes", handler!(node::vnodes::set))],
    ),
    row(
        "format",
        "<directory of sheep> <a name of store format>",
        "aphT",
        OPERAND,
        "initialize store format of the node",
        handler!(node::format::run),
    ),
];

const CLUSTER: &[Subcommand] = &[
    json(row("info", "", "aprhvTd", NODES, "show cluster information", handler!(cluster::info::run))),
    row("format", "", "bcltaphzTVRfF", NODES, "create a Sheepdog store", handler!(cluster::format::run)),
    row("shutdown", "", "aphT", NOTHING, "stop Sheepdog", handler!(cluster::shutdown)),
    with(
        row(
            "snapshot",
            "<tag|idx> <path> [vdi1] [vdi2] ...",
            "aphTm",
            OPERAND,
            "snapshot/restore the cluster",
            None,
        ),
        &[
            nested("save", BOTH, "save snapshot to localpath", handler!(cluster::snapshot::save)),
            json(nested("list", OPERAND, "list snapshot of localpath", handler!(cluster::snapshot::list))),
            nested("load", BOTH, "load snapshot from localpath", handler!(cluster::snapshot::load)),
            json(nested("show", BOTH, "show vdi list from snapshot", handler!(cluster::snapshot::show))),
        ],
    ),
    with(
        row("recover", "", "afphT", OPERAND, "See 'dog cluster recover' for more information", None),
        &[
            nested("force", NOTHING, "force recover cluster immediately", handler!(cluster::recover::force)),
            nested(
                "enable",
                NOTHING,
                "enable automatic recovery and run once recover if necessary",
                handler!(cluster::recover::enable),
            ),
            nested("disable", NOTHING, "disable automatic recovery", handler!(cluster::recover::disable)),
        ],
    ),
    row("reweight", "", "aphT", NOTHING, "reweight the cluster", handler!(cluster::reweight)),
    row("check", "", "aphT", NODES, "check and repair cluster", handler!(cluster::check::run)),
    row(
        "alter-copy",
        "",
        "aphTcf",
        NODES,
        "set the cluster's redundancy level",
        handler!(cluster::alter_copy::run),
    ),
    ours(json(row(
        "health",
        "",
        "aphT",
        NOTHING,
        "tell whether the cluster is healthy (status 0), degraded (1) or in danger (2)",
        handler!(cluster::health::run),
    ))),
];

const NFS: &[Subcommand] = &[
    row("create", "<name>", "aph", OPERAND, "create a NFS file system", handler!(nfs::create)),
    row("delete", "<name>", "aph", OPERAND, "delete a NFS file system", handler!(nfs::delete)),
];

const UPGRADE: &[Subcommand] = &[
    row(
        "inode-convert",
        "<path of original inode file> <path of new inode file>",
        "hTo",
        OPERAND,
        "upgrade inode object file",
        handler!(upgrade::inode::run),
    ),
    row(
        "epoch-convert",
        "<path of original epoch log file> <path of new epoch log file>",
        "hTo",
        OPERAND,
        "upgrade epoch log file",
        handler!(upgrade::epoch::run),
    ),
    row(
        "config-convert",
        "<path of original config file> <path of new config file>",
        "hT",
        OPERAND,
        "upgrade config file",
        handler!(upgrade::config::run),
    ),
    row(
        "object-location",
        "<path of latest epoch file> <oid>",
        "hT",
        OPERAND,
        "print object location",
        handler!(upgrade::object_location::run),
    ),
];

const BENCHMARK: &[Subcommand] =
    &[row("io", NAME, "aprhTfwtn", BOTH, "benchmark I/O performance", handler!(benchmark::run))];

const NBD: &[Subcommand] = &[row(
    "serve",
    "<unix:path|tcp:host:port> ...",
    "aph",
    OPERAND,
    "serve volumes to NBD clients",
    handler!(nbd::serve),
)];

const VM: &[Subcommand] =
    &[json(row("list", "", "aph", NOTHING, "list images and where they are in use", handler!(vm::list)))];

const TOP: &[Subcommand] =
    &[json(row("", "", "oiaph", NOTHING, "watch nodes, requests, recovery and space", handler!(top::run)))];

const COMPLETIONS: &[Subcommand] = &[
    row("bash", "", "h", NOTHING, "print the completion script for bash", handler!(completions::bash)),
    row("zsh", "", "h", NOTHING, "print the completion script for zsh", handler!(completions::zsh)),
    row("fish", "", "h", NOTHING, "print the completion script for fish", handler!(completions::fish)),
];

const MAN: &[Subcommand] =
    &[row("", "", "h", NOTHING, "print the manual page dog(8)", handler!(manual::run))];
