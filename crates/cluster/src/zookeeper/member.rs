//! One process's part in the cluster, session after session: takes the daemon's requests and what the session's tasks
//! find, one at a time (spec 04, 12.10).

use std::sync::Arc;
use std::time::Duration;

use sheepdog_proto::{ClusterInfo, NodeRecord};
use tokio::sync::{mpsc, oneshot};

use super::link::{Fault, LinkOwner};
use super::option::Options;
use super::queue::Read;
use super::session::{Input, Outcome, Session};
use crate::{DriverError, Event, Lease, Lock, Reply, Request};

/// Between two attempts to get a new session.
const RECONNECT: Duration = Duration::from_secs(1);

/// What the thread is asked to do, and what it is told. Numbers are the session's generation and a question's.
pub enum Command {
    /// A call of the daemon.
    Request(Request, oneshot::Sender<Reply>),
    /// Get the mutex with this number.
    Lock(u64, oneshot::Sender<Result<Lock, DriverError>>),
    /// The verdict on a join.
    JoinAnswer(u64, u64, Option<Box<ClusterInfo>>),
    /// Whether the mutex was taken.
    BlockAnswer(u64, u64, bool),
    /// Of a task of the session.
    Input(u64, Input),
    /// End the thread.
    Stop,
}

/// See the module's documentation.
pub struct Member {
    options: Options,
    /// The first session, until the first join.
    first: Option<LinkOwner>,
    lease: Arc<Lease>,
    session: Option<Session>,
    generation: u64,
    /// A session was lost: failing to join again cannot be returned by the first call of `join`.
    lost_one: bool,
    events: mpsc::UnboundedSender<Event>,
    commands: mpsc::UnboundedReceiver<Command>,
    mailbox: mpsc::UnboundedSender<Command>,
}

impl Member {
    /// A member that has not joined.
    pub fn new(
        options: Options,
        first: LinkOwner,
        lease: Arc<Lease>,
        events: mpsc::UnboundedSender<Event>,
        commands: mpsc::UnboundedReceiver<Command>,
        mailbox: mpsc::UnboundedSender<Command>,
    ) -> Member {
        Member {
            options,
            first: Some(first),
            lease,
            session: None,
            generation: 0,
            lost_one: false,
            events,
            commands,
            mailbox,
        }
    }

