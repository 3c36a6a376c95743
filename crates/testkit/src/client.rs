//! A blocking client of the wire protocol, independent of the project's own client crate.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Flags, HEADER_LEN, Oid, Opcode, Request, Response, ResultCode};

/// How long a request may take. Longer than any retry of a gateway that a test provokes.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Most bytes taken from an answer: more than any object.
const MAX_ANSWER: usize = 64 << 20;

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection to a sheep.
pub struct Client {
    stream: Stream,
    next_id: u32,
}

/// Turns an answer into its payload, or the result it failed with.
pub fn answer((response, payload): (Response, Vec<u8>)) -> Result<Vec<u8>, ResultCode> {
    response.result.ok().map(|()| payload)
}

impl Client {
    /// Connects to a TCP port of this machine.
    pub fn connect(port: u16) -> io::Result<Client> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        let mut client = Client { stream: Stream::Tcp(stream), next_id: 1 };
        client.set_timeout(TIMEOUT)?;
        Ok(client)
    }

    /// Connects to a daemon's Unix socket.
    pub fn connect_unix(path: &Path) -> io::Result<Client> {
        let mut client = Client { stream: Stream::Unix(UnixStream::connect(path)?), next_id: 1 };
        client.set_timeout(TIMEOUT)?;
        Ok(client)
    }

    /// Sets how long a read or write may block.
    pub fn set_timeout(&mut self, limit: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(s) => s.set_read_timeout(Some(limit)).and(s.set_write_timeout(Some(limit))),
            Stream::Unix(s) => s.set_read_timeout(Some(limit)).and(s.set_write_timeout(Some(limit))),
        }
    }

    /// Sends bytes as they are.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(s) => s.write_all(bytes),
            Stream::Unix(s) => s.write_all(bytes),
        }
    }

    /// Reads exactly `bytes.len()` bytes.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(s) => s.read_exact(bytes),
            Stream::Unix(s) => s.read_exact(bytes),
        }
    }

    /// Reads what is there; 0 = the daemon closed the connection.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Tcp(s) => s.read(bytes),
            Stream::Unix(s) => s.read(bytes),
        }
    }

    /// Ends the sending direction.
    pub fn shutdown_write(&mut self) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
            Stream::Unix(s) => s.shutdown(std::net::Shutdown::Write),
        }
    }

    /// Sends a header and its payload; gives the id it got.
    pub fn send(&mut self, mut request: Request, payload: &[u8]) -> io::Result<u32> {
        request.id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let mut frame = request.to_bytes().to_vec();
        frame.extend_from_slice(payload);
        self.send_bytes(&frame)?;
        Ok(request.id)
    }

    /// Reads one answer, whoever asked.
    pub fn receive(&mut self) -> io::Result<(Response, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.read_exact(&mut header)?;
        let response = Response::from_bytes(&header);
        let length = response.data_length as usize;
        if length > MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an answer of {length} bytes")));
        }
        let mut payload = vec![0; length];
        self.read_exact(&mut payload)?;
        Ok((response, payload))
    }

    /// Sends a request and reads its answer.
    pub fn call(&mut self, request: Request, payload: &[u8]) -> io::Result<(Response, Vec<u8>)> {
        let id = self.send(request, payload)?;
        let (response, data) = self.receive()?;
        if response.id != id || response.opcode != request.opcode {
            let text =
                format!("{:?} {} asked, {:?} {} answered", request.opcode, id, response.opcode, response.id);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok((response, data))
    }

    /// [`Client::call`] for requests whose connection must not fail.
    pub fn must(&mut self, request: Request, payload: &[u8]) -> (Response, Vec<u8>) {
        self.call(request, payload).unwrap_or_else(|e| panic!("{:?}: {e}", request.opcode))
    }

    /// READ_OBJ.
    pub fn read_obj(&mut self, oid: Oid, offset: u32, length: usize) -> io::Result<(Response, Vec<u8>)> {
        let body = ObjRequest { oid, offset, ..ObjRequest::zeroed() };
        self.call(Request::new(Opcode::READ_OBJ).with_obj(body).length(length), &[])
    }

    /// WRITE_OBJ.
    pub fn write_obj(&mut self, oid: Oid, offset: u32, data: &[u8]) -> io::Result<ResultCode> {
        let body = ObjRequest { oid, offset, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::WRITE_OBJ).flag(Flags::WRITE).with_obj(body).length(data.len());
        Ok(self.call(request, data)?.0.result)
    }

    /// CREATE_AND_WRITE_OBJ, copying from `cow` if given.
    pub fn create_obj(
        &mut self,
        oid: Oid,
        cow: Option<Oid>,
        offset: u32,
        data: &[u8],
    ) -> io::Result<ResultCode> {
        let body = ObjRequest { oid, cow_oid: cow.unwrap_or_default(), offset, ..ObjRequest::zeroed() };
        let flags = if cow.is_some() { Flags::WRITE.with(Flags::COW) } else { Flags::WRITE };
        let request =
            Request::new(Opcode::CREATE_AND_WRITE_OBJ).flag(flags).with_obj(body).length(data.len());
        Ok(self.call(request, data)?.0.result)
    }
}
