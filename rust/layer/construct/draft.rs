//! The slots of a layer while they are being filled, light enough to fill one in microseconds.

use crate::layer::{EMPTY, Layer};

/// Where experts may go.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Slots of every device `[D]`.
    pub room: &'a [usize],
    /// Time of every device per token `[D]`.
    pub time: &'a [f64],
    /// Devices where an expert must not be `[E, D]`; empty for none.
    pub forbidden: &'a [bool],
    /// Devices where an expert must have a copy `[E, D]`; empty for none.
    pub pinned: &'a [bool],
    /// Whether slots to spare get more copies than there must be.
    pub copies: bool,
}

impl Site<'_> {
    /// Whether an expert must not be on a device.
    pub(in crate::layer) fn forbids(&self, expert: u16, device: usize) -> bool {
        !self.forbidden.is_empty() && self.forbidden[usize::from(expert) * self.room.len() + device]
    }

    /// Whether an expert's copy must stay on a device.
    pub(in crate::layer) fn pins(&self, expert: u16, device: usize) -> bool {
        !self.pinned.is_empty() && self.pinned[usize::from(expert) * self.room.len() + device]
    }
}

/// The expert of every slot, and what follows from it.
#[derive(Debug)]
pub(in crate::layer) struct Draft<'a> {
    pub(in crate::layer) site: Site<'a>,
    /// Tokens of every expert `[E]`.
    pub(in crate::layer) load: &'a [f64],
    /// First slot of every device, and the number of slots `[D + 1]`.
    first: Vec<usize>,
    /// Expert of every slot `[P]`.
    pub(in crate::layer) expert_in: Vec<u16>,
    /// Copies of every expert `[E]`.
    pub(in crate::layer) copies: Vec<u32>,
    /// Devices of every expert, a bit each `[E, words]`.
    holds: Vec<u64>,
    words: usize,
}

impl<'a> Draft<'a> {
    pub(in crate::layer) fn new(site: Site<'a>, load: &'a [f64]) -> Self {
        let mut first = Vec::with_capacity(site.room.len() + 1);
        let mut slots = 0;
        for &room in site.room {
            first.push(slots);
            slots += room;
        }
        first.push(slots);
        let words = site.room.len().div_ceil(64);
        Self {
            site,
            load,
            first,
            expert_in: vec![EMPTY; slots],
            copies: vec![0; load.len()],
            holds: vec![0; load.len() * words],
            words,
        }
    }

    /// Slots of a device.
    pub(in crate::layer) fn slots(&self, device: usize) -> std::ops::Range<usize> {
        self.first[device]..self.first[device + 1]
    }

    pub(in crate::layer) fn holds(&self, expert: u16, device: usize) -> bool {
        self.holds[usize::from(expert) * self.words + device / 64] >> (device % 64) & 1 == 1
    }

    /// Whether a device may take a copy of an expert, room aside.
    pub(in crate::layer) fn takes(&self, expert: u16, device: usize) -> bool {
        !self.holds(expert, device) && !self.site.forbids(expert, device)
    }

    /// Whether a slot's content, an expert or nothing, may leave it.
    pub(in crate::layer) fn releases(&self, slot: usize, device: usize) -> bool {
        self.expert_in[slot] == EMPTY || !self.site.pins(self.expert_in[slot], device)
    }

    /// What each copy of an expert gets; nothing where there is no expert.
    pub(in crate::layer) fn share(&self, expert: u16) -> f64 {
        if expert == EMPTY {
            0.0
        } else {
            self.load[usize::from(expert)] / f64::from(self.copies[usize::from(expert)])
        }
    }

    /// Devices that hold an expert, rising.
    pub(in crate::layer) fn devices(&self, expert: u16) -> impl Iterator<Item = usize> + '_ {
        let words = &self.holds[usize::from(expert) * self.words..][..self.words];
        words.iter().enumerate().flat_map(|(at, &word)| {
            let rest = |&word: &u64| Some(word & (word - 1)).filter(|&word| word != 0);
            std::iter::successors(Some(word).filter(|&word| word != 0), rest)
                .map(move |word| at * 64 + word.trailing_zeros() as usize)
        })
    }

    /// Replaces what a slot holds, by an expert or by nothing.
    pub(in crate::layer) fn put(&mut self, slot: usize, device: usize, expert: u16) {
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

    /// Time of every device `[D]` and load in every slot `[P]`.
    pub(in crate::layer) fn times_and_loads(&self) -> (Vec<f64>, Vec<f64>) {
        let load_in: Vec<f64> = self.expert_in.iter().map(|&e| self.share(e)).collect();
        let time = |g: usize| load_in[self.slots(g)].iter().sum::<f64>() * self.site.time[g];
        ((0..self.site.room.len()).map(time).collect(), load_in)
    }
}

impl Layer {
    /// Where this layer's experts may go, given the devices' times in the precision that sums need.
    pub(in crate::layer) fn site<'a>(&'a self, time: &'a [f64], copies: bool) -> Site<'a> {
        Site { room: &self.room, time, forbidden: &self.forbidden, pinned: &self.pinned, copies }
    }
}