    /// Runs until the driver is dropped.
    pub async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    None | Some(Command::Stop) => {
                        self.lease.end();
                        return;
                    }
                    Some(command) => self.command(command).await,
                },
                read = next_read(&mut self.session) => self.read(read).await,
            }
        }
    }

    async fn read(&mut self, read: Option<Read>) {
        let Some(session) = self.session.as_mut() else { return };
        match read {
            // The reader ends with its session, or after a gap.
            None => session.reads = None,
            Some(read) => match session.handle(read).await {
                Ok(Outcome::On) => {}
                Ok(Outcome::Expelled) => self.lose(),
                Ok(Outcome::Taken) => self.taken(),
                Err(fault) => self.fault(fault),
            },
        }
    }

    async fn command(&mut self, command: Command) {
        let generation = self.generation;
        let result = match command {
            Command::Request(request, reply) => self.request(request, reply).await,
            Command::Lock(id, reply) => {
                match self.session.as_mut() {
                    Some(session) => session.lock(id, reply),
                    None => drop(reply.send(Err(DriverError::NotJoined))),
                }
                Ok(())
            }
            Command::JoinAnswer(g, question, info) if g == generation => match self.session.as_mut() {
                Some(session) => session.join_answered(question, info).await,
                None => Ok(()),
            },
            Command::BlockAnswer(g, question, granted) if g == generation => {
                if let Some(session) = self.session.as_mut() {
                    session.block_answered(question, granted);
                }
                Ok(())
            }
            Command::Input(g, input) if g == generation => self.input(input).await,
            _ => Ok(()),
        };
        if let Err(fault) = result {
            self.fault(fault);
        }
    }

    async fn input(&mut self, input: Input) -> Result<(), Fault> {
        let Some(session) = self.session.as_mut() else { return Ok(()) };
        match input {
            Input::Entered(Ok(join)) => session.entered(join),
            Input::Entered(Err(error)) => self.fail(error),
            Input::Refused(what, e) => self.refused(format!("{what}: {e}")),
            Input::Elected | Input::AskAgain => return session.look_again().await,
            Input::Death(node, end) => session.death(node, end),
            Input::Back(node) => session.back(node),
            Input::Lost => self.lose(),
        }
        Ok(())
    }

    async fn request(&mut self, request: Request, reply: oneshot::Sender<Reply>) -> Result<(), Fault> {
        let Some(session) = self.session.as_mut() else {
            match request {
                Request::Join(me, info) => self.join(me, *info, reply).await,
                Request::Leave | Request::End => drop(reply.send(Ok(()))),
                _ => drop(reply.send(Err(DriverError::NotJoined))),
            }
            return Ok(());
        };
        match request {
            Request::Join(..) => drop(reply.send(Err(DriverError::AlreadyJoined))),
            Request::Leave | Request::End => return session.leave(reply).await,
            Request::Notify(message) => session.notify(message, reply),
            Request::Block => session.block(reply),
            Request::Unblock(message) => session.unblock(message, reply),
            Request::Update(node) => session.update(node, reply),
        }
        Ok(())
    }

    async fn join(&mut self, me: NodeRecord, info: ClusterInfo, reply: oneshot::Sender<Reply>) {
        let owner = match self.first.take() {
            Some(owner) => owner,
            None => self.reconnect().await,
        };
        self.generation += 1;
        let (events, mailbox) = (self.events.clone(), self.mailbox.clone());
        let lease = self.lease.clone();
        let mut session = Session::start(self.generation, owner, lease, me, info, events, mailbox);
        session.joining = Some(reply);
        self.session = Some(session);
    }

    async fn reconnect(&self) -> LinkOwner {
        tracing::warn!("detect a session timeout. reconnecting...");
        loop {
            match LinkOwner::connect(&self.options).await {
                Ok(owner) => {
                    tracing::info!("reconnected");
                    return owner;
                }
                Err(e) => tracing::error!("failed to reconnect. sleep and retry... ({e})"),
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Lost => self.lose(),
            Fault::Refused(e) => self.refused(e.to_string()),
        }
    }

    /// The member of this address is another process.
    fn taken(&mut self) {
        if let Some(nid) = self.session.as_ref().map(Session::nid) {
            self.fail(DriverError::AddressTaken(nid));
        }
    }

    /// A server does not do what this node needs.
    fn refused(&mut self, reason: String) {
        self.fail(DriverError::Ensemble { hosts: self.options.hosts.clone(), reason });
    }

    /// Ends the session for good. The first join returns the reason, later the daemon ends with it.
    fn fail(&mut self, error: DriverError) {
        let Some(mut session) = self.session.take() else { return };
        self.lease.end();
        let reply = session.joining.take();
        if self.lost_one || reply.is_none() {
            let _ = self.events.send(Event::Failed(error.to_string()));
        }
        if let Some(reply) = reply {
            let _ = reply.send(Err(error));
        }
    }

    /// Ends the session and tells the daemon first, so that it does not take the failing requests for failures. A join
    /// under way has succeeded in so far as the daemon joins again.
    fn lose(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        // Before anybody is told: a later session's lease says nothing about what was written in this one.
        self.lease.end();
        self.lost_one = true;
        if session.leaving {
            let text = "the zookeeper session of this node, which had left the cluster, was lost";
            let _ = self.events.send(Event::Failed(text.to_owned()));
            return;
        }
        let _ = self.events.send(Event::Reconnect);
        if let Some(reply) = session.joining.take() {
            let _ = reply.send(Ok(()));
        }
    }
}

async fn next_read(session: &mut Option<Session>) -> Option<Read> {
    match session.as_mut().and_then(|s| s.reads.as_mut()) {
        Some(reads) => reads.recv().await,
        None => std::future::pending().await,
    }
}
