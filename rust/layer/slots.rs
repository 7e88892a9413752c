//! The experts in the slots of a layer, and the moves that change them.

use std::ops::Range;

use super::{Site, Split};
use crate::arrays::prefix_sums;

/// Content of an empty slot.
pub const EMPTY: u16 = u16::MAX;

/// A change of one or two slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Two slots of different devices exchange what they hold.
    Swap(usize, usize),
    /// A slot's content is replaced by another copy of an expert, or by nothing.
    Put(usize, u16),
}

/// The change of one expert by a move: a copy leaves a device, appears on one, or both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edit {
    pub(crate) expert: u16,
    pub(crate) from: Option<u16>,
    pub(crate) to: Option<u16>,
}

/// The change of a device's share of an expert's tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) expert: u16,
    pub(crate) device: u16,
    pub(crate) before: f64,
    pub(crate) after: f64,
}

/// The expert of every slot, and the devices of every expert; small enough to fill a layer in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// Expert of every slot `[P]`; slots are numbered device by device.
    pub expert_in: Vec<u16>,
    /// Device of every slot `[P]`.
    device_of: Vec<u16>,
    /// First slot of every device, and the number of slots `[D + 1]`.
    first: Vec<usize>,
    /// Copies of every expert `[E]`.
    pub(crate) copies: Vec<u32>,
    /// Devices of every expert, a bit for each of them `[E, words]`.
    holds: Vec<u64>,
    words: usize,
}

impl Slots {
    /// Builds empty slots from the capacity of every device `[D]`.
    #[must_use]
    pub fn empty(capacity: &[usize], experts: usize) -> Self {
        let first = prefix_sums(capacity.iter().copied());
        let slots = first[capacity.len()];
        let mut device_of = Vec::with_capacity(slots);
        for (device, &slots) in (0u16..).zip(capacity) {
            device_of.resize(device_of.len() + slots, device);
        }
        let words = capacity.len().div_ceil(64);
        let (copies, holds) = (vec![0; experts], vec![0; experts * words]);
        Self { expert_in: vec![EMPTY; slots], device_of, first, copies, holds, words }
    }

    /// Builds slots from the expert of each `[P]`; second copies on a device, and ids of no expert, leave a slot empty.
    #[must_use]
    pub fn new(capacity: &[usize], experts: usize, contents: &[u16]) -> Self {
        let mut slots = Self::empty(capacity, experts);
        for (slot, &expert) in contents.iter().enumerate() {
            if usize::from(expert) < experts && !slots.holds(expert, slots.device(slot)) {
                slots.put(slot, expert);
            }
        }
        slots
    }

    /// Returns the slots of a device.
    pub(crate) fn of(&self, device: usize) -> Range<usize> {
        self.first[device]..self.first[device + 1]
    }

    /// Returns the device of a slot.
    #[inline(always)]
    pub(crate) fn device(&self, slot: usize) -> usize {
        usize::from(self.device_of[slot])
    }

    /// Returns the number of copies of an expert; 0 for an empty slot.
    #[inline(always)]
    pub(crate) fn copies(&self, expert: u16) -> u32 {
        if expert == EMPTY { 0 } else { self.copies[usize::from(expert)] }
    }

    /// Returns whether a device holds an expert.
    #[inline(always)]
    pub(crate) fn holds(&self, expert: u16, device: usize) -> bool {
        self.holds[usize::from(expert) * self.words + device / 64] >> (device % 64) & 1 == 1
    }

