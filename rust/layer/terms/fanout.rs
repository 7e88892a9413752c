//! The fanout term: how many devices, and how many nodes, the experts of a token are on.
//!
//! Exact on distinct expert sets. A set is a bit, and an expert a row of bits: the sets that it is in. A device is the OR
//! of its slots' rows, and its ones, weighted with the tokens of their sets, are the tokens that visit it. Every slot
//! knows the OR of the *others* on its device, so an exchange of two experts is judged by counting ones in two ORs.
//!
//! Copies share an expert's tokens evenly. Which of them serves a token is decided by a hash of the token, the same for
//! all experts. So the tokens of a set are cut into parts, the parts are numbered, and part n goes to copy `n % copies`
//! of each of its experts, in the order of devices: this gives the expected fanout of an even split, and comes close for
//! others.

use std::sync::{Arc, LazyLock};

use super::exchange::Pair;
use super::{Candidate, Term, Visits};
use crate::arrays::count_groups;
use crate::layer::slots::Share;
use crate::layer::{EMPTY, Layer, Move, Slots};

/// Bits in a word.
const WORD: usize = 64;
/// Words come in eights, so that vectors are whole.
const WORDS: usize = 8;
/// Parts that a set's tokens are cut into where experts have copies: divisible by most numbers of copies.
const PARTS: u64 = 12;
/// Parts of a token that loads are counted in: sums are whole numbers.
const PER_TOKEN: f64 = 4096.0;
/// A number of tokens that is not known, or too large to be kept.
const UNKNOWN: u32 = u32::MAX;

/// Sets that are built when a search first needs them, so that a search that a time limit leaves out costs nothing.
pub type Lazy = Arc<LazyLock<Sets, Box<dyn FnOnce() -> Sets + Send>>>;

/// Expert sets of a layer, and the cost of their visits.
#[derive(Debug, Clone)]
pub struct Sets {
    /// Words of a row.
    words: usize,
    /// Sets that hold an expert, a bit each `[E + 1, words]`; the last row, of an empty slot, has none.
    rows: Vec<u64>,
    /// Sets whose count of tokens has a bit, bit by bit. Sets are in the order of falling counts, so that those with
    /// a high bit are few and come first.
    planes: Vec<Vec<u64>>,
    /// Tokens of every expert `[E]`, and the same in parts, then those of an empty slot `[E + 1]`.
    tokens_of: Vec<f64>,
    parts_of: Vec<i64>,
    /// Cost of a token's visit of a device, and of a node.
    pub device_cost: f64,
    /// See `device_cost`.
    pub node_cost: f64,
}

impl Sets {
    /// Builds sets from their ids `[N, K]` and tokens `[N]`; `copies` says whether experts may have several copies.
    #[must_use]
    pub fn new(ids: &[u16], counts: &[u64], experts: usize, copies: bool) -> Self {
        let k = if counts.is_empty() { 1 } else { ids.len() / counts.len() };
        let parts_of = |(set, &count): (usize, &u64)| {
            let parts = if copies { PARTS.min(count) } else { count.min(1) };
            (0..parts).map(move |part| (set, count / parts + u64::from(part < count % parts)))
        };
        let mut parts: Vec<(usize, u64)> = counts.iter().enumerate().flat_map(parts_of).collect();
        parts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let words = parts.len().div_ceil(WORD).max(1).next_multiple_of(WORDS);
        let mut rows = vec![0; (experts + 1) * words];
        let highest = parts.first().map_or(0, |&(_, count)| count.checked_ilog2().map_or(0, |bit| bit + 1));
        let mut planes: Vec<Vec<u64>> = (0..highest)
            .map(|bit| {
                let reached = parts.partition_point(|&(_, count)| count >> bit > 0);
                vec![0; reached.div_ceil(WORD).next_multiple_of(WORDS)]
            })
            .collect();
        for (n, &(set, count)) in parts.iter().enumerate() {
            let (word, bit) = (n / WORD, 1 << (n % WORD));
            for &e in &ids[set * k..][..k] {
                rows[usize::from(e) * words + word] |= bit;
            }
            for (b, plane) in planes.iter_mut().enumerate() {
                if count >> b & 1 == 1 {
                    plane[word] |= bit;
                }
            }
        }
        let mut tokens_of = vec![0.0; experts];
        for (ids, &count) in ids.chunks_exact(k.max(1)).zip(counts) {
            for &e in ids {
                tokens_of[usize::from(e)] += count as f64;
            }
        }
        let parts_of = tokens_of.iter().chain([&0.0]).map(|tokens| (tokens * PER_TOKEN) as i64).collect();
        Self { words, rows, planes, tokens_of, parts_of, device_cost: 0.0, node_cost: 0.0 }
    }

