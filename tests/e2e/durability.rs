//! What FLUSH_VDI means in each durability mode.

use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Cluster};

fn flush(cluster: &mut Cluster, vid: VdiId) -> ResultCode {
    let body = ObjRequest { oid: Oid::inode(vid), ..ObjRequest::zeroed() };
    cluster.client().call(Request::new(Opcode::FLUSH_VDI).with_obj(body), &[]).expect("answer").0.result
}

#[test]
fn a_write_through_cluster_tells_clients_not_to_flush() {
    let mut cluster = Cluster::new(2);
    let vid = cluster.client().create_vdi("a", 4 << 20).expect("create");
    assert_eq!(flush(&mut cluster, vid), ResultCode::INVALID_PARMS);
}

#[test]
fn a_cluster_without_synchronous_writes_flushes_every_node_when_asked() {
    let mut cluster = Builder::new(3).arg("-n").start();
    let mut client = cluster.client();
    let vid = client.create_vdi("a", 4 << 20).expect("create");
    assert_eq!(
        client.create_obj(Oid::data(vid, 0), None, 0, &[7; 8192]).expect("create"),
        ResultCode::SUCCESS
    );
    assert_eq!(flush(&mut cluster, vid), ResultCode::SUCCESS);
    // A member that does not answer cannot have flushed.
    cluster.kill9(2);
    cluster.wait_members(2);
    assert_eq!(flush(&mut cluster, vid), ResultCode::SUCCESS, "it left; the others have everything");
}
