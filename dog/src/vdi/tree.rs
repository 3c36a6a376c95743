//! `dog vdi tree` (spec 07, 8.2).

use std::collections::HashMap;

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::Outcome;
use crate::inode::Part;
use crate::json;
use crate::numbers::{day_and_minute, seconds};
use crate::out;
use crate::walk::walk;

const WORKING: &str = "(you are here)";

struct Node {
    name: Vec<u8>,
    vid: u32,
    /// Display text; highlighted if it is the working VDI's.
    label: String,
    working: bool,
    children: Vec<Node>,
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    if context.options.json {
        return as_json(context).await;
    }
    let mut forest = Forest::default();
    let mut inodes = walk(&context.session, Part::Header).await?;
    while let Some(inode) = inodes.next().await {
        let header = &inode.header;
        let working = !header.is_snapshot();
        let label = if working {
            WORKING.into()
        } else {
            format!("[{}]", day_and_minute(seconds(header.create_time)))
        };
        let node = Node {
            name: header.name().to_vec(),
            vid: inode.vid().get(),
            label,
            working,
            children: Vec::new(),
        };
        forest.insert(node, header.parent_vdi_id.get());
    }
    let highlight = out::is_terminal();
    for root in forest.finish() {
        let mut text = Vec::new();
        Painter { highlight, levels: Vec::new() }.subtree(&root, &mut text);
        out::write(&[&root.name[..], &text, b"\n"].concat());
    }
    Ok(())
}

/// All VDIs with their parents: a flat list, since chains may be thousands of snapshots long.
async fn as_json(context: &Context) -> Outcome {
    let inodes = walk(&context.session, Part::Header).await?;
    let rows: Vec<Value> = inodes.map(|inode| Value::Object(json::vdi(&inode))).collect().await;
    json::print(&json!({ "vdis": rows }));
    Ok(())
}

/// Nodes with the parent each one names, in the order of their ids.
#[derive(Default)]
struct Forest {
    nodes: Vec<(Node, u32)>,
}

impl Forest {
    fn insert(&mut self, node: Node, parent: u32) {
        self.nodes.push((node, parent));
    }

    /// Positions of the parents: a parent is the VDI of that id with the same name.
    fn parents(&self) -> Vec<Option<usize>> {
        let positions: HashMap<u32, usize> =
            self.nodes.iter().enumerate().map(|(at, (node, _))| (node.vid, at)).collect();
        let same_name = |node: &Node, at: &usize| self.nodes[*at].0.name == node.name;
        self.nodes.iter().map(|(n, p)| positions.get(p).copied().filter(|at| same_name(n, at))).collect()
    }

    /// Children are ordered by id, except that those whose parent came later in the walk follow the others.
    fn finish(self) -> Vec<Node> {
        let count = self.nodes.len();
        let parents = self.parents();
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); count];
        let mut roots = Vec::new();
        for (at, parent) in parents.iter().enumerate() {
            match parent {
                Some(parent) if *parent < at => children[*parent].push(at),
                Some(_) => {}
                None => roots.push(at),
            }
        }
        for (at, parent) in parents.iter().enumerate() {
            let Some(parent) = parent.filter(|parent| *parent >= at) else { continue };
            // A VDI that is its own ancestor hangs nowhere; show it at the top rather than lose it.
            if ancestors(&parents, at).any(|a| a == at) { roots.push(at) } else { children[parent].push(at) }
        }
        let mut nodes: Vec<Option<Node>> = self.nodes.into_iter().map(|(node, _)| Some(node)).collect();
        roots.into_iter().filter_map(|at| take(at, &mut nodes, &children)).collect()
    }
}

fn ancestors(parents: &[Option<usize>], at: usize) -> impl Iterator<Item = usize> + '_ {
    std::iter::successors(parents[at], |at| parents[*at]).take(parents.len())
}

/// Builds the subtree of a node bottom up; chains may be thousands of snapshots long, so without recursion.
fn take(root: usize, nodes: &mut [Option<Node>], children: &[Vec<usize>]) -> Option<Node> {
    let mut order = vec![root];
    let mut next = 0;
    while let Some(at) = order.get(next) {
        order.extend(children[*at].iter().filter(|c| nodes[**c].is_some()));
        next += 1;
    }
    for at in order.into_iter().rev() {
        let below: Vec<Node> = children[at].iter().filter_map(|c| nodes[*c].take()).collect();
        if let Some(node) = &mut nodes[at] {
            node.children = below;
        }
    }
    nodes[root].take()
}