    /// Returns sets that `make` builds when they are first needed.
    #[must_use]
    pub fn later(make: impl FnOnce() -> Self + Send + 'static) -> Lazy {
        Arc::new(LazyLock::new(Box::new(make)))
    }

    /// Returns the sets of an expert, a bit each `[words]`; none for an empty slot.
    fn row(&self, expert: u16) -> &[u64] {
        let e = if expert == EMPTY { self.rows.len() / self.words - 1 } else { usize::from(expert) };
        &self.rows[e * self.words..][..self.words]
    }

    /// Returns a share of an expert's tokens, in parts of a token.
    fn load(&self, expert: u16, share: f64) -> i64 {
        libm::rint(self.tokens_of[usize::from(expert)] * share * PER_TOKEN) as i64
    }

    /// Counts the tokens of the sets that are in at least one of the rows.
    fn tokens<const N: usize>(&self, rows: [&[u64]; N]) -> i64 {
        count_tokens(&self.planes, rows)
    }

    /// Adds the sets that a slot serves to a row.
    fn serve(&self, to: &mut [u64], slots: &Slots, slot: usize) {
        let expert = slots.expert_in[slot];
        let (row, copies) = (self.row(expert), slots.copies(expert) as usize);
        if copies < 2 {
            return join(to, row);
        }
        let copy = slots.copies_before(expert, slots.device(slot));
        match PATTERNS.get(copies) {
            Some(patterns) => join_within(to, row, &patterns[copy]),
            None => join_sparsely(to, row, copies, copy),
        }
    }
}

/// Largest number of copies whose patterns are cached.
const CACHED: usize = 16;
/// The [`pattern`] of every copy, by the number of copies.
static PATTERNS: LazyLock<Vec<Vec<Vec<u64>>>> = LazyLock::new(|| {
    (0..=CACHED).map(|copies| (0..copies).map(|copy| pattern(copies, copy)).collect()).collect()
});

/// Returns the parts that a copy serves, a bit each, in as many words as it takes until they repeat.
fn pattern(copies: usize, copy: usize) -> Vec<u64> {
    let mut pattern = vec![0; copies * WORDS];
    join_sparsely(&mut pattern, &vec![u64::MAX; copies * WORDS], copies, copy);
    pattern
}

/// The term: sets that devices and nodes serve, and the tokens that visit them.
#[derive(Debug, Clone)]
pub(crate) struct Fanout<'a> {
    layer: &'a Layer,
    sets: &'a Sets,
    /// True if rows have a price, so that this term computes visits of devices.
    computes_visits: bool,
    words: usize,
    /// Contents that a slot may have: an expert, or nothing, E + 1.
    contents: usize,
    /// Sets that every device serves `[D, words]`.
    device: Vec<u64>,
    /// Sets that the other slots of a slot's device serve `[P, words]`.
    others: Vec<u64>,
    /// Sets that the other devices of a device's node serve `[D, words]`; empty where nodes cost nothing.
    node_others: Vec<u64>,
    /// Tokens that visit a device `[D]`.
    visits: Vec<i64>,
    /// Tokens that visit a node `[N]`; empty where nodes cost nothing.
    node_visits: Vec<i64>,
    /// Tokens that a device serves, each once per expert, in parts `[D]`.
    load: Vec<i64>,
    /// Devices whose visits the last candidate changes, with the visits then.
    visits_then: Vec<(u16, i64)>,
    /// Devices whose sets the move may change that is being applied.
    touched: Vec<u16>,
    /// Tokens that visit a slot's device if the slot holds an expert, or, last, nothing `[P, E + 1]`; [`UNKNOWN`] where it was
    /// not counted since the other slots there changed. Cold searches need the same counts again and again.
    visits_if: Vec<u32>,
}

