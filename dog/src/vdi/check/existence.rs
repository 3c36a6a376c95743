//! `dog vdi check -e`: whether every node has what it should.

use sheepdog_placement::Ring;
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, Wire};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, fail};
use crate::inode::Inode;
use crate::vdi::name_text;

/// Asks every node for the objects it should have and lacks.
pub async fn check(context: &Context, ring: &Ring, inode: &Inode) -> Outcome {
    let nodes = ring.nodes();
    let copies = usize::from(inode.header.nr_copies).min(ring.nr_zones());
    let mut expected: Vec<Vec<u8>> = vec![Vec::new(); nodes.len()];
    let data = inode.map.allocated().map(|(index, owner)| Oid::data(owner, index));
    for oid in std::iter::once(Oid::inode(inode.vid())).chain(data) {
        let homes = ring.homes(oid, copies);
        homes.iter().for_each(|node| expected[usize::from(*node)].extend(oid.encode()));
    }
    let mut lost = 0;
    for (node, oids) in nodes.iter().zip(expected) {
        let request = Request::new(Opcode::OIDS_EXIST).flag(Flags::WRITE.with(Flags::PIGGYBACK));
        let place = node.nid.host_port();
        let failed = |why: &dyn std::fmt::Display| {
            fail(FAILURE, format_args!("failed to check objects of {place}, {why}"))
        };
        let reply = context.session.send(&node.nid, request, oids.into()).await.map_err(|e| failed(&e))?;
        // NO_OBJ means that at least one is missing; the payload names them.
        if !matches!(reply.response.result, ResultCode::SUCCESS | ResultCode::NO_OBJ) {
            return Err(failed(&reply.response.result));
        }
        for missing in reply.data.chunks_exact(Oid::SIZE) {
            lost += 1;
            out!("[{place}] oid {} is missing.\n", Oid::get(missing));
        }
    }
    let name = name_text(inode);
    if lost == 0 {
        out!("{name} is fine, no object is missing.\n");
        return Ok(());
    }
    out!("{name} lost {lost} object(s).\n");
    Err(FAILURE)
}
