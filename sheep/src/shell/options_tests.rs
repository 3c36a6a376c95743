//! The command line by table: arguments in, configuration or texts and status out.

use super::*;

fn run(args: &str) -> Parsed {
    parse(std::iter::once("sheep").chain(args.split_ascii_whitespace()).map(str::to_owned))
}

fn options(args: &str) -> Options {
    match run(args) {
        Parsed::Run(options) => *options,
        other => panic!("{args}: {other:?}"),
    }
}

fn refused(args: &str) -> (String, String) {
    match run(args) {
        Parsed::Exit { code: 1, stdout, stderr } => (stdout, stderr),
        other => panic!("{args}: {other:?}"),
    }
}

#[test]
fn without_options_everything_has_its_default() {
    let o = options("/s");
    assert_eq!((o.port, o.cluster.as_str(), o.weight()), (7000, "local", 128));
    assert_eq!((o.base.as_path(), o.disks.len()), (Path::new("/s"), 0));
    assert_eq!(
        (o.log.level, o.log.format, o.log.destination),
        (Severity::Info, Format::Server, LogDestination::File)
    );
    assert!(!(o.direct_io || o.foreground || o.gateway || o.nosync || o.upgrade || o.wildcard_recovery));
    assert!(o.bind.is_none() && o.io_addr.is_none() && o.zone.is_none() && o.my_addr.is_none());
    assert_eq!(o.log_dir(), Path::new("/s"));
}

#[test]
fn every_option_reaches_its_field() {
    let o = options(
        "-b 192.168.2.11 -c local:/q -D -f -n -p 7001 -P /run/p -R max=5,interval=100 -u -V 64 -w net=2,async=1 -W \
         -x 9 -y ::1 -z 4294967295 -i host=10.0.0.1,port=7009 -l level=debug,dir=/tmp,format=json --nbd unix:/n \
         --lock-grace=30 --nbd=tcp:[::1]:10809 /m,/d1//,/d2 ignored",
    );
    assert_eq!(o.bind, "192.168.2.11".parse().ok());
    assert_eq!(o.cluster, "local:/q");
    assert!(o.direct_io && o.foreground && o.nosync && o.upgrade && o.wildcard_recovery && !o.gateway);
    assert_eq!((o.port, o.vnodes, o.weight(), o.zone), (7001, Some(64), 64, Some(u32::MAX)));
    assert_eq!(o.pidfile.as_deref(), Some(Path::new("/run/p")));
    assert_eq!(o.recovery, Some(RecoveryThrottle { max: 5, interval_ms: 100 }));
    let queues: Vec<_> = o.wq_threads.iter().map(|q| (q.name, q.threads)).collect();
    assert_eq!((queues, o.max_dynamic_threads), (vec![("net", 2), ("async", 1)], Some(9)));
    assert_eq!(o.my_addr, "::1".parse().ok());
    assert_eq!(o.io_addr, "10.0.0.1:7009".parse().ok());
    assert_eq!((o.log.level, o.log.format, o.log_dir()), (Severity::Debug, Format::Json, Path::new("/tmp")));
    assert_eq!(o.nbd, [NbdAddr::Unix("/n".into()), NbdAddr::Tcp("::1".into(), 10809)]);
    assert_eq!(o.lock_grace, Some(std::time::Duration::from_secs(30)));
    assert_eq!(o.base, Path::new("/m"));
    assert_eq!(o.disks, [Path::new("/d1"), Path::new("/d2")]);
    assert_eq!(o.notices.len(), 2, "-w and -x have no effect, which is said: {:?}", o.notices);
}

