//! The log of invocations that `SHEEPDOG_DOG_LOG` asks for (spec 07, 1.3).

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::args::to_bytes;
use crate::numbers::{clock, month_name};
use crate::out::{self, errno_text};
use crate::sys::local_time;

/// syslog priority: facility user, level info.
const USER_INFO: u32 = 1 << 3 | 6;

/// Logs the command line if the environment asks for it; failures never stop the command.
pub fn record(words: &[String]) {
    if std::env::var_os("SHEEPDOG_DOG_LOG").is_none() {
        return;
    }
    let message: Vec<u8> = words.iter().flat_map(|w| [vec![b' '], to_bytes(w)].concat()).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match std::env::var_os("SHEEPDOG_DOG_LOG_PATH") {
        Some(path) => {
            let time = local_time(now);
            let line = [
                format!("{} {} {:02} {} : ", time.year, month_name(time.month), time.day, clock(now))
                    .as_bytes(),
                &message,
                b"\n",
            ]
            .concat();
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
            if let Err(e) = file.and_then(|mut f| f.write_all(&line)) {
                let (path, why) = (path.to_string_lossy(), errno_text(&e));
                out::log(format_args!("error at opening log file of dog({path}): {why}"));
            }
        }
        None => send_to_syslog(now, &message),
    }
}

fn send_to_syslog(now: u64, message: &[u8]) {
    let time = local_time(now);
    let head = format!(
        "<{USER_INFO}>{} {:2} {} sheepdog admin operation[{}]: ",
        month_name(time.month),
        time.day,
        clock(now),
        std::process::id()
    );
    if let Ok(socket) = UnixDatagram::unbound() {
        // Without a syslog daemon there is nobody to tell.
        let _ = socket.send_to(&[head.as_bytes(), message, b"\n"].concat(), "/dev/log");
    }
}
