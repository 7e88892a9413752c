//! Replays a trace under a placement, token by token: load of devices, traffic between them, and fanout.
//!
//! Every token has a label with the row that it counts in, for example its window in some order of arrival, or its home.
//! Counts add up, so a trace is read once and in its own order.
//!
//! Results depend on how many of its experts a token has on a device, not on which. These numbers are counted as bits
//! ([`planes`]) where tokens of one row follow each other, otherwise token by token ([`tokens`]).

pub mod copies;
pub mod expected;
mod planes;
pub mod sides;
mod tokens;

pub use copies::{Copies, Split};

use planes::Planes;
use tokens::Served;

use crate::counting::by_layers;
use crate::counting::pairs::{Cuts, SHORT_BLOCK, Side, block};
use crate::counting::windows::{Narrow, of_any_type};
use crate::error::{Error, Result, room_for};
use crate::trace::{ExpertId, Routing, validate};

/// Counts that are wanted beside the load of devices.
// Each of them may be wanted alone.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Visits of devices and of nodes.
    pub visits: bool,
    /// Pairs of neighbouring layers' experts by their devices, summed over rows.
    pub pairs: bool,
    /// Pairs of neighbouring layers' experts on one device, by row.
    pub stays: bool,
    /// Load of slots; it includes visits.
    pub slots: bool,
}

/// Labels of tokens.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// Row that every token counts in `[T]`.
    pub row: &'a [u32],
    /// Position of every token `[T]`, whose hash chooses between copies; by default the token's number in the trace.
    pub position: Option<&'a [u64]>,
    /// Home of every token `[T]`, from which the nearest copy is chosen; by default a device that the hash chooses.
    pub home: Option<&'a [u16]>,
}

/// Replays a trace shard by shard. Push its shards in order, then [`Replay::finish`].
#[derive(Debug)]
pub struct Replay {
    routing: Routing,
    copies: Copies,
    wanted: Wanted,
    /// None if there are too many devices, or if no wanted count is faster by bits.
    planes: Option<Planes>,
    /// Columns of a row: load of devices and, where wanted, visits of devices, visits of nodes and load of slots.
    size: usize,
    rows: usize,
    tokens: u64,
    layers: Vec<LayerCounts>,
}

/// Counts of a layer; those that are not wanted are empty.
#[derive(Debug)]
struct LayerCounts {
    /// Load and, where wanted, visits of devices, visits of nodes and load of slots `[rows, size]`.
    table: Narrow,
    /// Pairs of an expert of the layer before and one of this layer on one device `[rows]`.
    stays: Vec<u64>,
    /// Pairs of columns of the layer before and of this one, where columns are bits of the planes or slots; empty in the first
    /// layer.
    pairs: Vec<u64>,
}

/// Counts of a trace under a placement; those that are not wanted are empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Tokens that arrive at every device, once per expert `[R, L, D]`.
    pub load: Narrow,
    /// Tokens with at least one expert on the device `[R, L, D]`. Their sum is the fanout of all tokens.
    pub visits: Narrow,
    /// Tokens with at least one expert on the node `[R, L, N]`.
    pub node_visits: Narrow,
    /// Tokens of every slot `[R, L, P]`.
    pub slots: Narrow,
    /// Pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`.
    pub traffic: Vec<u64>,
    /// Pairs of neighbouring layers' experts on one device `[R]`.
    pub stays: Vec<u64>,
}

/// Least mean length of a run of tokens in one row for which bits are faster than single tokens (measured:
/// docs/experiments.md, Counting and replay).
const RUN: usize = 512;

/// Largest number of devices for which load alone is counted by bits: with more devices single ids are as fast.
const FEW_DEVICES: usize = 64;

impl Replay {
    /// Builds a replay without tokens, with so many `rows`, none of which gets more than `largest` tokens.
    pub fn new(routing: Routing, copies: Copies, rows: usize, largest: u64, wanted: Wanted) -> Result<Self> {
        let is_counted = wanted.visits || wanted.pairs || wanted.stays || copies.devices <= FEW_DEVICES;
        let is_counted = is_counted && !wanted.slots;
        let planes = if is_counted { Planes::new(&copies, routing) } else { None };
        let mut size = copies.devices;
        if wanted.visits || wanted.slots {
            size += copies.devices + copies.nodes();
        }
        if wanted.slots {
            size += copies.slots;
        }
        let columns = planes.as_ref().map_or(copies.slots, Planes::columns);
        let table = if wanted.pairs { columns * columns } else { 0 };
        let devices = if wanted.pairs { copies.devices * copies.devices } else { 0 };
        room_for("traffic", &[routing.layers - 1, table.saturating_add(devices), 8])?;
        let count = Narrow::zeros(largest.saturating_mul(routing.top_k as u64), 1);
        // At the end the tables of all layers are copied into one.
        room_for("rows", &[rows, routing.layers, size, 2 * count.width()])?;
        let layers = (0..routing.layers).map(|l| LayerCounts {
            table: count.zeros_like(rows * size),
            stays: vec![0; if wanted.stays { rows } else { 0 }],
            pairs: vec![0; if l > 0 { table } else { 0 }],
        });
        Ok(Self { layers: layers.collect(), routing, copies, wanted, planes, size, rows, tokens: 0 })
    }

