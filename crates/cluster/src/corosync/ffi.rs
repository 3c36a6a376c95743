//! The C libraries of corosync, loaded when the driver is used: libcpg for the group, libcfg for this node's address,
//! libcmap for the token timeout. A program that was built here runs where corosync is not installed, and says so.
//!
//! All `unsafe` of the driver is in this module. A [`Group`] is used by one thread alone; the callbacks that the library
//! calls inside `cpg_dispatch` put what they get into a list of that thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::OnceLock;

use super::layout::ProcessId;

/// `CS_OK`.
const OK: c_int = 1;
/// `CS_ERR_LIBRARY`: there is no corosync.
pub const LIBRARY: c_int = 2;
/// `CS_ERR_TRY_AGAIN`.
pub const TRY_AGAIN: c_int = 6;
/// `CS_ERR_ACCESS`.
pub const ACCESS: c_int = 11;
/// `CS_ERR_SECURITY`.
pub const SECURITY: c_int = 100;
/// `CPG_TYPE_AGREED`.
const AGREED: c_int = 2;
/// `CS_DISPATCH_ALL`.
const DISPATCH_ALL: c_int = 2;
/// Bytes of a group's name.
const NAME_LEN: usize = 128;
/// Most addresses of a node that are looked at.
const MAX_ADDRS: usize = 8;

/// An error code of corosync's libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub c_int);

impl Code {
    fn check(code: c_int) -> Result<(), Code> {
        if code == OK { Ok(()) } else { Err(Code(code)) }
    }
}

#[repr(C)]
struct CpgName {
    length: u32,
    value: [u8; NAME_LEN],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CpgAddress {
    nodeid: u32,
    pid: u32,
    reason: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CfgAddress {
    length: c_int,
    /// A `sockaddr_in` or `sockaddr_in6`.
    address: [u8; 28],
}

type Deliver = unsafe extern "C" fn(u64, *const CpgName, u32, u32, *mut c_void, usize);
type Change = unsafe extern "C" fn(
    u64,
    *const CpgName,
    *const CpgAddress,
    usize,
    *const CpgAddress,
    usize,
    *const CpgAddress,
    usize,
);

#[repr(C)]
struct Callbacks {
    deliver: Deliver,
    change: Change,
}

/// Why a process is in a list of a configuration change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its corosync node was lost.
    NodeDown,
    /// Its corosync node came back.
    NodeUp,
    /// It joined, left or ended by itself.
    Process,
}

/// A process in a list of a configuration change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// Which.
    pub process: ProcessId,
    /// Why; meaningless in the list of members.
    pub reason: Reason,
}

/// What the group has to tell, in its order.
#[derive(Debug)]
pub enum Delivery {
    /// A message.
    Message(Vec<u8>),
    /// The group changed.
    Change {
        /// Processes in the group from now on.
        members: Vec<Changed>,
        /// Those that are not any more.
        left: Vec<Changed>,
        /// Those that were not before.
        joined: Vec<Changed>,
    },
}

thread_local! {
    /// What the callbacks of the running `cpg_dispatch` got.
    static DELIVERED: RefCell<Vec<Delivery>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn on_message(
    _: u64,
    _: *const CpgName,
    _: u32,
    _: u32,
    message: *mut c_void,
    length: usize,
) {
    if message.is_null() {
        return;
    }
    // SAFETY: the library passes a buffer of `length` bytes that is valid for the time of the call.
    let bytes = unsafe { std::slice::from_raw_parts(message.cast::<u8>(), length) }.to_vec();
    DELIVERED.with_borrow_mut(|list| list.push(Delivery::Message(bytes)));
}

unsafe extern "C" fn on_change(
    _: u64,
    _: *const CpgName,
    members: *const CpgAddress,
    members_len: usize,
    left: *const CpgAddress,
    left_len: usize,
    joined: *const CpgAddress,
    joined_len: usize,
) {
    // SAFETY: the library passes lists with these lengths that are valid for the time of the call.
    let [members, left, joined] =
        unsafe { [changed(members, members_len), changed(left, left_len), changed(joined, joined_len)] };
    DELIVERED.with_borrow_mut(|list| list.push(Delivery::Change { members, left, joined }));
}

/// # Safety
/// `list` is null or points to `len` entries.
unsafe fn changed(list: *const CpgAddress, len: usize) -> Vec<Changed> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: as the caller promises.
    let entries = unsafe { std::slice::from_raw_parts(list, len) };
    let one = |a: &CpgAddress| Changed {
        process: ProcessId { nodeid: a.nodeid, pid: a.pid },
        reason: match a.reason {
            3 => Reason::NodeDown,
            4 => Reason::NodeUp,
            _ => Reason::Process,
        },
    };
    entries.iter().map(one).collect()
}

