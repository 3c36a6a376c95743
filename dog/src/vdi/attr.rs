//! `dog vdi setattr` and `getattr` (spec 07, 10.3).

use std::io::{self, Read};

use sheepdog_proto::attr::{ATTR_LEN, ATTR_VALUE_OFFSET, AttrHeader, MAX_ATTR_VALUE};
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::{Flags, MAX_NAME_LEN, Oid, Opcode, Request, ResultCode, Wire, cstr, fixed_str};

use crate::context::Context;
use crate::exit::{EXISTS, FAILURE, MISSING, Outcome, SYSTEM, Stop, fail};
use crate::objects;
use crate::out::{self, errno_text};
use crate::session::{Failed, success};

/// Runs `setattr`.
pub async fn set(context: &Context) -> Outcome {
    let options = &context.options;
    let key = key(context)?;
    let value = match context.arg(2) {
        _ if options.delete => Vec::new(),
        Some(value) => value.to_vec(),
        None => read_value()?,
    };
    let value = cstr(&value);
    if value.len() > MAX_ATTR_VALUE {
        return Err(fail(FAILURE, format_args!("The value is longer than {MAX_ATTR_VALUE} bytes")));
    }
    let flags = match (options.delete, options.exclusive) {
        (true, _) => Flags::ATTR_DEL,
        (false, true) => Flags::ATTR_CREAT.with(Flags::ATTR_EXCL),
        (false, false) => Flags::ATTR_CREAT,
    };
    match ask(context, key, value, flags).await {
        Ok(_) => Ok(()),
        Err(Failed::Refused(ResultCode::VDI_EXIST)) => {
            Err(fail(EXISTS, format_args!("The attribute '{}' already exists", context.arg_text(1))))
        }
        Err(e) => Err(lookup_failure(context, e)
            .unwrap_or_else(|| fail(FAILURE, format_args!("Failed to set attribute: {e}")))),
    }
}

/// Runs `getattr`.
pub async fn get(context: &Context) -> Outcome {
    let key = key(context)?;
    let found = ask(context, key, b"", Flags::NONE).await.map_err(|e| {
        lookup_failure(context, e)
            .unwrap_or_else(|| fail(MISSING, format_args!("Failed to find attribute oid: {e}")))
    })?;
    let oid = Oid::attr(found.vdi_id.get(), found.attr_id);
    let record = objects::read(&context.session, oid, 0, ATTR_LEN, Flags::DIRECT)
        .await
        .map_err(|e| fail(SYSTEM, format_args!("Failed to read attribute oid: {e}")))?;
    let length = (AttrHeader::get(&record).value_len as usize).min(MAX_ATTR_VALUE);
    out::direct(&record[ATTR_VALUE_OFFSET..][..length])
        .map_err(|e| fail(SYSTEM, format_args!("Failed to write to stdout: {}", errno_text(&e))))
}

fn key(context: &Context) -> Result<&[u8], Stop> {
    context.arg(1).ok_or_else(|| fail(Stop::Usage, "Please specify the attribute key"))
}

/// The message of the two failures that both commands treat alike.
fn lookup_failure(context: &Context, error: Failed) -> Option<Stop> {
    match error {
        Failed::Refused(ResultCode::NO_OBJ) => {
            Some(fail(MISSING, format_args!("Attribute '{}' not found", context.arg_text(1))))
        }
        Failed::Refused(ResultCode::NO_VDI) => Some(fail(MISSING, "VDI not found")),
        _ => None,
    }
}

async fn ask(context: &Context, key: &[u8], value: &[u8], flags: Flags) -> Result<VdiResponse, Failed> {
    let header = AttrHeader {
        name: fixed_str::<MAX_NAME_LEN>(context.arg(0).unwrap_or_default()),
        key: fixed_str::<MAX_NAME_LEN>(key),
        value_len: value.len() as u32,
        ..AttrHeader::zeroed()
    };
    let mut record = header.encode();
    record.extend_from_slice(value);
    record.resize(ATTR_LEN, 0);
    let request = Request::new(Opcode::GET_VDI_ATTR).flag(Flags::WRITE).flag(flags);
    let reply = success(context.session.tell(request, record).await)?;
    Ok(reply.response.vdi())
}

/// The value from stdin, at most one byte more than fits.
fn read_value() -> Result<Vec<u8>, Stop> {
    let mut value = Vec::new();
    let mut input = io::stdin().lock().take(MAX_ATTR_VALUE as u64 + 1);
    match input.read_to_end(&mut value) {
        Ok(_) => Ok(value),
        Err(e) => {
            Err(fail(SYSTEM, format_args!("Failed to read attribute value from stdin: {}", errno_text(&e))))
        }
    }
}