impl<'a> Fanout<'a> {
    /// Counts the visits of a layer's slots.
    pub(crate) fn new(layer: &'a Layer, sets: &'a Sets, slots: &Slots) -> Self {
        let (d, words) = (layer.devices(), sets.words);
        let tiers = sets.node_cost != 0.0;
        let nodes = count_groups(&layer.site.node);
        let contents = layer.experts + 1;
        let mut fanout = Self {
            layer,
            sets,
            computes_visits: layer.costs.row > 0.0,
            words,
            contents,
            visits_if: vec![UNKNOWN; layer.slots() * contents],
            device: vec![0; d * words],
            others: vec![0; layer.slots() * words],
            node_others: vec![0; if tiers { d * words } else { 0 }],
            visits: vec![0; d],
            node_visits: vec![0; if tiers { nodes } else { 0 }],
            load: vec![0; d],
            visits_then: Vec::new(),
            touched: Vec::new(),
        };
        for Share { expert, device, after, .. } in layer.copies(slots) {
            fanout.load[usize::from(device)] += sets.load(expert, after);
        }
        let all: Vec<u16> = (0..d as u16).collect();
        fanout.refresh(slots, &all);
        fanout
    }

    /// Returns the visits of every device per token of its load `[D]`.
    pub(super) fn visits_per_load(&self) -> Vec<f32> {
        self.visits.iter().zip(&self.load).map(|(&visits, &load)| ratio(visits, load)).collect()
    }

    /// Counts what a move has changed, after the slots have.
    pub(super) fn finish_apply(&mut self, slots: &Slots) {
        let touched = std::mem::take(&mut self.touched);
        self.refresh(slots, &touched);
    }

    /// Writes the visits per token of load after the last candidate, given the shares that it changes.
    fn write_visits(&self, candidate: &Candidate<'_>, visits: &mut Visits) {
        let &Candidate { pair, is_single, shares, .. } = candidate;
        let changed = if self.computes_visits { &self.visits_then[..] } else { &[] };
        for &(device, visits_then) in changed {
            let added_load = if let (Some(&Pair { devices, rows: [a, b] }), true) = (pair, is_single) {
                let enters = self.sets.parts_of[b] - self.sets.parts_of[a];
                if devices[0] == usize::from(device) { enters } else { -enters }
            } else {
                let at_device = shares.iter().filter(|share| share.device == device);
                at_device.map(|share| self.added_load(share)).sum()
            };
            visits.push((device, ratio(visits_then, self.load[usize::from(device)] + added_load)));
        }
    }

    /// Returns what a changed share adds to a device's load, in parts.
    fn added_load(&self, share: &Share) -> i64 {
        self.sets.load(share.expert, share.after) - self.sets.load(share.expert, share.before)
    }

    /// Returns the cost that a move adds.
    fn added(&mut self, &Candidate { slots, step, is_single, .. }: &Candidate<'_>) -> f64 {
        let (layer, sets) = (self.layer, self.sets);
        if let (Move::Swap(p, q), true) = (step, is_single) {
            return self.exchange(slots, [(p, slots.expert_in[q]), (q, slots.expert_in[p])]);
        }
        let mut after = slots.clone();
        after.apply(step);
        let (mut devices, mut nodes) = (0, 0);
        let touched = touched(slots, step);
        let rows: Vec<Vec<u64>> = touched.iter().map(|&g| self.row(slots, &after, g, step)).collect();
        self.visits_then.clear();
        for (row, &device) in rows.iter().zip(&touched) {
            let then = sets.tokens([row]);
            self.visits_then.push((device, then));
            devices += then - self.visits[usize::from(device)];
        }
        for node in self.nodes_of(&touched) {
            let mut sum = vec![0; self.words];
            for g in (0..layer.devices()).filter(|&g| layer.site.node[g] == node) {
                let now = touched.iter().position(|&device| usize::from(device) == g);
                join(&mut sum, now.map_or(&self.device[g * self.words..][..self.words], |at| &rows[at]));
            }
            nodes += sets.tokens([&sum]) - self.node_visits[usize::from(node)];
        }
        price(sets, devices, nodes)
    }

    /// Returns the sets that a device serves after a step.
    fn row(&self, before: &Slots, after: &Slots, device: u16, step: Move) -> Vec<u64> {
        let is_changed = |&slot: &usize| {
            let expert = after.expert_in[slot];
            expert != before.expert_in[slot] || before.edits(step).any(|edit| edit.expert == expert)
        };
        let slots = after.of(usize::from(device));
        let mut changed = slots.clone().filter(is_changed);
        let (mut row, first) = (vec![0; self.words], changed.next());
        if let (Some(slot), None) = (first, changed.next()) {
            // The other slots serve what they did before.
            row.copy_from_slice(&self.others[slot * self.words..][..self.words]);
            self.sets.serve(&mut row, after, slot);
        } else {
            slots.for_each(|slot| self.sets.serve(&mut row, after, slot));
        }
        row
    }