    /// Replays the next tokens `[tokens, layers, top_k]` with their labels.
    ///
    /// Tokens that are `checked` have passed [`validate`] and cannot have changed since. Copies that take turns do so in the
    /// order in which tokens are pushed.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], labels: Labels<'_>, checked: bool) -> Result<()> {
        let Self { routing, copies, wanted, planes, size, tokens, layers, .. } = self;
        let (row, top_k, size) = (routing.row(), routing.top_k, *size);
        if labels.row.len() != ids.len() / row {
            return Err(Error::shape("rows", format!("{} tokens", ids.len() / row), &labels.row.len()));
        }
        if !checked {
            validate(ids, *routing, *tokens)?;
        }
        let runs = labels.row.chunk_by(|row, next| row == next).count();
        let in_runs = planes.as_ref().filter(|_| runs * RUN <= labels.row.len());
        // If there are bits, pairs are counted by them, however short runs are.
        let planes = if wanted.pairs { planes.as_ref() } else { in_runs };
        let pairs_of_slots = wanted.pairs && planes.is_none();
        let columns = planes.map_or(copies.slots, Planes::columns);
        let words = tokens::words(copies.devices, labels.row.len(), runs, top_k);
        let words = if wanted.visits && !wanted.slots { words } else { 0 };
        let together = if pairs_of_slots { block(copies.slots, top_k) } else { SHORT_BLOCK };
        // The copy that has its turn in a block depends on the block before.
        let step = if copies.takes_turns() { together } else { labels.row.len().max(1) };
        for (first, ids) in (0..).step_by(step).zip(ids.chunks(step * row)) {
            let start = *tokens + first as u64;
            by_layers(
                layers,
                ids,
                together,
                *routing,
                || (Side::new(top_k, columns), Served::default()),
                |l, at, ids: &mut Vec<I>, (side, served): &mut (Side<u16>, Served)| {
                    let (at, single) = (at as usize, copies.is_single(l));
                    if !single || (in_runs.is_none() && (wanted.slots || pairs_of_slots)) {
                        let begin = first + at;
                        let number = |token| start + (at + token) as u64;
                        let position =
                            |token| labels.position.map_or(number(token), |all| all[begin + token]);
                        let positions = (0..ids.len() / top_k).map(position);
                        served.slots =
                            copies.route(l, ids, top_k, positions, labels.home.map(|all| &all[begin..]));
                    }
                    match in_runs {
                        Some(_) => {}
                        None if single => served.find_devices(ids, &copies.device_of_expert[l], top_k, words),
                        None => served.find_devices_of_slots(copies, top_k, words),
                    }
                    match planes {
                        Some(planes) if single => planes.fill(l, ids, side),
                        Some(planes) => planes.fill(l, &served.slots, side),
                        None if pairs_of_slots => side.fill(&mut served.slots.clone(), Cuts::NONE),
                        None => {}
                    }
                },
                |LayerCounts { table, stays, pairs }, at, before, (side, served)| {
                    if let Some((before, _)) = before.filter(|_| !pairs.is_empty()) {
                        side.count_pairs(Some((before, pairs)), None, false);
                    }
                    let rows = &labels.row[first + at as usize..];
                    let before = before.filter(|_| !stays.is_empty());
                    of_any_type!(table, table => if let Some(planes) = in_runs {
                        let before = before.map(|(side, _)| side);
                        planes.count(side, before, rows, copies, (&mut **table, size), stays);
                    } else {
                        let before = before.map(|(_, served)| served);
                        served.count(before, rows, copies, (&mut **table, size), stays, words);
                    });
                },
            );
            copies.count_served(ids, *routing);
        }
        *tokens += labels.row.len() as u64;
        Ok(())
    }

    /// Returns the counts of all tokens.
    #[must_use]
    pub fn finish(self) -> Tally {
        let Self { routing, copies, wanted, planes, size, rows, layers, .. } = self;
        let d = copies.devices;
        let of_slot = || copies.device_of_slot.iter().map(|&device| (usize::from(device), 1)).collect();
        // The device of every column, and the weight of a count in it.
        let columns: Vec<(usize, u64)> = planes.map_or_else(of_slot, |planes| planes.weights());
        let mut traffic = vec![0; if wanted.pairs { (routing.layers - 1) * d * d } else { 0 }];
        for (traffic, LayerCounts { pairs, .. }) in traffic.chunks_exact_mut(d * d).zip(&layers[1..]) {
            for (&(from, weight), row) in columns.iter().zip(pairs.chunks_exact(columns.len())) {
                for (&(to, times), count) in columns.iter().zip(row) {
                    traffic[from * d + to] += weight * times * count;
                }
            }
        }
        let mut stays = vec![0; if wanted.stays { rows } else { 0 }];
        for layer in &layers {
            stays.iter_mut().zip(&layer.stays).for_each(|(all, stays)| *all += stays);
        }
        let visits = d..size.min(2 * d);
        let nodes = visits.end..size.min(visits.end + copies.nodes());
        let columns = [0..d, visits, nodes.clone(), nodes.end..size];
        let tables: Vec<Narrow> = layers.into_iter().map(|layer| layer.table).collect();
        let [load, visits, node_visits, slots] = Narrow::columns(&tables, rows, size, &columns);
        Tally { load, visits, node_visits, slots, traffic, stays }
    }
}
