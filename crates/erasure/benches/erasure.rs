//! Throughput of the coder, in bytes of client data (for updates: of the changed strip), against the encoder of the
//! `reed-solomon-erasure` crate with its SIMD code. That crate's parity bytes are another code's; only the work is equal.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_main};
use reed_solomon_erasure::galois_8::ReedSolomon;
use sheepdog_erasure::{Code, STRIPE, kernel_name};
use std::hint::black_box;

const STRIPS: [usize; 5] = [128, 1 << 10, 4 << 10, 64 << 10, 1 << 20];

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + (i >> 8) * 7) as u8).collect()
}

fn slices(strips: &[Vec<u8>]) -> Vec<&[u8]> {
    strips.iter().map(Vec::as_slice).collect()
}

fn slices_mut(strips: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    strips.iter_mut().map(Vec::as_mut_slice).collect()
}

fn split(object: &[u8], strips: &mut [&mut [u8]]) {
    let size = STRIPE / strips.len();
    for (stripe, bytes) in object.chunks_exact(STRIPE).enumerate() {
        for (strip, bytes) in strips.iter_mut().zip(bytes.chunks_exact(size)) {
            strip[stripe * size..(stripe + 1) * size].copy_from_slice(bytes);
        }
    }
}

fn policy(c: &mut Criterion, d: usize, p: usize) {
    let code = Code::new(d as u8, p as u8).expect("valid policy");
    let other = ReedSolomon::new(d, p).expect("valid shape");
    let mut group = c.benchmark_group(format!("{d}:{p} {}", kernel_name()));
    for len in STRIPS {
        let data: Vec<Vec<u8>> = (0..d).map(|_| bytes(len)).collect();
        let data = slices(&data);
        let mut parity = vec![vec![0; len]; p];
        group.throughput(Throughput::Bytes((len * d) as u64));

        let mut list = slices_mut(&mut parity);
        group.bench_function(BenchmarkId::new("encode", len), |b| {
            b.iter(|| code.encode(black_box(&data), black_box(&mut list)).expect("lengths fit"));
        });
        group.bench_function(BenchmarkId::new("encode, reed-solomon-erasure", len), |b| {
            b.iter(|| other.encode_sep(black_box(&data), black_box(&mut list)).expect("lengths fit"));
        });

        let object = bytes((len * d).next_multiple_of(STRIPE));
        let mut strips = vec![vec![0; object.len() / d]; d + p];
        let mut list = slices_mut(&mut strips);
        group.bench_function(BenchmarkId::new("split and encode", len), |b| {
            b.iter(|| code.encode_stripes(black_box(&object), black_box(&mut list)).expect("lengths fit"));
        });
        group.bench_function(BenchmarkId::new("split, then encode, reed-solomon-erasure", len), |b| {
            b.iter(|| {
                split(black_box(&object), &mut list[..d]);
                other.encode(black_box(&mut list)).expect("lengths fit");
            });
        });
        let strips = slices(&strips);
        let mut joined = vec![0; object.len()];
        group.bench_function(BenchmarkId::new("join", len), |b| {
            b.iter(|| code.join(black_box(&strips[..d]), black_box(&mut joined)).expect("lengths fit"));
        });
        let inputs: Vec<(usize, &[u8])> = (1..=d).map(|i| (i, strips[i])).collect();
        let mut out = vec![0; strips[0].len()];
        group.bench_function(BenchmarkId::new("decode one", len), |b| {
            b.iter(|| code.decode(0, black_box(&inputs), black_box(&mut out)).expect("valid inputs"));
        });

        group.throughput(Throughput::Bytes(len as u64));
        let mut list = slices_mut(&mut parity);
        group.bench_function(BenchmarkId::new("update one", len), |b| {
            b.iter(|| {
                let (old, new) = (black_box(data[0]), black_box(data[1]));
                code.update_parity(0, old, new, black_box(&mut list)).expect("lengths fit")
            });
        });
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    policy(c, 4, 2);
    policy(c, 8, 4);
}

mod benches {
    #![allow(missing_docs, reason = "the macro makes a public function without documentation")]
    criterion::criterion_group!(benches, super::all);
}
criterion_main!(benches::benches);