    /// Returns the nodes of devices; none where nodes cost nothing.
    fn nodes_of(&self, devices: &[u16]) -> Vec<u16> {
        let visited = if self.node_others.is_empty() { &[] } else { devices };
        let mut nodes: Vec<u16> =
            visited.iter().map(|&device| self.layer.site.node[usize::from(device)]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Counts touched devices, and their nodes, in the slots `after` a move.
    fn refresh(&mut self, after: &Slots, touched: &[u16]) {
        let (layer, sets, words) = (self.layer, self.sets, self.words);
        let mut sum = vec![0; words];
        for &device in touched {
            let g = usize::from(device);
            let range = after.of(g);
            self.visits_if[range.start * self.contents..range.end * self.contents].fill(UNKNOWN);
            // Forwards and backwards, so that every slot gets the others before and behind it.
            sum.fill(0);
            for slot in range.clone() {
                self.others[slot * words..][..words].copy_from_slice(&sum);
                sets.serve(&mut sum, after, slot);
            }
            self.device[g * words..][..words].copy_from_slice(&sum);
            sum.fill(0);
            for slot in range.rev() {
                join(&mut self.others[slot * words..][..words], &sum);
                sets.serve(&mut sum, after, slot);
            }
            self.visits[g] = sets.tokens([&sum]);
        }
        for node in self.nodes_of(touched) {
            let members: Vec<usize> = (0..layer.devices()).filter(|&g| layer.site.node[g] == node).collect();
            for &g in &members {
                let node_others = &mut self.node_others[g * words..][..words];
                node_others.fill(0);
                for &h in members.iter().filter(|&&h| h != g) {
                    join(node_others, &self.device[h * words..][..words]);
                }
            }
            let g = members[0];
            let rows = [&self.device, &self.node_others].map(|rows| &rows[g * words..][..words]);
            self.node_visits[usize::from(node)] = sets.tokens(rows);
        }
    }

    /// Returns the cost that is added if two slots get these experts, which have no other copies.
    fn exchange(&mut self, slots: &Slots, new: [(usize, u16); 2]) -> f64 {
        let (layer, sets, words) = (self.layer, self.sets, self.words);
        let (mut devices, mut nodes) = (0, 0);
        let [first, second] = new.map(|(slot, _)| slots.device(slot));
        let changes_nodes = layer.site.node[first] != layer.site.node[second] && !self.node_others.is_empty();
        self.visits_then.clear();
        for (slot, expert) in new {
            let g = slots.device(slot);
            let (others, row) = (&self.others[slot * words..][..words], sets.row(expert));
            let visits_if =
                &mut self.visits_if[slot * self.contents + usize::from(expert).min(self.contents - 1)];
            let visits = if *visits_if == UNKNOWN {
                let visits = sets.tokens([others, row]);
                *visits_if = u32::try_from(visits).unwrap_or(UNKNOWN);
                visits
            } else {
                i64::from(*visits_if)
            };
            self.visits_then.push((g as u16, visits));
            devices += visits - self.visits[g];
            // An exchange within a node does not change the visits of the node.
            if changes_nodes {
                let node_others = &self.node_others[g * words..][..words];
                nodes += sets.tokens([others, row, node_others])
                    - self.node_visits[usize::from(layer.site.node[g])];
            }
        }
        price(sets, devices, nodes)
    }
}

impl Term for Fanout<'_> {
    fn cost(&self) -> f64 {
        price(self.sets, self.visits.iter().sum(), self.node_visits.iter().sum())
    }

    fn change(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) -> f64 {
        let change = self.added(candidate);
        self.write_visits(candidate, visits);
        change
    }

    fn apply(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) {
        if self.computes_visits {
            // The visits are computed again: other candidates may have been priced since.
            self.added(candidate);
            self.write_visits(candidate, visits);
        }
        for share in candidate.shares {
            self.load[usize::from(share.device)] += self.added_load(share);
        }
        self.touched = touched(candidate.slots, candidate.step);
    }

    fn needs_shares(&self, are_single: bool) -> bool {
        self.computes_visits && !are_single
    }
}

/// Returns the devices whose sets a move may change: those of all copies of the experts that it moves.
fn touched(slots: &Slots, step: Move) -> Vec<u16> {
    let mut touched = Vec::with_capacity(8);
    for edit in slots.edits(step) {
        touched.extend(slots.devices(edit.expert));
        touched.extend(edit.to);
    }
    touched.sort_unstable();
    touched.dedup();
    touched
}

/// Returns visits per token of a load in parts.
fn ratio(visits: i64, load: i64) -> f32 {
    if load > 0 { (visits as f64 * PER_TOKEN / load as f64) as f32 } else { 0.0 }
}

/// Returns the cost of so many visits of devices and nodes.
fn price(sets: &Sets, devices: i64, nodes: i64) -> f64 {
    devices as f64 * sets.device_cost + nodes as f64 * sets.node_cost
}

/// Adds the bits of a row.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn join(to: &mut [u64], row: &[u64]) {
    for (to, &row) in to.iter_mut().zip(row) {
        *to |= row;
    }
}

