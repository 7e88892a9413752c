//! Counts by a label of the token: a window of another order of arrival, its home, its part of a sequence.
//!
//! Counts add up, so a trace is read in its own order: every token says the row that it counts in. Nothing is put in
//! order, and nothing read twice.

use rayon::prelude::*;

use super::{Copies, Split};
use crate::counting::by_layers;
use crate::counting::windows::{Narrow, of_any_type};
use crate::error::{Error, Result, room_for};
use crate::trace::{ExpertId, Routing, validate};

/// What some tokens are labelled with.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// The row that each counts in.
    pub row: &'a [u32],
    /// The position whose hash chooses between copies; by default its number in the trace.
    pub position: Option<&'a [u64]>,
    /// Its home, which the nearest copy is near to; by default the hash's.
    pub home: Option<&'a [u16]>,
}

/// Counts the tokens of devices by label. Push the shards of a trace in order, then [`Labelled::finish`].
#[derive(Debug)]
pub struct Labelled {
    routing: Routing,
    copies: Copies,
    /// Load of every device and, where they are wanted, visits of every device and node.
    size: usize,
    tokens: u64,
    /// Of every layer `[rows, size]`.
    tables: Vec<Narrow>,
}

/// Tokens whose ids of a layer, devices and rows stay in the first-level cache.
const BLOCK: usize = 1 << 10;

impl Labelled {
    /// Nothing counted yet in so many `rows`, none of which gets more than `most` tokens. Where copies take turns, whose
    /// turn it is depends on all tokens before: that is an error.
    pub fn new(
        routing: Routing,
        copies: Copies,
        rows: usize,
        most_tokens: u64,
        visits: bool,
    ) -> Result<Self> {
        if copies.split == Split::RoundRobin && (0..routing.layers).any(|l| !copies.is_single(l)) {
            let rule = "one slot of every expert where copies take turns";
            return Err(Error::shape("slots", rule, &"copies"));
        }
        let size = copies.devices + if visits { copies.devices + copies.nodes() } else { 0 };
        let count = Narrow::zeros(most_tokens.saturating_mul(routing.top_k as u64), 1);
        room_for("rows", &[rows, routing.layers, size, count.width()])?;
        let tables = (0..routing.layers).map(|_| count.zeros_like(rows * size)).collect();
        Ok(Self { routing, copies, size, tokens: 0, tables })
    }

    /// Counts the next tokens `[tokens, layers, top_k]`, each by its labels.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], labels: Labels<'_>, checked: bool) -> Result<()> {
        let Self { routing, copies, size, tokens: first, tables } = self;
        let top_k = routing.top_k;
        if !checked {
            validate(ids, *routing, *first)?;
        }
        let from = *first;
        let position = |at: usize| labels.position.map_or(from + at as u64, |numbers| numbers[at]);
        by_layers(
            &mut tables.iter_mut().collect::<Vec<_>>(),
            ids,
            BLOCK,
            *routing,
            Vec::new,
            |l, at, ids: &mut Vec<I>, slots: &mut Vec<u16>| {
                let at = at as usize;
                let positions = (at..at + ids.len() / top_k).map(position);
                *slots = copies.route(l, ids, top_k, positions, labels.home.map(|numbers| &numbers[at..]));
            },
            |table, at, _, slots| {
                let row_of = |token: usize| labels.row[at as usize + token] as usize;
                of_any_type!(table, table => copies.count(slots, top_k, table, *size, row_of));
            },
        );
        *first += (ids.len() / routing.row()) as u64;
        Ok(())
    }

    /// Load `[layers, rows, devices]`, visits of devices and visits of nodes, which are empty where they were not wanted.
    #[must_use]
    pub fn finish(self) -> [Narrow; 3] {
        let (d, size) = (self.copies.devices, self.size);
        Narrow::columns(self.tables, size, &[0..d, d..size.min(2 * d), size.min(2 * d)..size])
    }

    /// Pairs of neighbouring layers' experts that different devices serve, of every token; the first is token `first` of
    /// the trace.
    #[must_use]
    pub fn apart<I: ExpertId>(&self, ids: &[I], first: u64) -> Vec<u32> {
        let Routing { layers, top_k, .. } = self.routing;
        let row = self.routing.row();
        let mut crossing = vec![0; ids.len() / row];
        let blocks = crossing.par_chunks_mut(BLOCK).zip(ids.par_chunks(BLOCK * row));
        blocks.enumerate().for_each(|(number, (crossing, ids))| {
            let first = first + (number * BLOCK) as u64;
            let mut before: Vec<u16> = Vec::new();
            for l in 0..layers {
                let of_layer = ids.chunks_exact(row).flat_map(|token| &token[l * top_k..][..top_k]);
                let of_layer: Vec<I> = of_layer.copied().collect();
                let mut here = self.copies.route(l, &of_layer, top_k, first.., None);
                for slot in &mut here {
                    *slot = self.copies.device_of_slot[usize::from(*slot)];
                }
                let pairs = before.chunks_exact(top_k).zip(here.chunks_exact(top_k));
                for (crossing, (before, here)) in crossing.iter_mut().zip(pairs) {
                    for device in before {
                        *crossing += here.iter().filter(|&other| other != device).count() as u32;
                    }
                }
                before = here;
            }
        });
        crossing
    }
}
