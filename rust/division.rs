//! Division of every window's tokens over copies so that the slowest device takes the least time, as by a linear programme.
//!
//! The least time is `max over sets of devices of (load of experts whose copies are all in the set) / (rate of the set)`
//! (Hall, 1935). It is found from below (Newton's steps on the parameter, Dinkelbach 1967): while a device has more tokens
//! than it can serve in a time that is too short, tokens move to other copies, device by device, along the shortest path to a
//! device with spare time (Edmonds and Karp, 1972). If there is no path, the devices that were reached are a set that needs
//! longer. When copies change, the flow is kept as a start: the move of a copy changes little of it.
//!
//! A search of layers minimises that time. A replay needs the tokens of all devices as well. There the slowest of the other
//! devices also takes the least time, and so on without that one ([`Division::level_all`]). This answer is unique, however
//! devices are numbered.

use rayon::prelude::*;

/// Relative error of sums of floats.
const ROUNDING: f64 = 1e-11;
/// Largest number of Newton's steps, and of paths in each. Every step finds a set that needs strictly longer; few steps occur.
const STEPS: usize = 100;
const PATHS: usize = 100_000;
/// Content of an empty slot.
const EMPTY: u32 = u32::MAX;

/// The copies of a layer: slots of every expert, on each device at most once.
#[derive(Debug, Clone)]
pub struct Copies {
    /// Expert of every slot `[P]`; slots are numbered device by device.
    expert_in: Vec<u32>,
    /// Device of every slot `[P]`, and the first slot of every device, with the number of slots `[D + 1]`.
    device: Vec<u32>,
    first: Vec<usize>,
    /// Slots of every expert `[E]`.
    slots: Vec<Vec<u32>>,
    /// Tokens that a device serves per time `[D]`.
    rate: Vec<f64>,
}

impl Copies {
    /// Builds devices with so many slots each `[D]`, all of them empty.
    #[must_use]
    pub fn empty(capacity: impl Iterator<Item = usize>, experts: usize, rate: Vec<f64>) -> Self {
        let (mut first, mut device) = (vec![0], vec![]);
        for (number, slots) in (0..).zip(capacity) {
            device.resize(device.len() + slots, number);
            first.push(device.len());
        }
        Self { expert_in: vec![EMPTY; device.len()], device, first, slots: vec![vec![]; experts], rate }
    }

    /// Builds copies from the expert of every slot `[D, S]`; ids of no expert and second copies on a device leave a slot empty.
    #[must_use]
    pub fn new(slots: &[i32], width: usize, experts: usize, rate: &[f64]) -> Self {
        let mut copies = Self::empty(rate.iter().map(|_| width), experts, rate.to_vec());
        for (slot, &expert) in slots.iter().enumerate() {
            if let Some(expert) = u32::try_from(expert).ok().filter(|&expert| (expert as usize) < experts) {
                let is_on = |&other: &u32| copies.device[other as usize] == copies.device[slot];
                if !copies.slots[expert as usize].iter().any(is_on) {
                    copies.put(slot, Some(expert));
                }
            }
        }
        copies
    }

    /// Replaces the content of a slot by an expert or by nothing.
    pub fn put(&mut self, slot: usize, expert: Option<u32>) {
        let before = std::mem::replace(&mut self.expert_in[slot], expert.unwrap_or(EMPTY));
        if before != EMPTY {
            self.slots[before as usize].retain(|&other| other as usize != slot);
        }
        if let Some(expert) = expert {
            self.slots[expert as usize].push(slot as u32);
        }
    }

    /// Returns the expert in a slot, if any.
    #[must_use]
    pub fn expert(&self, slot: usize) -> Option<u32> {
        Some(self.expert_in[slot]).filter(|&expert| expert != EMPTY)
    }
}