#[test]
fn command_lines_of_old_documents_are_understood() {
    let o = options("-c local /store/1 -z 1 -p 7001");
    assert_eq!((o.zone, o.port, o.base.as_path()), (Some(1), 7001, Path::new("/store/1")));
    let o =
        options("-p 7000 -b 192.168.2.11 -i host=192.168.2.11,port=7001 -l dir=/tmp,level=info /data/store");
    assert_eq!(o.io_addr, "192.168.2.11:7001".parse().ok());
    let o = options("--cluster local --log dst=syslog --upgrade --pidfile /run/sheep.pid /var/lib/sheepdog");
    assert_eq!((o.log.destination, o.upgrade), (LogDestination::Syslog, true));
    assert_eq!(options("-l 7 /s").log.level, Severity::Debug);
    assert_eq!(options("--loglevel=3 /s").log.level, Severity::Err);
    assert_eq!(options("-d /s").log.level, Severity::Debug);
    assert_eq!(options("-F default /s").log.format, Format::Text);
    let o = options("-o /s");
    assert_eq!((o.log.destination, o.foreground), (LogDestination::Stdout, true));
    assert_eq!(options("-q gway=3 /s").wq_threads.len(), 1);
    assert_eq!(options("--wq gway=3 /s").wq_threads.len(), 1, "abbreviated");
    assert_eq!(options("-s 1000 /s").notices.len(), 1);
    assert_eq!((options("-g /s").weight(), options("-g /s").gateway), (0, true));
    assert_eq!(options("-R max=5 /s").recovery, None, "effective only with both");
}

#[test]
fn relative_paths_become_absolute_because_the_daemon_changes_its_directory() {
    let here = std::env::current_dir().expect("directory");
    let o = options("-P p m,d --nbd unix:n -l dir=.");
    assert_eq!(o.pidfile, Some(here.join("p")));
    assert_eq!((o.base, o.disks), (here.join("m"), vec![here.join("d")]));
    assert_eq!(o.nbd, [NbdAddr::Unix(here.join("n"))]);
    assert_eq!(o.log.dir, Some(here));
}

#[test]
fn bad_arguments_are_refused_with_the_known_lines() {
    let table = [
        ("-b nowhere", "Bad address 'nowhere'"),
        ("-g -V 1", "Options '-g' and '-V' can not be both specified"),
        ("-V 1 -g", "Options '-g' and '-V' can not be both specified"),
        ("-i port=7001", "Bad addr: '(null)'"),
        ("-i host=", "Bad addr: ''"),
        ("-i host=1.2.3.4,port=x", "Bad port 'x'"),
        ("-i host=1.2.3.4,port=0", "Bad port '0'"),
        ("-i nic=eth0", "invalid option nic=eth0"),
        ("-j skip", "you must specify size for journal"),
        ("-j size=63M", "invalid size 63M, must be bigger than 64(M)"),
        ("-j size=many", "invalid size many, must be bigger than 64(M)"),
        ("-j sise=64M", "invalid option sise=64M"),
        ("-j size=64M,dir=/nonexistent/x", "journal dir: /nonexistent/x is not a directory"),
        ("-p 0", "Invalid port number '0'"),
        ("-p 65536", "Invalid port number '65536'"),
        ("-p 70x", "Invalid port number '70x'"),
        ("-R min=1", "invalid option min=1"),
        ("-R max=x", "Invalid recovery max 'x': must be an integer between 0 and 4294967295"),
        ("-V 0", "Invalid number of vnodes '0': must be an integer between 1 and 65535"),
        ("-V 65536", "Invalid number of vnodes '65536': must be an integer between 1 and 65535"),
        ("-w foo=2", "invalid option foo=2"),
        ("-w net", "invalid option net"),
        ("-w net=0", "Invalid number of threads '0': must be an integer between 1 and 4294967295"),
        (
            "-w size=200G,dir=/my_ssd,directio",
            "-w sets work queue threads since 1.0; use --cache size=... for the object cache",
        ),
        ("-x 0", "Invalid number of threads '0': must be an integer between 1 and 4294967295"),
        ("-y host.invalid", "Invalid address: 'host.invalid'"),
        ("-z 4294967296", "Invalid zone id '4294967296': must be an integer between 0 and 4294967295"),
        ("-z -1", "Invalid zone id '-1': must be an integer between 0 and 4294967295"),
        ("-l dst=printer", "invalid type of log destination: printer"),
        ("-l dir=/tmp,dst=stdout", "logdir (/tmp) is specified but logging destination is stdout"),
        ("-l dir=/tmp,dst=syslog", "logdir (/tmp) is specified but logging destination is syslog"),
        ("-l dir=/nonexistent", "No such file or directory"),
        ("-l dir=/dev/null", "log dir: /dev/null is not a directory"),
        ("-l format=xml", "invalid log format: xml\nvalid options are:\n\tdefault\n\tserver\n\tjson"),
        ("-l verbose", "invalid option verbose"),
        ("-r buffer=1M", "Invalid buffer option '1M': size must be between 4M and 1024M"),
        ("-r ftp", "'ftp' is not a valid driver name"),
        ("-r swift,swift", "swift driver is already enabled"),
        ("-r port=0", "Invalid port number '0'"),
        ("--cache size=9M", "Invalid cache option '9M': size must be between between 10M and 4194304G"),
        ("--cache directio", "object cache size is not set"),
        ("--lock-grace 0", "Invalid lock grace '0': must be an integer between 1 and 4294967295"),
        ("--nbd 10809", "Invalid NBD address '10809': must be unix:PATH or tcp:HOST:PORT"),
        ("--nbd tcp:h:0", "Invalid NBD address 'tcp:h:0': must be unix:PATH or tcp:HOST:PORT"),
        ("--nbd tcp:::1:10809", "Invalid NBD address 'tcp:::1:10809': must be unix:PATH or tcp:HOST:PORT"),
        ("--nbd unix:", "Invalid NBD address 'unix:': must be unix:PATH or tcp:HOST:PORT"),
    ];
    for (args, line) in table {
        assert_eq!(refused(&format!("{args} /s")), (String::new(), format!("{line}\n")), "{args}");
    }
}

