//! Object files of a cluster as they lie on disk: who holds what, and whether replicas are equal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sheepdog_erasure::Code;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::Oid;

use crate::cluster::Cluster;
use crate::wait::wait;

/// Unit in which files are compared.
const CHUNK: usize = 64 << 10;

/// A difference between two replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The object.
    pub oid: Oid,
    /// The nodes whose files differ.
    pub nodes: (usize, usize),
    /// Where.
    pub range: Range<u64>,
}

/// What a comparison of all replicas found.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Objects seen.
    pub objects: usize,
    /// Objects that a home lacks: object, home.
    pub missing: Vec<(Oid, usize)>,
    /// Bytes that differ between homes.
    pub differences: Vec<Difference>,
}

/// Object files of a disk, of either store driver: the names that are exactly 16 hex digits.
pub fn object_files(disk: &Path) -> Vec<(Oid, PathBuf)> {
    let is_hex = |name: &str| name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let Ok(entries) = fs::read_dir(disk) else { return Vec::new() };
    let mut files = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name == "meta" || name.len() == 2 && is_hex(&name) {
            files.extend(object_files(&entry.path()));
        } else if name.len() == 16 && is_hex(&name) {
            files.push((Oid(u64::from_str_radix(&name, 16).expect("16 hex digits")), entry.path()));
        }
    }
    files
}

/// `rm -rf` of a disk, again until it is gone: a daemon at work may make a file in a directory that was just emptied.
pub fn remove(disk: &Path) {
    wait(&format!("{} to be removed", disk.display()), || match fs::remove_dir_all(disk) {
        Ok(()) => true,
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => false,
        Err(e) => panic!("rm -rf {}: {e}", disk.display()),
    });
}

/// Sets how many bytes of space a directory counts for as a disk.
pub fn set_size(disk: &Path, bytes: u64) {
    let set = xattr::set(disk, "user.md.size", &bytes.to_le_bytes());
    set.unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
}

fn is_allocated(file: &File) -> bool {
    file.metadata().map_or(true, |m| m.blocks() > 0)
}

/// Ranges in which two files differ, adjacent bytes joined. A missing tail counts as zeros; files without any block are
/// not read.
pub fn compare_files(a: &Path, b: &Path) -> std::io::Result<Vec<Range<u64>>> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    if !is_allocated(&a) && !is_allocated(&b) {
        return Ok(Vec::new());
    }
    let length = a.metadata()?.len().max(b.metadata()?.len());
    let mut found: Vec<Range<u64>> = Vec::new();
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < length {
        left.fill(0);
        right.fill(0);
        read_up_to(&a, &mut left, at)?;
        read_up_to(&b, &mut right, at)?;
        if left != right {
            for i in (0..CHUNK).filter(|i| left[*i] != right[*i]) {
                let byte = at + i as u64;
                match found.last_mut() {
                    Some(last) if last.end == byte => last.end += 1,
                    _ => found.push(byte..byte + 1),
                }
            }
        }
        at += CHUNK as u64;
    }
    Ok(found)
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(())
}

impl Cluster {
    /// Object files of a node that are current (not stale, not temporary).
    pub fn objects_of(&self, index: usize) -> BTreeMap<Oid, PathBuf> {
        self.nodes[index].object_dirs().iter().flat_map(|d| object_files(d)).collect()
    }

    /// The file of an object on a node, if it holds one.
    pub fn object_path(&self, index: usize, oid: Oid) -> Option<PathBuf> {
        let vid = format!("{:02x}", oid.vid().get() & 0xff);
        let dirs = self.nodes[index].object_dirs().into_iter();
        let mut places = dirs.flat_map(|d| [d.clone(), d.join("meta"), d.join(&vid)]);
        places.find_map(|d| Some(d.join(oid.to_string())).filter(|p| p.is_file()))
    }

    /// Nodes that hold a current file of the object.
    pub fn holders(&self, oid: Oid) -> Vec<usize> {
        (0..self.nodes.len()).filter(|i| self.object_path(*i, oid).is_some()).collect()
    }

    /// The ring of the present epoch, as a running node reports it.
    pub fn ring(&mut self) -> Ring {
        let running = self.running();
        let info = running.iter().find_map(|i| self.info(*i)).expect("a node answers");
        Ring::new(info.nodes, Weights::of_cluster(info.header.flags)).expect("the list of a running cluster")
    }

    fn homes_on(&self, ring: &Ring, oid: Oid, copies: usize) -> Vec<usize> {
        let number = |port| self.nodes.iter().position(|n| n.port == port).expect("a member is one of ours");
        ring.nodes_of(oid, copies.min(ring.nr_zones())).map(|n| number(n.nid.port)).collect()
    }

    /// Nodes that must hold `copies` replicas of an object at the present epoch, in placement order.
    pub fn homes(&mut self, oid: Oid, copies: usize) -> Vec<usize> {
        let ring = self.ring();
        self.homes_on(&ring, oid, copies)
    }

