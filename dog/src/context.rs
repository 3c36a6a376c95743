//! What a command gets to work with.

use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;

use crate::args::Options;
use crate::exit::{Outcome, Stop};
use crate::out::text;
use crate::session::{ClusterView, Session};

/// The parsed command line and the connection to the cluster.
pub struct Context {
    /// Option values.
    pub options: Options,
    /// Operands behind the command words.
    pub args: Vec<Vec<u8>>,
    /// Connections.
    pub session: Session,
    /// Members and epoch; empty unless the command's table row asks for them.
    pub cluster: ClusterView,
}

impl Context {
    /// The operand at `index`.
    pub fn arg(&self, index: usize) -> Option<&[u8]> {
        self.args.get(index).map(Vec::as_slice)
    }

    /// The first operand; its absence is a usage error.
    pub fn name(&self) -> Result<&[u8], Stop> {
        self.arg(0).ok_or(Stop::Usage)
    }

    /// An operand as text for a message.
    pub fn arg_text(&self, index: usize) -> Cow<'_, str> {
        text(self.arg(index).unwrap_or_default())
    }
}

/// What a handler returns.
pub type Running<'a> = Pin<Box<dyn Future<Output = Outcome> + 'a>>;

/// A command's implementation.
pub type Handler = for<'a> fn(&'a Context) -> Running<'a>;
