//! Finds the programs under test: `target/<profile>/{sheep,dog}` beside the running test executable.

use std::path::{Path, PathBuf};

/// Directory of the profile that the running test was built with.
fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the running test has a path");
    let dir = exe.parent().expect("an executable lies in a directory");
    // Tests lie in `deps`, examples in `examples`; the programs one level above.
    if dir.ends_with("deps") || dir.ends_with("examples") {
        dir.parent().expect("deps lies in a profile directory").to_path_buf()
    } else {
        dir.to_path_buf()
    }
}

fn program(name: &str) -> PathBuf {
    let override_dir = std::env::var_os("SHEEPDOG_TEST_BIN").map(PathBuf::from);
    let path = override_dir.unwrap_or_else(profile_dir).join(name);
    assert!(
        path.is_file(),
        "{} is not built. Build the programs first with the profile of the tests, for example\n  \
         cargo build --profile fast -p sheep -p dog\nor set SHEEPDOG_TEST_BIN to the directory that has them.",
        path.display()
    );
    path
}

/// The daemon.
pub fn sheep() -> PathBuf {
    program("sheep")
}

/// The administration tool.
pub fn dog() -> PathBuf {
    program("dog")
}

/// A program of the system that a test needs; panics with the Debian package that has it.
pub fn system(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([Path::new("/usr/sbin").into(), Path::new("/sbin").into()])
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: apt-get install {package} (scripts/test does it)"))
}

/// A program of the QEMU that still has the Sheepdog driver; panics with the script that builds it.
pub fn qemu_sheepdog(name: &str) -> PathBuf {
    let built = profile_dir().parent().map(|target| target.join("qemu-sheepdog/bin")).unwrap_or_default();
    let dir = std::env::var_os("SHEEPDOG_QEMU").map_or(built, PathBuf::from);
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} is not built: run scripts/qemu-sheepdog (scripts/test does it)",
        path.display()
    );
    path
}