    /// Iterates over the devices that hold an expert, in rising order.
    pub fn devices(&self, expert: u16) -> impl Iterator<Item = u16> + Clone + '_ {
        let words = &self.holds[usize::from(expert) * self.words..][..self.words];
        words.iter().enumerate().flat_map(|(at, &word)| {
            // Clears the lowest bit.
            let rest = |&word: &u64| Some(word & (word - 1)).filter(|&word| word != 0);
            std::iter::successors(Some(word).filter(|&word| word != 0), rest)
                .map(move |word| (at * 64) as u16 + word.trailing_zeros() as u16)
        })
    }

    /// Returns how many copies of an expert are on devices before a device.
    pub(crate) fn copies_before(&self, expert: u16, device: usize) -> usize {
        let words = &self.holds[usize::from(expert) * self.words..][..=device / 64];
        let last = words[device / 64] & ((1 << (device % 64)) - 1);
        let before = words[..device / 64].iter().chain([&last]);
        before.map(|word| word.count_ones() as usize).sum()
    }

    /// Iterates over the slots that hold an expert, in rising order.
    pub(crate) fn slots_with(&self, expert: u16) -> impl Iterator<Item = usize> + '_ {
        let slot = move |device| self.of(usize::from(device)).find(|&slot| self.expert_in[slot] == expert);
        self.devices(expert).filter_map(slot)
    }

    /// Returns whether an edit keeps the rules of a layer, and puts no second copy on a device.
    #[inline(always)]
    fn may(&self, site: &Site, edit: Edit) -> bool {
        let is_new = edit.to.is_none_or(|device| !self.holds(edit.expert, usize::from(device)));
        is_new && site.rules.allows(edit, self, site)
    }

    /// Returns whether a device may take one more copy of an expert, if it has a slot for it.
    #[inline(always)]
    pub(crate) fn may_take(&self, site: &Site, expert: u16, device: usize) -> bool {
        self.may(site, Edit { expert, from: None, to: Some(device as u16) })
    }

    /// Returns whether an expert lacks a copy that it must have.
    #[inline(always)]
    pub(crate) fn is_short(&self, site: &Site, expert: u16) -> bool {
        site.rules.lacks_copy(expert, self)
    }

    /// Returns whether a slot's content, a copy or nothing, may be removed.
    #[inline(always)]
    pub(crate) fn may_lose(&self, site: &Site, slot: usize) -> bool {
        let expert = self.expert_in[slot];
        expert == EMPTY || self.may(site, Edit { expert, from: Some(self.device_of[slot]), to: None })
    }

    /// Returns whether a slot's content, a copy or nothing, may go to another device, if that has a slot for it.
    #[inline(always)]
    pub(crate) fn may_move(&self, site: &Site, slot: usize, device: usize) -> bool {
        let (expert, from) = (self.expert_in[slot], Some(self.device_of[slot]));
        expert == EMPTY || self.may(site, Edit { expert, from, to: Some(device as u16) })
    }

    /// Replaces the content of a slot by an expert or by nothing.
    #[inline(always)]
    pub(crate) fn put(&mut self, slot: usize, expert: u16) {
        let device = self.device(slot);
        let bit = 1 << (device % 64);
        let old = std::mem::replace(&mut self.expert_in[slot], expert);
        if old != EMPTY {
            self.copies[usize::from(old)] -= 1;
            self.holds[usize::from(old) * self.words + device / 64] &= !bit;
        }
        if expert != EMPTY {
            self.copies[usize::from(expert)] += 1;
            self.holds[usize::from(expert) * self.words + device / 64] |= bit;
        }
    }

    /// Iterates over the edits of a move; an empty slot has none.
    #[inline(always)]
    pub(crate) fn edits(&self, step: Move) -> impl Iterator<Item = Edit> + use<> {
        let (p, a) = match step {
            Move::Swap(p, _) | Move::Put(p, _) => (p, self.expert_in[p]),
        };
        let g = Some(self.device_of[p]);
        let edits = match step {
            Move::Swap(_, q) => {
                let h = Some(self.device_of[q]);
                [Edit { expert: a, from: g, to: h }, Edit { expert: self.expert_in[q], from: h, to: g }]
            }
            Move::Put(_, b) => [Edit { expert: a, from: g, to: None }, Edit { expert: b, from: None, to: g }],
        };
        edits.into_iter().filter(|edit| edit.expert != EMPTY)
    }

    /// Returns whether a move changes the slots and keeps all rules but the cap.
    #[inline(always)]
    #[must_use]
    pub fn allows(&self, site: &Site, step: Move) -> bool {
        match step {
            Move::Swap(p, q) => {
                let (g, h) = (self.device(p), self.device(q));
                let changes = g != h && self.expert_in[p] != self.expert_in[q];
                changes && self.may_move(site, p, h) && self.may_move(site, q, g)
            }
            Move::Put(p, b) => {
                let changes = self.expert_in[p] != b;
                changes && self.may_lose(site, p) && (b == EMPTY || self.may_take(site, b, self.device(p)))
            }
        }
    }

    /// Applies a move that is allowed.
    #[inline(always)]
    pub(crate) fn apply(&mut self, step: Move) {
        match step {
            Move::Swap(p, q) => {
                let (a, b) = (self.expert_in[p], self.expert_in[q]);
                self.put(p, EMPTY);
                self.put(q, a);
                self.put(p, b);
            }
            Move::Put(p, b) => self.put(p, b),
        }
    }

    /// Writes into `shares` which shares of experts' tokens a move changes; `devices` is scratch memory.
    #[inline]
    pub(crate) fn shares(&self, site: &Site, step: Move, shares: &mut Vec<Share>, devices: &mut Vec<u16>) {
        shares.clear();
        for Edit { expert, from, to } in self.edits(step) {
            let copies = self.copies(expert);
            if let (Some(from), Some(to), true) = (from, to, copies == 1 || site.split != Split::Nearest) {
                let share = 1.0 / f64::from(copies);
                shares.push(Share { expert, device: from, before: share, after: 0.0 });
                shares.push(Share { expert, device: to, before: 0.0, after: share });
                continue;
            }
            devices.clear();
            devices.extend(self.devices(expert));
            devices.extend(self.devices(expert).filter(|&device| Some(device) != from).chain(to));
            let (before, after) = devices.split_at(copies as usize);
            for &device in before {
                let was = site.share(before, device);
                let then = if Some(device) == from { 0.0 } else { site.share(after, device) };
                if was.to_bits() != then.to_bits() {
                    shares.push(Share { expert, device, before: was, after: then });
                }
            }
            if let Some(device) = to {
                shares.push(Share { expert, device, before: 0.0, after: site.share(after, device) });
            }
        }
    }

    /// Returns the load of each copy of an expert under an even split of loads `[E]`; 0 for an empty slot.
    pub(crate) fn load_per_copy(&self, load: &[f64], expert: u16) -> f64 {
        if expert == EMPTY { 0.0 } else { load[usize::from(expert)] / f64::from(self.copies(expert)) }
    }

    /// Computes the time of every device `[D]` and the load of every slot `[P]`, from loads `[E]`.
    pub(crate) fn times_and_loads(&self, site: &Site, load: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let load_in: Vec<f64> = self.expert_in.iter().map(|&e| self.load_per_copy(load, e)).collect();
        let time = |g: usize| load_in[self.of(g)].iter().sum::<f64>() * site.time[g];
        ((0..site.devices()).map(time).collect(), load_in)
    }

    /// Returns whether an expert is not on a device, so that it has to move there.
    #[inline(always)]
    pub(crate) fn lacks(&self, expert: u16, device: usize) -> bool {
        expert != EMPTY && !self.holds(expert, device)
    }

    /// Counts the copies on devices that do not hold them in `running`.
    pub(crate) fn moved_from(&self, running: &Self) -> i64 {
        let is_moved = |&slot: &usize| running.lacks(self.expert_in[slot], self.device(slot));
        (0..self.expert_in.len()).filter(is_moved).count() as i64
    }

    /// Counts the copies that a move brings to devices that do not hold them in `running`, less those that it takes back.
    pub(crate) fn brings(&self, running: &Self, step: Move) -> i64 {
        let is_new = |expert: u16, device: Option<u16>| {
            i64::from(device.is_some_and(|device| running.lacks(expert, usize::from(device))))
        };
        self.edits(step).map(|edit| is_new(edit.expert, edit.to) - is_new(edit.expert, edit.from)).sum()
    }

    /// Returns new contents of slots `[P]`, ordered so that what stays on a device keeps the slot that it has here.
    #[must_use]
    pub fn keep_slots(&self, contents: &[u16]) -> Vec<u16> {
        let mut ordered = vec![EMPTY; contents.len()];
        for slots in self.first.windows(2).map(|ends| ends[0]..ends[1]) {
            let mut arrivals = vec![];
            for &e in contents[slots.clone()].iter().filter(|&&e| e != EMPTY) {
                match slots.clone().find(|&slot| self.expert_in[slot] == e) {
                    Some(slot) => ordered[slot] = e,
                    None => arrivals.push(e),
                }
            }
            let free = ordered[slots].iter_mut().filter(|slot| **slot == EMPTY);
            free.zip(arrivals).for_each(|(slot, e)| *slot = e);
        }
        ordered
    }
}