/// The functions of `libcpg.so.4` that are used.
struct Cpg {
    initialize: unsafe extern "C" fn(*mut u64, *mut Callbacks) -> c_int,
    finalize: unsafe extern "C" fn(u64) -> c_int,
    fd_get: unsafe extern "C" fn(u64, *mut c_int) -> c_int,
    dispatch: unsafe extern "C" fn(u64, c_int) -> c_int,
    join: unsafe extern "C" fn(u64, *const CpgName) -> c_int,
    leave: unsafe extern "C" fn(u64, *const CpgName) -> c_int,
    local_get: unsafe extern "C" fn(u64, *mut c_uint) -> c_int,
    mcast_joined: unsafe extern "C" fn(u64, c_int, *const libc::iovec, c_uint) -> c_int,
}

/// Loads a library for the life of the process.
fn load(name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the name is a C string; corosync's libraries have no constructors that expect anything of the process.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if !library.is_null() {
        return Ok(library);
    }
    // SAFETY: after a failed dlopen, dlerror gives a C string that is valid until the next call in this thread.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return Err(format!("{} cannot be loaded", name.to_string_lossy()));
    }
    // SAFETY: see above.
    Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// # Safety
/// `F` is the type of the function pointer that has this name in the library.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: `library` came from dlopen and is never closed.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("there is no {}", name.to_string_lossy()));
    }
    // SAFETY: a function pointer of the size of the address; the caller promises its type.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

fn cpg() -> Result<&'static Cpg, String> {
    static LOADED: OnceLock<Result<Cpg, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let library = load(c"libcpg.so.4")?;
        // SAFETY: the types are those of <corosync/cpg.h>.
        unsafe {
            Ok(Cpg {
                initialize: symbol(library, c"cpg_initialize")?,
                finalize: symbol(library, c"cpg_finalize")?,
                fd_get: symbol(library, c"cpg_fd_get")?,
                dispatch: symbol(library, c"cpg_dispatch")?,
                join: symbol(library, c"cpg_join")?,
                leave: symbol(library, c"cpg_leave")?,
                local_get: symbol(library, c"cpg_local_get")?,
                mcast_joined: symbol(library, c"cpg_mcast_joined")?,
            })
        }
    });
    loaded.as_ref().map_err(Clone::clone)
}

/// Whether the library is there; else why not.
pub fn available() -> Result<(), String> {
    cpg().map(|_| ())
}

/// A connection to the local corosync and the one group that it is in.
pub struct Group {
    cpg: &'static Cpg,
    handle: u64,
    fd: RawFd,
    name: CpgName,
    joined: bool,
}

impl Group {
    /// Connects to the local corosync. The process id must be final.
    pub fn connect(name: &str) -> Result<Group, Code> {
        assert!(name.len() < NAME_LEN, "names are short");
        // `available` was asked before.
        let cpg = cpg().map_err(|_| Code(2))?;
        let mut handle = 0;
        let mut callbacks = Callbacks { deliver: on_message, change: on_change };
        // SAFETY: both pointers are valid for the call; the library copies the callbacks.
        Code::check(unsafe { (cpg.initialize)(&mut handle, &mut callbacks) })?;
        let mut value = [0; NAME_LEN];
        value[..name.len()].copy_from_slice(name.as_bytes());
        let name = CpgName { length: name.len() as u32, value };
        let mut group = Group { cpg, handle, fd: -1, name, joined: false };
        // SAFETY: the handle was initialised; the pointer is valid for the call.
        Code::check(unsafe { (cpg.fd_get)(handle, &mut group.fd) })?;
        Ok(group)
    }

    /// This process in the eyes of the group.
    pub fn local(&self) -> Result<ProcessId, Code> {
        let mut nodeid = 0;
        // SAFETY: the handle is alive as long as self; the pointer is valid for the call.
        Code::check(unsafe { (self.cpg.local_get)(self.handle, &mut nodeid) })?;
        Ok(ProcessId { nodeid, pid: std::process::id() })
    }

    /// Enters the group.
    pub fn join(&mut self) -> Result<(), Code> {
        // SAFETY: the handle is alive as long as self; the name is valid for the call.
        Code::check(unsafe { (self.cpg.join)(self.handle, &self.name) })?;
        self.joined = true;
        Ok(())
    }

    /// Leaves the group.
    pub fn leave(&mut self) -> Result<(), Code> {
        self.joined = false;
        // SAFETY: as for join.
        Code::check(unsafe { (self.cpg.leave)(self.handle, &self.name) })
    }

    /// Sends a message to the group, this process included.
    pub fn send(&self, message: &[u8]) -> Result<(), Code> {
        let part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
        // SAFETY: one part that is valid for the call, from which the library only reads.
        Code::check(unsafe { (self.cpg.mcast_joined)(self.handle, AGREED, &part, 1) })
    }

