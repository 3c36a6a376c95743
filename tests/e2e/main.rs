//! End-to-end tests: the real `sheep` and `dog`, real sockets and files, stock clients.
//!
//! Build the programs first (`cargo build -p sheep -p dog` with the profile of the tests; `scripts/test` does all of
//! it). Each test starts its own cluster in its own directory; nothing is shared, so they run in parallel.

mod bad_input;
mod convergence;
mod corosync;
mod disks;
mod dog_extras;
mod durability;
mod epochs;
mod hosts;
mod life;
mod locks;
mod nbd;
mod order;
mod restart;
mod safety;
mod scale;
mod scenarios;
mod stalls;
mod tree;
mod vdi;
mod vdi_load;
mod vdi_model;
mod vdi_safety;
mod vdi_vectors;
mod wire;
mod zookeeper;