#[test]
fn features_that_do_not_exist_are_refused_by_the_name_of_their_option() {
    let table = [
        ("-j size=64M", "sheep: option -j (--journal): the journal is not available in this version\n"),
        ("-r swift", "sheep: option -r (--http): the HTTP service is not available in this version\n"),
        ("--cache size=1G", "sheep: option --cache: the object cache is not available in this version\n"),
    ];
    for (args, line) in table {
        assert_eq!(refused(&format!("{args} /s")).1, line, "{args}");
    }
}

#[test]
fn the_store_directory_is_required() {
    for args in ["", "-f", ",", "-p 7001 --"] {
        assert_eq!(
            refused(args).1,
            "sheep: no store directory given (usage: sheep [OPTION]... PATH[,DISK...])\n",
            "{args}"
        );
    }
}

#[test]
fn an_unknown_driver_or_level_lists_the_known_ones_on_standard_output() {
    let (stdout, stderr) = refused("-c accord /s");
    assert_eq!(stderr, "Invalid cluster driver 'accord'\n");
    assert_eq!(stdout, "\nSupported features:\n\tCluster drivers: zookeeper corosync local\n");
    let (stdout, stderr) = refused("-l level=loud /s");
    assert_eq!(stderr, "Invalid log level 'loud'\n");
    assert!(stdout.contains("  6  info "), "{stdout}");
}

#[test]
fn unknown_options_and_missing_arguments_are_answered_as_getopt_does() {
    let hint = "Try 'sheep --help' for more information.\n";
    assert_eq!(refused("-Q /s"), (String::new(), format!("sheep: invalid option -- 'Q'\n{hint}")));
    assert_eq!(
        refused("--nosuch"),
        (String::new(), format!("sheep: unrecognized option '--nosuch'\n{hint}"))
    );
    for letter in ["P", "p", "w", "x"] {
        let want = format!("sheep: option requires an argument -- '{letter}'\n{hint}");
        assert_eq!(refused(&format!("/s -{letter}")), (String::new(), want));
    }
    for letter in ["b", "c", "i", "j", "l", "r", "R", "V", "y", "z"] {
        let (stdout, stderr) = refused(&format!("/s -{letter}"));
        assert!(stdout.starts_with(&format!("sheep -{letter} ")), "{stdout}");
        assert_eq!(stderr, format!("sheep: option requires an argument -- '{letter}'\n"));
    }
    let (stdout, stderr) = refused("--nbd");
    assert!(stdout.starts_with("sheep --nbd "), "{stdout}");
    assert_eq!(stderr, "sheep: option '--nbd' requires an argument\n");
}

