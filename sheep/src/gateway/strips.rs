//! Operations on erasure-coded objects: ordering by stripe, reading what a write does not cover, trying again.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_erasure::{Code, STRIPE, StripeRange};
use sheepdog_proto::{Oid, Opcode, ResultCode};

use super::Gateway;
use super::coded::{Attempt, overlay};
use super::object::retry;
use crate::sheep::Sheep;

/// The bytes of whole stripes that a range touches.
fn stripe_bytes(range: StripeRange) -> std::ops::Range<u64> {
    let start = u64::from(range.object_offset());
    start..start + range.object_len()
}

impl Gateway {
    async fn load(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        range: StripeRange,
    ) -> Result<Bytes, ResultCode> {
        retry(sheep, oid, false, |view, _| async move {
            Attempt { sheep, view: &view, oid, code }.load(range).await.map(|buf| buf.freeze())
        })
        .await
    }

    async fn store(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        opcode: Opcode,
        range: StripeRange,
        stripes: Bytes,
    ) -> Result<(), ResultCode> {
        let stripes = &stripes;
        retry(sheep, oid, true, |view, _| async move {
            Attempt { sheep, view: &view, oid, code }.store(opcode, range, stripes).await
        })
        .await
    }

    /// Reads part of a coded object.
    pub(super) async fn read_coded(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, ResultCode> {
        let range = StripeRange::of(offset as u32, len as u32);
        let _turn = self.order.turn(oid, stripe_bytes(range), false).await;
        let stripes = self.load(sheep, oid, code, range).await?;
        Ok(stripes.slice(range.skip()..range.skip() + len))
    }

    /// Overwrites part of an existing coded object.
    pub(super) async fn write_coded(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        let range = StripeRange::of(offset as u32, data.len() as u32);
        {
            let _turn = self.order.turn(oid, stripe_bytes(range), true).await;
            let result = self.overwrite(sheep, oid, code, range, &data).await;
            if result != Err(ResultCode::STALE_OBJ) {
                return result;
            }
        }
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        tracing::warn!("{oid}: not all homes have their strip, repairing");
        let size = sheep.size_of(oid, &sheep.views.load());
        retry(sheep, oid, true, |view, _| async move {
            Attempt { sheep, view: &view, oid, code }.heal(size).await
        })
        .await?;
        let result = self.overwrite(sheep, oid, code, range, &data).await;
        if result == Err(ResultCode::STALE_OBJ) { Err(ResultCode::NO_OBJ) } else { result }
    }

    /// Reads the stripes that are not covered whole, once, then writes; a failing read ends the request.
    async fn overwrite(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        range: StripeRange,
        data: &Bytes,
    ) -> Result<(), ResultCode> {
        let mut old = Vec::new();
        for stripe in range.partial() {
            let one = StripeRange::of(stripe * STRIPE as u32, STRIPE as u32);
            old.push((stripe, self.load(sheep, oid, code, one).await?));
        }
        let stripes = overlay(range, data, &old);
        self.store(sheep, oid, code, Opcode::WRITE_PEER, range, stripes).await
    }

    /// Creates or replaces a coded object.
    pub(super) async fn create_coded(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        let range = StripeRange::of(offset as u32, data.len() as u32);
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        let stripes = overlay(range, &data, &[]);
        self.store(sheep, oid, code, Opcode::CREATE_AND_WRITE_PEER, range, stripes).await
    }

    /// Removes every strip; the caller holds the object's turn.
    pub(super) async fn remove_coded(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        code: Code,
    ) -> Result<(), ResultCode> {
        retry(
            sheep,
            oid,
            false,
            |view, _| async move { Attempt { sheep, view: &view, oid, code }.remove().await },
        )
        .await
    }
}
