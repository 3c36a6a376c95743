//! dog

fn main() {}