/// Adds the bits of a row that a pattern has; the pattern repeats.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn join_within(to: &mut [u64], row: &[u64], pattern: &[u64]) {
    // Indices, as in `count_tokens`: short slices of iterators take longer than what is done with them.
    let (mut first, row) = (0, &row[..to.len()]);
    while first < to.len() {
        let n = pattern.len().min(to.len() - first);
        let (to, row, pattern) = (&mut to[first..][..n], &row[first..][..n], &pattern[..n]);
        for word in 0..n {
            to[word] |= row[word] & pattern[word];
        }
        first += n;
    }
}

/// Adds the bits of a row that a copy serves: those whose number leaves `copy` when it is divided by `copies`.
fn join_sparsely(to: &mut [u64], row: &[u64], copies: usize, copy: usize) {
    let multiples = (0..WORD).step_by(copies).fold(0u64, |word, n| word | 1 << n);
    // The first bit of the word that is served, from its lowest one on; none of this word if it is beyond.
    let (mut first, step) = (copy, WORD % copies);
    for (to, &row) in to.iter_mut().zip(row) {
        if first < WORD {
            *to |= row & multiples << first;
        }
        first = if first < step { first + copies - step } else { first - step };
    }
}

/// Counts tokens, bit by bit of their counts, of the sets that are in at least one of the rows; planes may be shorter than rows.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512bw+avx512vpopcntdq+avx2+popcnt",
    "x86_64+avx2+popcnt"
))]
fn count_tokens<const N: usize>(planes: &[Vec<u64>], rows: [&[u64]; N]) -> i64 {
    let mut tokens = 0;
    for (bit, plane) in planes.iter().enumerate() {
        let n = plane.len();
        // No closure: it would be compiled for these instruction sets, and `map` for none, so neither into the other.
        let mut rows = rows;
        for row in &mut rows {
            *row = &row[..n];
        }
        let mut ones = 0;
        for word in 0..n {
            let mut any = 0;
            for row in rows {
                any |= row[word];
            }
            ones += i64::from((any & plane[word]).count_ones());
        }
        tokens += ones << bit;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Sets, WORD};
    use crate::layer::Slots;
    use crate::random::choose_copy;

    proptest! {
        /// Every part of a set is served by the copy that its number chooses, in the order of devices, however many there are.
        #[test]
        fn parts_are_served_in_turns(devices in 2usize..200, held in any::<[u64; 4]>(), sets in 1usize..1500) {
            let holds = |device: usize| held[device / 64] >> (device % 64) & 1 == 1;
            let contents: Vec<u16> = (0..devices).map(|device| u16::from(!holds(device))).collect();
            let slots = Slots::new(&vec![1; devices], 2, &contents);
            let all = Sets::new(&vec![0; sets], &vec![1; sets], 2, true);
            for device in (0..devices).filter(|&device| holds(device)) {
                let copy = (0..device).filter(|&other| holds(other)).count();
                let mut row = vec![0; all.words];
                all.serve(&mut row, &slots, device);
                for n in 0..sets {
                    let is_served = row[n / WORD] >> (n % WORD) & 1 == 1;
                    prop_assert_eq!(is_served, choose_copy(n, slots.copies(0) as usize) == copy, "{}", n);
                }
            }
        }
    }
}
