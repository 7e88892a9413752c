//! Loads of devices in windows of another order of arrival than the trace's.
//!
//! Loads add up, so the trace is read in its own order: every token says where it would have come, and counts in the
//! window of that place. Nothing is put in order, and nothing read twice.

use super::{Copies, Split};
use crate::counting::by_layers;
use crate::error::{Error, Result, room_for};
use crate::trace::{ExpertId, Routing, validate};

/// Counts of one unsigned type, of every layer `[windows, devices]`.
#[derive(Debug)]
pub enum Tables {
    /// Below 2^16.
    U16(Vec<u16>),
    /// Below 2^32.
    U32(Vec<u32>),
    /// All others.
    U64(Vec<u64>),
}

/// Counts the tokens of a placement's devices. Push the shards of a trace in order, then [`Arrival::finish`].
#[derive(Debug)]
pub struct Arrival {
    routing: Routing,
    copies: Copies,
    length: u64,
    windows: usize,
    tokens: u64,
    tables: Tables,
}

impl Arrival {
    /// Nothing counted yet of so many `tokens`, `length` of which make a window. Where copies take turns, whose turn it
    /// is depends on all tokens before: that is an error.
    pub fn new(routing: Routing, copies: Copies, length: u64, tokens: u64) -> Result<Self> {
        if copies.split == Split::RoundRobin && (0..routing.layers).any(|l| !copies.is_single(l)) {
            let rule = "one slot of every expert where copies take turns".into();
            return Err(Error::Shape { what: "slots", rule, found: "copies".into() });
        }
        let windows = tokens.div_ceil(length).max(1) as usize;
        let size = windows.saturating_mul(routing.layers).saturating_mul(copies.devices);
        let most = length.saturating_mul(routing.top_k as u64);
        room_for("windows", &[size, if most < 1 << 16 { 2 } else { 8 }])?;
        let tables = match most {
            0..=0xFFFF => Tables::U16(vec![0; size]),
            0x1_0000..=0xFFFF_FFFF => Tables::U32(vec![0; size]),
            _ => Tables::U64(vec![0; size]),
        };
        Ok(Self { routing, copies, length, windows, tokens, tables })
    }

    /// Windows.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// Counts the next tokens `[tokens, layers, top_k]`, each at its place in the other order.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], places: &[u64], checked: bool) -> Result<()> {
        let tokens = ids.len() / self.routing.row();
        if places.len() != tokens || places.iter().any(|&place| place >= self.tokens) {
            let rule = format!("{tokens} places below {}", self.tokens);
            return Err(Error::Shape { what: "places", rule, found: format!("{} of others", places.len()) });
        }
        if !checked {
            validate(ids, self.routing, 0)?;
        }
        let Self { routing, copies, length, windows, tables, .. } = self;
        let windows_of: Vec<u32> = places.iter().map(|&place| (place / *length) as u32).collect();
        let count = Count { routing: *routing, copies, windows: *windows, places, windows_of: &windows_of };
        match tables {
            Tables::U16(table) => count.add(ids, table, |count| *count += 1),
            Tables::U32(table) => count.add(ids, table, |count| *count += 1),
            Tables::U64(table) => count.add(ids, table, |count| *count += 1),
        }
        Ok(())
    }

    /// Loads `[layers, windows, devices]`.
    #[must_use]
    pub fn finish(self) -> Tables {
        self.tables
    }
}

/// One shard.
struct Count<'a> {
    routing: Routing,
    copies: &'a Copies,
    windows: usize,
    places: &'a [u64],
    windows_of: &'a [u32],
}

/// Tokens whose ids of a layer, devices and windows stay in the first-level cache.
const BLOCK: usize = 1 << 10;

impl Count<'_> {
    fn add<I: ExpertId, T: Send>(&self, ids: &[I], table: &mut [T], more: impl Fn(&mut T) + Sync) {
        let (top_k, devices) = (self.routing.top_k, self.copies.devices);
        let mut layers: Vec<_> = table.chunks_exact_mut(self.windows * devices).collect();
        by_layers(
            &mut layers,
            ids,
            BLOCK,
            self.routing,
            Vec::new,
            |l, at, ids: &mut Vec<I>, slots: &mut Vec<u16>| {
                let places = &self.places[at as usize..][..ids.len() / top_k];
                *slots = self.copies.route(l, ids, top_k, places.iter().copied());
            },
            |table, at, _, slots| {
                for (slots, &window) in slots.chunks_exact(top_k).zip(&self.windows_of[at as usize..]) {
                    let loads = &mut table[window as usize * devices..][..devices];
                    for &slot in slots {
                        more(&mut loads[usize::from(self.copies.device_of_slot[usize::from(slot)])]);
                    }
                }
            },
        );
    }
}
