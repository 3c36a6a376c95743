//! End-to-end tests: the real `sheep` and `dog`, real sockets and files, stock clients.
//!
//! Build the programs first (`cargo build -p sheep -p dog` with the profile of the tests; `scripts/test` does all of
//! it). Each test starts its own cluster in its own directory; nothing is shared, so they run in parallel.

mod altered;
mod bad_input;
mod coded;
mod coded_faults;
mod convergence;
mod dead_clients;
mod disks;
mod dog_backups;
mod dog_extras;
mod dog_integrations;
mod dog_terminal;
mod drivers;
mod durability;
mod early;
mod epochs;
mod faults;
mod homes;
mod hosts;
mod hyper;
mod life;
mod locks;
mod nbd;
mod order;
mod pty;
mod qemu;
mod recovery;
mod restart;
mod returning;
mod safety;
mod scale;
mod scenarios;
mod sharing;
mod sick_disks;
mod stalls;
mod tgt;
mod torture;
mod tree;
mod vdi;
mod vdi_kinds;
mod vdi_load;
mod vdi_model;
mod vdi_order;
mod vdi_safety;
mod vdi_vectors;
mod wire;
mod zookeeper;
