//! Random lives of VDIs against a model: whatever was created, written, snapshot, cloned, rolled back, resized,
//! discarded and deleted, contents are the model's, ledgers are what the inodes say, and nothing is left in the end.
//!
//! `SHEEPDOG_MODEL_STEPS` sets the length (`scripts/torture` sets thousands), `SHEEPDOG_MODEL_SEED` the sequence.

pub mod audit;
mod model;
mod run;

use run::Run;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

fn steps(default: u64) -> u64 {
    setting("SHEEPDOG_MODEL_STEPS", default)
}

fn seed() -> u64 {
    let seed = setting("SHEEPDOG_MODEL_SEED", u64::from(std::process::id()));
    eprintln!("SHEEPDOG_MODEL_SEED={seed}");
    seed
}

#[test]
fn random_lives_of_vdis_agree_with_the_model() {
    let mut run = Run::start(3, seed());
    for step in 0..steps(300) {
        run.step(step);
        if step % 100 == 99 {
            run.audit();
        }
    }
    run.finish();
}

#[test]
fn random_lives_agree_with_the_model_while_nodes_are_killed() {
    let mut run = Run::start(4, seed());
    for step in 0..steps(150) {
        run.disturb();
        run.cut();
        run.step(step);
    }
    run.finish();
}