#[test]
fn the_first_error_wins_and_help_ends_parsing_where_it_stands() {
    assert_eq!(refused("-p 0 -Q").1, "Invalid port number '0'\n");
    assert!(matches!(run("-j size=64M -h -Q"), Parsed::Exit { code: 0, .. }));
    assert_eq!(refused("-Q -h").1.lines().next(), Some("sheep: invalid option -- 'Q'"));
}

#[test]
fn help_and_version_are_the_documented_texts() {
    let Parsed::Exit { code: 0, stdout, stderr } = run("--help") else { panic!("help is printed") };
    assert_eq!(stderr, "");
    let version = env!("CARGO_PKG_VERSION");
    let documented = format!(
        "\
Sheepdog daemon (version {version})
Usage: sheep [OPTION]... [PATH] (default: /tmp)
Options:
  -b, --bindaddr          specify IP address of interface to listen on
  -c, --cluster           specify the cluster driver (default: local)
  -D, --directio          use direct IO for backend store
  -f, --foreground        make the program run in foreground
  -g, --gateway           make the program run as a gateway mode
  -h, --help              display this help and exit
  -i, --ioaddr            use separate network card to handle IO requests (default: disabled)
  -j, --journal           use journal file to log all the write operations. (default: disabled)
  -l, --log               specify the log level, the log directory and the log format(log level default: 6 [SDOG_INFO])
  -n, --nosync            drop O_SYNC for write of backend
  -p, --port              specify the TCP port on which to listen (default: 7000)
  -P, --pidfile           create a pid file
  -r, --http              enable http service. (default: disabled)
  -R, --recovery          specify the recovery speed throttling
  -u, --upgrade           upgrade to the latest data layout
  -v, --version           show the version
  -V, --vnodes            set number of vnodes
  -w, --wq-threads        specify a number of threads for workqueue
  -W, --wildcard-recovery wildcard recovery for first time
  -x, --max-dynamic-threadsspecify the maximum number of threads for dynamic workqueue
  -y, --myaddr            specify the address advertised to other sheep
  -z, --zone              specify the zone id (default: determined by listen address)
      --cache             use an object cache on this node (default: disabled)
      --lock-grace        release VDI locks of a node that is gone for so long (default: disabled)
      --nbd               serve volumes over NBD (default: disabled)

Try 'sheep <option>', e.g., 'sheep -w', to get more detail about specific option
"
    );
    assert_eq!(stdout, documented);
    let Parsed::Exit { code: 0, stdout, .. } = run("-v") else { panic!("the version is printed") };
    assert_eq!(
        stdout,
        format!(
            "Sheepdog daemon version {version}\n\nSupported features:\n\tCluster drivers: zookeeper corosync local\n\tMiscellaneous: nbd\n"
        )
    );
}

#[test]
fn sizes_take_suffixes_and_fractions() {
    use super::super::suboptions::size;
    let table = [
        ("0", Some(0)),
        ("512", Some(512)),
        ("7b", Some(7)),
        ("1k", Some(1024)),
        ("1.5M", Some(1_572_864)),
        ("2G", Some(2 << 30)),
        ("16383P", Some(16383 << 50)),
        ("16384P", None),
        ("99999999999.5T", None),
        ("", None),
        ("M", None),
        ("-1M", None),
        ("1e3", None),
        ("inf", None),
        ("NaN", None),
        ("1MB", None),
        ("1ä", None),
    ];
    for (text, want) in table {
        assert_eq!(size(text), want, "{text}");
    }
}