/// A division of a window's tokens over the copies of a layer.
#[derive(Debug, Clone)]
pub struct Division {
    /// Tokens of every slot `[P]`, and of every device `[D]`.
    served: Vec<f64>,
    tokens: Vec<f64>,
    /// Tokens of all devices.
    total: f64,
    /// Time of the slowest device, and the devices that take it.
    time: f64,
    slowest: Vec<u32>,
}

/// Scratch memory of divisions, shared by all windows.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    /// The slot from which a device was reached, and the slot on it `[D]`; devices in the order in which they were reached.
    via: Vec<[u32; 2]>,
    reached: Vec<u32>,
    /// Slots whose tokens have changed, their tokens before, and the tokens of their devices before.
    changed: Vec<(u32, f64, f64)>,
    /// Time of the slowest device in the division at hand, and the devices that take it.
    time: f64,
    slowest: Vec<u32>,
    /// Whether a device is in the set at hand, and whether its tokens are fixed `[D]`.
    is_inside: Vec<bool>,
    is_fixed: Vec<bool>,
    /// Experts and their tokens that have lost their slot.
    displaced: Vec<(u32, f64)>,
    /// Experts whose tokens were counted already.
    counted: Vec<u32>,
}

impl Notes {
    /// Prepares the notes for so many devices, none of them fixed.
    fn begin(&mut self, devices: usize) {
        self.is_fixed.clear();
        self.is_fixed.resize(devices, false);
    }
}

impl Division {
    /// Divides a window's loads of experts `[E]`.
    #[must_use]
    pub fn new(copies: &Copies, load: &[f64], notes: &mut Notes) -> Self {
        let (slots, devices) = (copies.expert_in.len(), copies.rate.len());
        let placed = copies.slots.iter().zip(load).filter(|(slots, _)| !slots.is_empty());
        let total = placed.map(|(_, load)| load).sum();
        let (served, tokens) = (vec![0.0; slots], vec![0.0; devices]);
        let mut division = Self { served, tokens, total, time: 0.0, slowest: vec![] };
        // Experts with a single copy come first: the tokens of the others go to devices with spare time.
        for has_copies in [false, true] {
            for (slots, &load) in copies.slots.iter().zip(load) {
                if (slots.len() > 1) == has_copies {
                    division.give(copies, slots, load, notes);
                }
            }
        }
        notes.begin(devices);
        division.level(copies, [total / copies.rate.iter().sum::<f64>(), 0.0], notes);
        division.settle(notes);
        division
    }

    /// Levels the devices that are not among the slowest, then those that are not among the slowest of these, and so on.
    ///
    /// The tokens of the slowest devices are of experts without copies on other devices, so the others keep all their tokens.
    fn level_all(&mut self, copies: &Copies, notes: &mut Notes) {
        notes.slowest.clone_from(&self.slowest);
        loop {
            for &device in &notes.slowest {
                notes.is_fixed[device as usize] = true;
            }
            let others = || (0..copies.rate.len()).filter(|&device| !notes.is_fixed[device]);
            let rate: f64 = others().map(|device| copies.rate[device]).sum();
            if rate <= 0.0 {
                return;
            }
            let mean = others().map(|device| self.tokens[device]).sum::<f64>() / rate;
            self.level(copies, [mean, 0.0], notes);
        }
    }

    /// Returns the time of the slowest device.
    #[must_use]
    pub fn time(&self) -> f64 {
        self.time
    }

    /// Divides tokens anew after some slots have changed; returns the time of the slowest device.
    ///
    /// `before` has these slots with the experts that they held. No device serves tokens of experts that have no slot any more.
    /// The notes record the changes, for [`Self::restore`] or [`Self::settle`].
    pub fn follow(&mut self, copies: &Copies, before: &[(usize, Option<u32>)], notes: &mut Notes) -> f64 {
        notes.displaced.clear();
        for &(slot, expert) in before {
            if let Some(expert) = expert {
                notes.displaced.push((expert, self.served[slot]));
            }
            self.add(copies, slot, -self.served[slot], notes);
        }
        let mut total = self.total;
        for at in 0..notes.displaced.len() {
            let (expert, tokens) = notes.displaced[at];
            let slots = &copies.slots[expert as usize];
            total -= if slots.is_empty() { tokens } else { 0.0 };
            self.give(copies, slots, tokens, notes);
        }
        notes.begin(copies.rate.len());
        let least = self.least_of_slowest(copies, before, notes);
        self.level(copies, [total / copies.rate.iter().sum::<f64>(), least], notes);
        notes.time
    }

