//! What happens outside `dog`: waiting, starting and stopping daemons, damaging files (spec 07, 19.1).

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;

use serde_json::Value;
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{Flags, Opcode, Request, Response, fixed_str};

use crate::common::{Scenario, unhex};
use crate::daemons::Daemons;

/// Performs one step.
pub fn perform(scenario: &Scenario, daemons: &mut Daemons, step: &Value) -> Result<(), String> {
    let nodes = || match step["nodes"].as_array() {
        Some(list) => list.iter().map(|n| n.as_u64().unwrap() as usize).collect(),
        None => daemons_all(daemons),
    };
    match (step["wait"].as_str(), step["do"].as_str()) {
        (Some("running"), _) => daemons.wait_running(),
        (Some("members"), _) => daemons.wait_members(),
        (Some("recovered"), _) => daemons.wait_recovered(),
        (Some("recovering"), _) => daemons.wait_recovering(),
        (Some("exit"), _) => {
            let nodes: Vec<usize> = nodes();
            daemons.wait_exit(&nodes)
        }
        (_, Some("start")) => {
            let nodes: Vec<usize> = nodes();
            let vnodes = step.get("vnodes").map(Value::as_u64);
            daemons.restart(&nodes, vnodes, step["fresh"].as_bool() == Some(true));
            Ok(())
        }
        (_, Some("stop_all")) => {
            daemons.stop_all();
            Ok(())
        }
        (_, Some("lock")) => lock(step),
        (_, Some(_)) => change_file(scenario, step).map_err(|e| e.to_string()),
        _ => Err("unknown step".into()),
    }
}

fn daemons_all(daemons: &Daemons) -> Vec<usize> {
    daemons.all()
}

fn change_file(scenario: &Scenario, step: &Value) -> std::io::Result<()> {
    let path = scenario.fill(step["path"].as_str().unwrap());
    match step["do"].as_str().unwrap() {
        "remove" => fs::remove_file(path),
        "mkdir" => fs::create_dir_all(path),
        "overwrite" => {
            let mut file = fs::OpenOptions::new().write(true).open(path)?;
            file.seek(SeekFrom::Start(step["off"].as_u64().unwrap()))?;
            file.write_all(step["ascii"].as_str().unwrap().as_bytes())
        }
        "file" => {
            let mut bytes = vec![0; step["size"].as_u64().unwrap() as usize];
            for segment in step["segments"].as_array().into_iter().flatten() {
                let at = segment["off"].as_u64().unwrap() as usize;
                let data = unhex(segment["hex"].as_str().unwrap());
                bytes[at..at + data.len()].copy_from_slice(&data);
            }
            fs::write(path, bytes)
        }
        other => panic!("unknown step {other}"),
    }
}

/// Locks a VDI as a client of the given daemon would.
fn lock(step: &Value) -> Result<(), String> {
    let port = step["port"].as_u64().unwrap() as u16;
    let body = VdiRequest { lock_type: step["type"].as_u64().unwrap() as u32, ..VdiRequest::zeroed() };
    let name = fixed_str::<512>(step["name"].as_str().unwrap().as_bytes());
    let request = Request::new(Opcode::LOCK_VDI).flag(Flags::WRITE).length(name.len()).with_vdi(body);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(|e| e.to_string())?;
    let mut answer = [0; Response::LEN];
    stream
        .write_all(&[&request.to_bytes()[..], &name].concat())
        .and_then(|()| stream.read_exact(&mut answer))
        .map_err(|e| e.to_string())?;
    let result = Response::from_bytes(&answer).result;
    if result.is_ok() { Ok(()) } else { Err(result.to_string()) }
}
