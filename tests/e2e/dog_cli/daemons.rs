//! The daemons of a scenario.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sheepdog_testkit::Engine;

use crate::common;

/// How long a condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a daemon may take to end before it is killed.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks at a condition.
const POLL: Duration = Duration::from_millis(50);

/// A binary of the workspace: named by the environment, or next to the test.
pub fn binary(name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(name.to_uppercase()) {
        return path.into();
    }
    let exe = std::env::current_exe().unwrap();
    let path = exe.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.exists(), "{} is missing: cargo build -p {name}", path.display());
    path
}

/// Port of daemon `i`.
pub fn port(i: usize) -> u16 {
    7700 + i as u16
}

pub struct Daemons {
    root: PathBuf,
    engine: Engine,
    vnodes: Option<u64>,
    disks: u64,
    /// By index; `None` = not running.
    running: Vec<Option<Child>>,
}

impl Daemons {
    /// Starts what `cluster` says, with empty stores below `root`.
    pub fn start(root: &Path, cluster: &Value) -> Daemons {
        let count = cluster["daemons"].as_u64().unwrap() as usize;
        let mut daemons = Daemons {
            root: root.to_path_buf(),
            engine: Engine::from_env(root),
            vnodes: cluster["vnodes"].as_u64(),
            disks: cluster["disks"].as_u64().unwrap(),
            running: (0..count).map(|_| None).collect(),
        };
        let vnodes = daemons.vnodes;
        (0..count).for_each(|i| daemons.start_one(i, vnodes));
        daemons.wait_members().unwrap();
        daemons
    }

    fn start_one(&mut self, i: usize, vnodes: Option<u64>) {
        let store = self.root.join(i.to_string());
        let mut paths = vec![store.clone()];
        paths.extend((0..self.disks).map(|d| store.join(format!("d{d}"))));
        paths.iter().for_each(|path| std::fs::create_dir_all(path).unwrap());
        let paths: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        let log = std::fs::File::create(self.root.join(format!("sheep{i}.out"))).unwrap();
        let mut command = Command::new(binary("sheep"));
        command
            .args(["-f", "-c", &self.engine.option])
            // As by the local driver; others look for an address that is not this machine's alone.
            .args(["-y", "127.0.0.1", "-p", &port(i).to_string(), "-z", &i.to_string()])
            .args(vnodes.map(|n| ["-V".to_string(), n.to_string()]).into_iter().flatten())
            .arg(paths.join(","))
            .env_clear()
            .env("TZ", "UTC")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.running[i] = Some(command.spawn().unwrap());
        // Ids of daemons that start together would depend on chance; they do not in the captures.
        self.until(|d| d.dog(&["node", "list", "-r"], i).is_some(), PATIENCE).unwrap();
    }

    /// Starts daemons again; `fresh` empties all stores and the driver's file first.
    pub fn restart(&mut self, nodes: &[usize], vnodes: Option<Option<u64>>, fresh: bool) {
        if fresh {
            for entry in std::fs::read_dir(&self.root).unwrap().flatten() {
                let path = entry.path();
                let _ =
                    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            }
        }
        let vnodes = vnodes.unwrap_or(self.vnodes);
        nodes.iter().for_each(|i| self.start_one(*i, vnodes));
    }

    pub fn all(&self) -> Vec<usize> {
        (0..self.running.len()).collect()
    }

    fn living(&mut self) -> Vec<usize> {
        let alive =
            |child: &mut Option<Child>| child.as_mut().is_some_and(|c| matches!(c.try_wait(), Ok(None)));
        let running = self.running.iter_mut().enumerate();
        running.filter_map(|(i, child)| alive(child).then_some(i)).collect()
    }

    /// Output of a `dog` command at daemon `i`; `None` if it failed.
    fn dog(&self, args: &[&str], i: usize) -> Option<String> {
        let mut argv: Vec<String> = args.iter().map(|a| a.to_string()).collect();
        argv.extend(["-p".into(), port(i).to_string()]);
        let run = common::run(&binary("dog"), &argv, &[], b"");
        (run.rc == 0).then(|| String::from_utf8_lossy(&run.stdout).into_owned())
    }

    fn until(
        &mut self,
        mut condition: impl FnMut(&mut Daemons) -> bool,
        patience: Duration,
    ) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        while !condition(self) {
            if Instant::now() > deadline {
                return Err("the condition never came true".into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn everywhere(&mut self, args: &[&str], holds: impl Fn(&str, usize) -> bool) -> bool {
        let living = self.living();
        living.iter().all(|i| self.dog(args, *i).is_some_and(|output| holds(&output, living.len())))
    }

    pub fn wait_running(&mut self) -> Result<(), String> {
        self.until(|d| d.everywhere(&["cluster", "info", "-r"], |o, _| o.starts_with("running")), PATIENCE)
    }

    pub fn wait_members(&mut self) -> Result<(), String> {
        self.until(|d| d.everywhere(&["node", "list", "-r"], |o, n| o.lines().count() == n), PATIENCE)
    }

    pub fn wait_recovered(&mut self) -> Result<(), String> {
        self.until(|d| d.everywhere(&["node", "recovery", "-r"], |o, _| o.is_empty()), PATIENCE)
    }

    pub fn wait_recovering(&mut self) -> Result<(), String> {
        let counted = |output: &str, nodes: usize| {
            let totals = output.lines().filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            totals.filter(|total| *total > 0).count() == nodes
        };
        self.until(|d| d.everywhere(&["node", "recovery", "-r"], counted), PATIENCE)
    }

    pub fn wait_exit(&mut self, nodes: &[usize]) -> Result<(), String> {
        let gone = |d: &mut Daemons| d.living().iter().all(|i| !nodes.contains(i));
        let ended = self.until(gone, EXIT_PATIENCE);
        nodes.iter().for_each(|i| self.kill(*i));
        ended.map_err(|_| "a daemon had to be killed".into())
    }

    fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.running[i].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn stop_all(&mut self) {
        self.all().into_iter().for_each(|i| self.kill(i));
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.stop_all();
    }
}