    /// Compares every replicated object on all its homes, by reading the files. Call when recovery is over.
    pub fn compare_replicas(&mut self, copies: usize) -> Comparison {
        let mut result = Comparison::default();
        let ring = self.ring();
        let all: BTreeSet<Oid> =
            self.running().into_iter().flat_map(|i| self.objects_of(i).into_keys()).collect();
        for oid in all {
            result.objects += 1;
            let homes = self.homes_on(&ring, oid, copies);
            let files: Vec<_> = homes.iter().map(|h| (*h, self.object_path(*h, oid))).collect();
            result.missing.extend(files.iter().filter(|(_, p)| p.is_none()).map(|(h, _)| (oid, *h)));
            let present: Vec<_> = files.iter().filter_map(|(h, p)| p.as_ref().map(|p| (*h, p))).collect();
            let Some((first, first_path)) = present.first() else { continue };
            for (other, path) in &present[1..] {
                let ranges = compare_files(first_path, path).unwrap_or_else(|e| panic!("{oid}: {e}"));
                let nodes = (*first, *other);
                result.differences.extend(ranges.into_iter().map(|range| Difference { oid, nodes, range }));
            }
        }
        result
    }

    /// Checks every coded data object on its homes: all strips are there and the parity is that of the data.
    pub fn compare_strips(&mut self, data: u8, parity: u8) -> Comparison {
        let code = Code::new(data, parity).expect("a valid policy");
        let mut result = Comparison::default();
        let ring = self.ring();
        for (oid, files) in self.strips() {
            result.objects += 1;
            let homes = self.homes_on(&ring, oid, code.strips());
            let mut strips = Vec::new();
            for (index, home) in homes.iter().enumerate() {
                match files.get(&(*home, index)) {
                    Some(path) => {
                        strips.push(fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
                    }
                    None => result.missing.push((oid, *home)),
                }
            }
            if strips.len() < code.strips() {
                continue;
            }
            let (given, stored) = strips.split_at(code.data_strips());
            let given: Vec<&[u8]> = given.iter().map(Vec::as_slice).collect();
            let mut computed = vec![vec![0; given[0].len()]; code.parity_strips()];
            let mut out: Vec<&mut [u8]> = computed.iter_mut().map(Vec::as_mut_slice).collect();
            code.encode(&given, &mut out).unwrap_or_else(|e| panic!("{oid}: {e}"));
            for (i, (is, should)) in stored.iter().zip(&computed).enumerate() {
                if let Some(at) = (0..should.len()).find(|at| is.get(*at) != Some(&should[*at])) {
                    let end =
                        (0..should.len()).rfind(|at| is.get(*at) != Some(&should[*at])).unwrap_or(at) + 1;
                    let nodes = (homes[0], homes[code.data_strips() + i]);
                    result.differences.push(Difference { oid, nodes, range: at as u64..end as u64 });
                }
            }
        }
        result
    }

    /// Panics unless all strips are there and belong together.
    pub fn assert_strips_agree(&mut self, data: u8, parity: u8) {
        let found = self.compare_strips(data, parity);
        assert!(found.missing.is_empty(), "strips that a home lacks: {:?}", found.missing);
        assert!(found.differences.is_empty(), "parity is wrong: {:?}", found.differences);
    }

    /// Strip files of the running nodes, by object, node and index.
    pub fn strips(&mut self) -> BTreeMap<Oid, BTreeMap<(usize, usize), PathBuf>> {
        let mut strips: BTreeMap<Oid, BTreeMap<(usize, usize), PathBuf>> = BTreeMap::new();
        for node in self.running() {
            for dir in self.nodes[node].object_dirs() {
                for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
                    let name = entry.file_name().into_string().unwrap_or_default();
                    let Some((oid, index)) = name.split_once('_') else { continue };
                    let (Ok(oid), Ok(index)) = (u64::from_str_radix(oid, 16), index.parse()) else {
                        continue;
                    };
                    strips.entry(Oid(oid)).or_default().insert((node, index), entry.path());
                }
            }
        }
        strips
    }

    /// Panics unless all replicas are there and equal.
    pub fn assert_replicas_equal(&mut self, copies: usize) {
        let found = self.compare_replicas(copies);
        assert!(found.missing.is_empty(), "objects that a home lacks: {:?}", found.missing);
        assert!(found.differences.is_empty(), "replicas differ: {:?}", found.differences);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_differ_exactly_where_they_do() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut bytes = vec![7; 200_000];
        fs::write(&a, &bytes).unwrap();
        bytes[65_535] = 1;
        bytes[65_536] = 1;
        bytes[199_999] = 1;
        fs::write(&b, &bytes).unwrap();
        assert_eq!(compare_files(&a, &b).unwrap(), [65_535..65_537, 199_999..200_000]);
        assert!(compare_files(&a, &a).unwrap().is_empty());
    }

    #[test]
    fn a_missing_tail_is_zeros_and_holes_are_too() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, [0; 5000]).unwrap();
        File::create(&b).unwrap().set_len(100_000).unwrap();
        assert!(compare_files(&a, &b).unwrap().is_empty());
        fs::write(&a, [0, 9]).unwrap();
        assert_eq!(compare_files(&a, &b).unwrap(), [Range { start: 1, end: 2 }]);
    }

    #[test]
    fn only_exact_names_are_objects() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["007c2b2500000000", "007c2b2500000001.tmp", "007C2B2500000000", "backup", "807c2b2500000000_1"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let found: Vec<_> = object_files(dir.path()).into_iter().map(|(oid, _)| oid.0).collect();
        assert_eq!(found, [0x007c_2b25_0000_0000]);
    }
}