    /// Undoes the changes that the notes record.
    pub fn restore(&mut self, copies: &Copies, notes: &mut Notes) {
        for (slot, served, tokens) in notes.changed.drain(..).rev() {
            self.served[slot as usize] = served;
            self.tokens[copies.device[slot as usize] as usize] = tokens;
        }
    }

    /// Accepts the changes that the notes record.
    pub fn settle(&mut self, notes: &mut Notes) {
        notes.changed.clear();
        self.time = notes.time;
        std::mem::swap(&mut self.slowest, &mut notes.slowest);
    }

    /// Adds tokens to a slot, or removes them where `added` is negative.
    fn add(&mut self, copies: &Copies, slot: usize, added: f64, notes: &mut Notes) {
        let device = copies.device[slot] as usize;
        notes.changed.push((slot as u32, self.served[slot], self.tokens[device]));
        self.served[slot] += added;
        self.tokens[device] += added;
    }

    /// Gives tokens of an expert to that of its slots whose device takes the least time.
    fn give(&mut self, copies: &Copies, slots: &[u32], tokens: f64, notes: &mut Notes) {
        let time = |slot: &u32| {
            let device = copies.device[*slot as usize] as usize;
            self.tokens[device] / copies.rate[device]
        };
        if let Some(&slot) = slots.iter().min_by(|a, b| time(a).total_cmp(&time(b)))
            && tokens != 0.0
        {
            self.add(copies, slot as usize, tokens, notes);
        }
    }

    /// Returns a lower bound on the time of the slowest device: the time that the devices which were the slowest need for
    /// experts without copies on other devices.
    fn least_of_slowest(&self, copies: &Copies, before: &[(usize, Option<u32>)], notes: &mut Notes) -> f64 {
        notes.is_inside.clear();
        notes.is_inside.resize(copies.rate.len(), false);
        let (mut tokens, mut rate) = (0.0, 0.0);
        for &device in &self.slowest {
            notes.is_inside[device as usize] = true;
            tokens += self.tokens[device as usize];
            rate += copies.rate[device as usize];
        }
        // Only the experts of changed slots may have tokens there that other devices could serve.
        let experts = before.iter().flat_map(|&(slot, expert)| [expert, copies.expert(slot)]).flatten();
        notes.counted.clear();
        for expert in experts {
            let is_inside = |slot: &&u32| notes.is_inside[copies.device[**slot as usize] as usize];
            let slots = &copies.slots[expert as usize];
            if !notes.counted.contains(&expert) && !slots.iter().all(|slot| is_inside(&slot)) {
                tokens -= slots.iter().filter(is_inside).map(|&slot| self.served[slot as usize]).sum::<f64>();
            }
            notes.counted.push(expert);
        }
        notes.slowest.clone_from(&self.slowest);
        if rate > 0.0 { tokens / rate } else { 0.0 }
    }

    /// Moves tokens between devices that are not fixed until the slowest of them takes the least time.
    ///
    /// That time is no less than their `mean` and than the lower bound `least`.
    fn level(&mut self, copies: &Copies, [mean, least]: [f64; 2], notes: &mut Notes) {
        notes.time = mean.max(least);
        if mean >= least {
            let Notes { slowest, is_fixed, .. } = notes;
            slowest.clear();
            slowest.extend((0..copies.rate.len() as u32).filter(|&device| !is_fixed[device as usize]));
        }
        for _ in 0..STEPS {
            let Some((tokens, rate)) = self.fit(copies, notes) else { return };
            if tokens <= notes.time * rate * (1.0 + ROUNDING) {
                return;
            }
            notes.time = tokens / rate;
            notes.slowest.clone_from(&notes.reached);
        }
    }