    /// What has been delivered since the last call.
    pub fn dispatch(&mut self) -> Result<Vec<Delivery>, Code> {
        // SAFETY: the handle is alive as long as self. Callbacks run in this thread, inside this call, and borrow the
        // list only for a push.
        let code = unsafe { (self.cpg.dispatch)(self.handle, DISPATCH_ALL) };
        let delivered = DELIVERED.take();
        match Code::check(code) {
            Err(Code(TRY_AGAIN)) | Ok(()) => Ok(delivered),
            Err(code) => Err(code),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the library keeps the descriptor open until the handle is finalised, which needs self.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the last use of the handle.
        unsafe { (self.cpg.finalize)(self.handle) };
    }
}

type CfgInitialize = unsafe extern "C" fn(*mut u64, *const c_void) -> c_int;
type CfgLocalGet = unsafe extern "C" fn(u64, *mut c_uint) -> c_int;
type CfgAddrs = unsafe extern "C" fn(u64, c_uint, usize, *mut c_int, *mut CfgAddress) -> c_int;
type Finalize = unsafe extern "C" fn(u64) -> c_int;

/// The first address of this corosync node.
pub fn local_addr() -> Result<IpAddr, String> {
    let library = load(c"libcfg.so.7")?;
    // SAFETY: the types are those of <corosync/cfg.h>.
    let (initialize, local_get, addrs, finalize) = unsafe {
        let initialize: CfgInitialize = symbol(library, c"corosync_cfg_initialize")?;
        let local_get: CfgLocalGet = symbol(library, c"corosync_cfg_local_get")?;
        let addrs: CfgAddrs = symbol(library, c"corosync_cfg_get_node_addrs")?;
        let finalize: Finalize = symbol(library, c"corosync_cfg_finalize")?;
        (initialize, local_get, addrs, finalize)
    };
    let failed = |what: &str, code: Code| format!("{what} ({})", code.0);
    // Callbacks are optional; an empty table is one without any.
    let callbacks: [*const c_void; 1] = [std::ptr::null()];
    let mut handle = 0;
    // SAFETY: both pointers are valid for the call.
    let code = unsafe { initialize(&mut handle, callbacks.as_ptr().cast()) };
    Code::check(code).map_err(|code| failed("failed to initialize cfg", code))?;
    let mut nodeid = 0;
    let mut found = [CfgAddress { length: 0, address: [0; 28] }; MAX_ADDRS];
    let mut count = 0;
    // SAFETY: the handle was initialised, is finalised last, and the pointers are valid for the calls; the library
    // writes at most MAX_ADDRS addresses.
    let code = unsafe {
        let mut code = local_get(handle, &mut nodeid);
        if code == OK {
            code = addrs(handle, nodeid, MAX_ADDRS, &mut count, found.as_mut_ptr());
        }
        finalize(handle);
        code
    };
    Code::check(code).map_err(|code| failed("failed to get the address of this node", code))?;
    let count = usize::try_from(count).unwrap_or(0).min(MAX_ADDRS);
    let first = found[..count].first().and_then(|a| socket_ip(&a.address));
    first.ok_or_else(|| "corosync knows no address of this node".to_owned())
}

/// The address in a `sockaddr_in` or `sockaddr_in6`.
fn socket_ip(address: &[u8; 28]) -> Option<IpAddr> {
    match i32::from(u16::from_ne_bytes([address[0], address[1]])) {
        libc::AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(&address[4..8]).ok()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(&address[8..24]).ok()?).into()),
        _ => None,
    }
}

type CmapInitialize = unsafe extern "C" fn(*mut u64) -> c_int;
type CmapGet = unsafe extern "C" fn(u64, *const c_char, *mut u32) -> c_int;

/// Milliseconds after which a silent node is given up, if corosync tells.
pub fn token_timeout() -> Option<u32> {
    let library = load(c"libcmap.so.4").ok()?;
    // SAFETY: the types are those of <corosync/cmap.h>.
    let (initialize, get, finalize) = unsafe {
        let initialize: CmapInitialize = symbol(library, c"cmap_initialize").ok()?;
        let get: CmapGet = symbol(library, c"cmap_get_uint32").ok()?;
        let finalize: Finalize = symbol(library, c"cmap_finalize").ok()?;
        (initialize, get, finalize)
    };
    let key = CString::new("runtime.config.totem.token").ok()?;
    let (mut handle, mut token) = (0, 0);
    // SAFETY: the pointers are valid for the calls; the handle is used only if it was initialised, and finalised last.
    let code = unsafe {
        let code = initialize(&mut handle);
        if code != OK {
            return None;
        }
        let code = get(handle, key.as_ptr(), &mut token);
        finalize(handle);
        code
    };
    Code::check(code).ok().map(|()| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_by_their_family() {
        let mut v4 = [0; 28];
        v4[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        v4[4..8].copy_from_slice(&[10, 9, 0, 1]);
        assert_eq!(socket_ip(&v4), Some("10.9.0.1".parse().expect("an address")));
        let mut v6 = [0; 28];
        v6[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        v6[23] = 1;
        assert_eq!(socket_ip(&v6), Some("::1".parse().expect("an address")));
        assert_eq!(socket_ip(&[0; 28]), None);
    }
}
