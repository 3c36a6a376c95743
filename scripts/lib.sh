# Shared by the scripts of this directory; sourced, not run.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
target="${CARGO_TARGET_DIR:-$root/target}"

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

# Runs a command as root, directly or by sudo; says what to do if neither works.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $* (run it as root, or install sudo)"
    fi
}

# Debian package that has a program.
package_of() {
    case "$1" in
        cc) echo gcc ;;
        pkg-config) echo pkg-config ;;
        fio) echo fio ;;
        nbdinfo | nbdcopy) echo libnbd-bin ;;
        qemu-img | qemu-io | qemu-nbd) echo qemu-utils ;;
        ip) echo iproute2 ;;
        corosync | corosync-cpgtool) echo corosync ;;
        java) echo default-jre-headless ;;
        unshare | setpriv) echo util-linux ;;
        tgtd | tgtadm) echo tgt ;;
        iscsi-ls | iscsi-test-cu) echo libiscsi-bin ;;
        python3) echo python3-minimal ;;
        *) echo "$1" ;;
    esac
}

# Makes sure that programs exist; installs their Debian packages if not.
need() {
    local program package missing=()
    for program in "$@"; do
        if ! PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null; then
            package="$(package_of "$program")"
            [[ " ${missing[*]} " == *" $package "* ]] || missing+=("$package")
        fi
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (these are Debian's names; install them by your system's means)"
    say "Installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# The server over which the ZooKeeper tests run; Debian's package has no program of its own.
need_zookeeper() {
    need java setpriv
    [ -e /usr/share/java/zookeeper.jar ] && return
    command -v apt-get >/dev/null || die "missing: /usr/share/java/zookeeper.jar (Debian's package zookeeper)"
    say "Installing zookeeper"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends zookeeper
}

need_cargo() {
    if ! command -v cargo >/dev/null && [ -f "$HOME/.cargo/env" ]; then
        # shellcheck disable=SC1091
        . "$HOME/.cargo/env"
    fi
    command -v cargo >/dev/null || die "no Rust toolchain: see https://rustup.rs (1.90 or newer)"
}