    /// Moves tokens until every device that is not fixed is done in the time of the notes.
    ///
    /// If that is impossible, returns the tokens and the rate of a set of devices that needs longer.
    fn fit(&mut self, copies: &Copies, notes: &mut Notes) -> Option<(f64, f64)> {
        let (time, small) = (notes.time, notes.time * ROUNDING);
        for _ in 0..PATHS {
            let excess_of = |device: usize| self.tokens[device] - time * copies.rate[device];
            let time_of = |device: &usize| self.tokens[*device] / copies.rate[*device];
            let open = (0..copies.rate.len()).filter(|&device| !notes.is_fixed[device]);
            let source = open.max_by(|a, b| time_of(a).total_cmp(&time_of(b)))?;
            let excess = excess_of(source);
            if excess <= small * copies.rate[source] {
                return None;
            }
            let Some(sink) = self.find_path(copies, source, small, notes) else {
                let sum = |values: &[f64]| notes.reached.iter().map(|&device| values[device as usize]).sum();
                return Some((sum(&self.tokens), sum(&copies.rate)));
            };
            let mut amount = excess.min(-excess_of(sink));
            let mut at = sink;
            while at != source {
                let slot = notes.via[at][0] as usize;
                amount = amount.min(self.served[slot]);
                at = copies.device[slot] as usize;
            }
            at = sink;
            while at != source {
                let [from, to] = notes.via[at];
                self.add(copies, from as usize, -amount, notes);
                self.add(copies, to as usize, amount, notes);
                at = copies.device[from as usize] as usize;
            }
        }
        None
    }

    /// Returns the device with spare time that is nearest to `source` on a path along which tokens can move; None if there is
    /// none.
    fn find_path(&self, copies: &Copies, source: usize, small: f64, notes: &mut Notes) -> Option<usize> {
        notes.via.clear();
        notes.via.resize(copies.rate.len(), [EMPTY; 2]);
        notes.reached.clear();
        notes.reached.push(source as u32);
        let mut at = 0;
        while let Some(&device) = notes.reached.get(at) {
            at += 1;
            let device = device as usize;
            for slot in copies.first[device]..copies.first[device + 1] {
                if self.served[slot] <= small {
                    continue;
                }
                for &other in &copies.slots[copies.expert_in[slot] as usize] {
                    let there = copies.device[other as usize] as usize;
                    if there == source || notes.via[there][0] != EMPTY || notes.is_fixed[there] {
                        continue;
                    }
                    notes.via[there] = [slot as u32, other];
                    if self.tokens[there] < (notes.time - small) * copies.rate[there] {
                        return Some(there);
                    }
                    notes.reached.push(there as u32);
                }
            }
        }
        None
    }
}

/// Computes the tokens of every device `[W, L, D]` from loads of `experts` `[W, L, E]` and slots `[L, D, S]`.
///
/// The slowest device takes the least time, then the slowest of the others, and so on.
#[must_use]
pub fn divide(
    slots: &[i32],
    [layers, devices, width]: [usize; 3],
    load: &[f64],
    experts: usize,
    rate: &[f64],
) -> Vec<f64> {
    let copies_of = |slots: &[i32]| Copies::new(slots, width, experts, rate);
    let layer: Vec<Copies> = slots.chunks_exact(devices * width).map(copies_of).collect();
    let rows = load.par_chunks_exact(experts).enumerate();
    let divide_window = |notes: &mut Notes, (row, load)| {
        let copies: &Copies = &layer[row % layers];
        let mut division = Division::new(copies, load, notes);
        division.level_all(copies, notes);
        division.tokens
    };
    let served: Vec<Vec<f64>> = rows.map_init(Notes::default, divide_window).collect();
    served.concat()
}