/// One enclosing level: the width of its label, and whether more siblings follow.
struct Level {
    width: usize,
    more: bool,
}

struct Painter {
    highlight: bool,
    levels: Vec<Level>,
}

impl Painter {
    /// Paints what is below `root`, whose name stands at the start of the line.
    fn subtree(&mut self, root: &Node, text: &mut Vec<u8>) {
        // Entries are (node, depth, position among the siblings, number of siblings).
        let mut stack: Vec<(&Node, usize, usize, usize)> = vec![(root, 0, 0, 1)];
        while let Some((node, depth, position, siblings)) = stack.pop() {
            self.levels.truncate(depth);
            let more = position + 1 < siblings;
            if position == 0 {
                text.extend(if siblings == 1 { b"---" } else { b"-+-" });
            } else {
                self.new_line(root.name.len(), text);
                text.extend(if more { b"|-" } else { b"`-" });
            }
            if node.working && self.highlight {
                text.extend(format!("\x1b[1m{}\x1b[0m", node.label).into_bytes());
            } else {
                text.extend(node.label.as_bytes());
            }
            self.levels.push(Level { width: node.label.len(), more });
            let count = node.children.len();
            stack.extend(node.children.iter().enumerate().rev().map(|(i, c)| (c, depth + 1, i, count)));
        }
    }

    fn new_line(&self, name_width: usize, text: &mut Vec<u8>) {
        text.push(b'\n');
        let mut width = name_width;
        for (depth, level) in self.levels.iter().enumerate() {
            text.resize(text.len() + width + 1, b' ');
            let last = depth + 1 == self.levels.len();
            text.extend(if level.more { b"| " } else { b"  " });
            width = level.width;
            if last {
                text.resize(text.len() + width + 1, b' ');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forest(rows: &[(&str, u32, u32, bool)]) -> String {
        let mut forest = Forest::default();
        for (name, vid, parent, working) in rows {
            let label = if *working { WORKING.into() } else { "[2024-01-02 10:06]".into() };
            let name = name.as_bytes().to_vec();
            let node = Node { name, vid: *vid, label, working: *working, children: Vec::new() };
            forest.insert(node, *parent);
        }
        let mut text = Vec::new();
        for root in forest.finish() {
            text.extend(&root.name);
            Painter { highlight: false, levels: Vec::new() }.subtree(&root, &mut text);
            text.push(b'\n');
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn branches_are_drawn_as_captured() {
        let rows = [
            ("t", 0x202a3, 0, false),
            ("t", 0x202a4, 0x202a3, false),
            ("t", 0x202a5, 0x202a4, false),
            ("t", 0x202a7, 0x202a3, false),
            ("t", 0x202a9, 0x202a4, false),
            ("t", 0x202ab, 0x202a3, false),
            ("t", 0x202ac, 0x202ab, true),
            ("longername", 0x83a733, 0x202a4, true),
        ];
        let expected = "\
t---[2024-01-02 10:06]-+-[2024-01-02 10:06]-+-[2024-01-02 10:06]
                       |                    `-[2024-01-02 10:06]
                       |-[2024-01-02 10:06]
                       `-[2024-01-02 10:06]---(you are here)
longername---(you are here)
";
        assert_eq!(forest(&rows), expected);
    }

    #[test]
    fn a_deleted_parent_makes_its_children_separate_lines() {
        let rows = [("t", 2, 1, false), ("t", 3, 2, false), ("t", 4, 1, true)];
        let expected = "t---[2024-01-02 10:06]---[2024-01-02 10:06]\nt---(you are here)\n";
        assert_eq!(forest(&rows), expected);
    }

    #[test]
    fn a_cycle_does_not_hang() {
        let shown = forest(&[("t", 1, 2, false), ("t", 2, 1, false), ("u", 3, 3, false)]);
        assert_eq!(shown.lines().count(), 2);
    }
}
