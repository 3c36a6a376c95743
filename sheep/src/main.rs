//! sheep

fn main() {}
