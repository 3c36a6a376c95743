//! Serves volumes of an in-memory sheep: `memory ADDRESS [NAME=BYTES]...`. For trying clients and measuring the NBD
//! layer alone.

use std::sync::Arc;

use sheepdog_client::fake::FakeSheep;
use sheepdog_client::vdi::{self, NewVdi};
use sheepdog_nbd::{ListenAddr, Listener, Server, VdiExports, VdiExportsOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let addr = ListenAddr::parse(&args.next().ok_or("usage: memory ADDRESS [NAME=BYTES]...")?)?;
    let sheep = Arc::new(FakeSheep::new().with_block_shift(22));
    for arg in args {
        let (name, size) = arg.split_once('=').ok_or("expected NAME=BYTES")?;
        vdi::create(&*sheep, name, &NewVdi { size: size.parse()?, ..NewVdi::default() }).await?;
    }
    let exports = VdiExports::new(sheep, VdiExportsOptions::default());
    let server = Server::new(Arc::new(exports));
    let listener = Listener::bind(&addr).await?;
    println!("{}", listener.local_addr()?);
    server.serve(listener).await?;
    Ok(())
}
