//! What devices serve where a dispatcher divides every window's tokens over copies so that the slowest device is done as
//! soon as can be, as a linear programme does.
//!
//! The least time is `max over sets of devices of (load of experts whose copies are all in the set) / (rate of the set)`
//! (Hall, 1935). It is found from below (Newton's steps on the parameter, Dinkelbach 1967): while a device has more than
//! it can serve in a time that is too short, tokens go on to other copies, device by device, along the shortest way to one
//! that has time left (Edmonds and Karp, 1972). Where there is no way, the devices that were reached name a set that needs
//! longer. A flow stays as it is where copies change: what a move of a copy changes is little.
//!
//! A search of layers makes that time small. A replay asks for the tokens of all devices as well: there the others are done
//! as soon as can be, too, and so on without those ([`Division::spread`]). That is one answer, however devices are numbered.

use rayon::prelude::*;

/// Parts of a time by which sums of floats may be off.
const ROUNDING: f64 = 1e-11;
/// Newton's steps, and ways of each, at most: each step names a set that needs strictly longer, and few are met.
const STEPS: usize = 100;
const WAYS: usize = 100_000;
/// What is in an empty slot.
const NOTHING: u32 = u32::MAX;

/// The copies of a layer: slots of every expert, each device once.
#[derive(Debug, Clone)]
pub struct Copies {
    /// Expert of every slot `[P]`; slots are numbered device by device.
    expert_in: Vec<u32>,
    /// Device of every slot `[P]`, and the first slot of every device, with the number of slots `[D + 1]`.
    device: Vec<u32>,
    first: Vec<usize>,
    /// Slots of every expert `[E]`.
    slots: Vec<Vec<u32>>,
    /// What a device serves in a time `[D]`.
    rate: Vec<f64>,
}

impl Copies {
    /// Devices with so many slots each `[D]`, all of them empty.
    #[must_use]
    pub fn empty(capacity: impl Iterator<Item = usize>, experts: usize, rate: Vec<f64>) -> Self {
        let (mut first, mut device) = (vec![0], vec![]);
        for (number, slots) in (0..).zip(capacity) {
            device.resize(device.len() + slots, number);
            first.push(device.len());
        }
        Self { expert_in: vec![NOTHING; device.len()], device, first, slots: vec![vec![]; experts], rate }
    }

    /// Reads slots `[D, S]`; what is no expert is nothing, and so is a second copy on a device.
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

    /// Replaces what a slot holds, by an expert or by nothing.
    pub fn put(&mut self, slot: usize, expert: Option<u32>) {
        let before = std::mem::replace(&mut self.expert_in[slot], expert.unwrap_or(NOTHING));
        if before != NOTHING {
            self.slots[before as usize].retain(|&other| other as usize != slot);
        }
        if let Some(expert) = expert {
            self.slots[expert as usize].push(slot as u32);
        }
    }

    /// The expert in a slot, if any.
    #[must_use]
    pub fn expert(&self, slot: usize) -> Option<u32> {
        Some(self.expert_in[slot]).filter(|&expert| expert != NOTHING)
    }
}

/// How a window's tokens are divided over the copies of a layer.
#[derive(Debug, Clone)]
pub struct Division {
    /// Tokens of every slot `[P]`, and of every device `[D]`.
    served: Vec<f64>,
    tokens: Vec<f64>,
    /// Tokens of all devices.
    total: f64,
    /// The time in which the slowest device is done, and the devices that need it.
    time: f64,
    slowest: Vec<u32>,
}

/// What is noted while tokens are divided; one for all windows.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    /// The slot from which a device is reached, and the one on it `[D]`; devices in the order in which they are reached.
    way: Vec<[u32; 2]>,
    reached: Vec<u32>,
    /// Slots whose tokens have changed, what they were before, and what those of their devices were.
    changed: Vec<(u32, f64, f64)>,
    /// The time of what is looked at, and the devices that need it.
    time: f64,
    slowest: Vec<u32>,
    /// Whether a device is in a set, and whether it is left as it is `[D]`.
    is_inside: Vec<bool>,
    is_left: Vec<bool>,
    /// Tokens that have lost their slot, by expert.
    left: Vec<(u32, f64)>,
    /// Experts whose tokens are counted already.
    counted: Vec<u32>,
}

impl Notes {
    /// Begins with so many devices, none of which is left as it is.
    fn begin(&mut self, devices: usize) {
        self.is_left.clear();
        self.is_left.resize(devices, false);
    }
}

impl Division {
    /// Divides a window's loads of experts `[E]`.
    #[must_use]
    pub fn new(copies: &Copies, load: &[f64], notes: &mut Notes) -> Self {
        let (slots, devices) = (copies.expert_in.len(), copies.rate.len());
        let held = copies.slots.iter().zip(load).filter(|(slots, _)| !slots.is_empty());
        let total = held.map(|(_, load)| load).sum();
        let (served, tokens) = (vec![0.0; slots], vec![0.0; devices]);
        let mut division = Self { served, tokens, total, time: 0.0, slowest: vec![] };
        // Experts of one copy first: the others go where there is time left.
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

    /// Levels the devices that are not among the slowest, and so on without the slowest of those.
    ///
    /// Tokens of the slowest are of experts that are on no other device, so the others keep all of theirs.
    fn spread(&mut self, copies: &Copies, notes: &mut Notes) {
        notes.slowest.clone_from(&self.slowest);
        loop {
            for &device in &notes.slowest {
                notes.is_left[device as usize] = true;
            }
            let others = || (0..copies.rate.len()).filter(|&device| !notes.is_left[device]);
            let rate: f64 = others().map(|device| copies.rate[device]).sum();
            if rate <= 0.0 {
                return;
            }
            let mean = others().map(|device| self.tokens[device]).sum::<f64>() / rate;
            self.level(copies, [mean, 0.0], notes);
        }
    }

    /// The time in which the slowest device is done.
    #[must_use]
    pub fn time(&self) -> f64 {
        self.time
    }

    /// Divides tokens anew after slots have changed, which held these experts before; the time that it takes.
    ///
    /// Tokens of experts that have no slot any more are served by nobody. The notes say what has changed, for
    /// [`Self::restore`] or [`Self::settle`].
    pub fn follow(&mut self, copies: &Copies, before: &[(usize, Option<u32>)], notes: &mut Notes) -> f64 {
        notes.left.clear();
        for &(slot, expert) in before {
            if let Some(expert) = expert {
                notes.left.push((expert, self.served[slot]));
            }
            self.serve(copies, slot, -self.served[slot], notes);
        }
        let mut total = self.total;
        for at in 0..notes.left.len() {
            let (expert, tokens) = notes.left[at];
            let slots = &copies.slots[expert as usize];
            total -= if slots.is_empty() { tokens } else { 0.0 };
            self.give(copies, slots, tokens, notes);
        }
        notes.begin(copies.rate.len());
        let least = self.least_of_slowest(copies, before, notes);
        self.level(copies, [total / copies.rate.iter().sum::<f64>(), least], notes);
        notes.time
    }

    /// Takes back what has changed.
    pub fn restore(&mut self, copies: &Copies, notes: &mut Notes) {
        for (slot, served, tokens) in notes.changed.drain(..).rev() {
            self.served[slot as usize] = served;
            self.tokens[copies.device[slot as usize] as usize] = tokens;
        }
    }

    /// Keeps what has changed.
    pub fn settle(&mut self, notes: &mut Notes) {
        notes.changed.clear();
        self.time = notes.time;
        std::mem::swap(&mut self.slowest, &mut notes.slowest);
    }

    /// Serves so many more tokens from a slot.
    fn serve(&mut self, copies: &Copies, slot: usize, more: f64, notes: &mut Notes) {
        let device = copies.device[slot] as usize;
        notes.changed.push((slot as u32, self.served[slot], self.tokens[device]));
        self.served[slot] += more;
        self.tokens[device] += more;
    }

    /// Gives tokens of an expert to the one of its slots whose device is done first.
    fn give(&mut self, copies: &Copies, slots: &[u32], tokens: f64, notes: &mut Notes) {
        let time = |slot: &u32| {
            let device = copies.device[*slot as usize] as usize;
            self.tokens[device] / copies.rate[device]
        };
        if let Some(&slot) = slots.iter().min_by(|a, b| time(a).total_cmp(&time(b)))
            && tokens != 0.0
        {
            self.serve(copies, slot as usize, tokens, notes);
        }
    }

    /// The time that the devices need which were the slowest: for experts that are there alone.
    fn least_of_slowest(&self, copies: &Copies, before: &[(usize, Option<u32>)], notes: &mut Notes) -> f64 {
        notes.is_inside.clear();
        notes.is_inside.resize(copies.rate.len(), false);
        let (mut tokens, mut rate) = (0.0, 0.0);
        for &device in &self.slowest {
            notes.is_inside[device as usize] = true;
            tokens += self.tokens[device as usize];
            rate += copies.rate[device as usize];
        }
        // Only experts that have moved may have tokens there that others could serve.
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

    /// Moves tokens on until all devices that are not left as they are are done in the least time, which is no less than
    /// their mean, and another one.
    fn level(&mut self, copies: &Copies, [mean, least]: [f64; 2], notes: &mut Notes) {
        notes.time = mean.max(least);
        if mean >= least {
            let Notes { slowest, is_left, .. } = notes;
            slowest.clear();
            slowest.extend((0..copies.rate.len() as u32).filter(|&device| !is_left[device as usize]));
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

    /// Moves tokens on until all devices are done in the time; else the tokens and the rate of a set that needs longer.
    fn fit(&mut self, copies: &Copies, notes: &mut Notes) -> Option<(f64, f64)> {
        let (time, small) = (notes.time, notes.time * ROUNDING);
        for _ in 0..WAYS {
            let over = |device: usize| self.tokens[device] - time * copies.rate[device];
            let late = |device: &usize| self.tokens[*device] / copies.rate[*device];
            let open = (0..copies.rate.len()).filter(|&device| !notes.is_left[device]);
            let source = open.max_by(|a, b| late(a).total_cmp(&late(b)))?;
            let excess = over(source);
            if excess <= small * copies.rate[source] {
                return None;
            }
            let Some(sink) = self.find_way(copies, source, small, notes) else {
                let sum = |values: &[f64]| notes.reached.iter().map(|&device| values[device as usize]).sum();
                return Some((sum(&self.tokens), sum(&copies.rate)));
            };
            let mut amount = excess.min(-over(sink));
            let mut at = sink;
            while at != source {
                let slot = notes.way[at][0] as usize;
                amount = amount.min(self.served[slot]);
                at = copies.device[slot] as usize;
            }
            at = sink;
            while at != source {
                let [from, to] = notes.way[at];
                self.serve(copies, from as usize, -amount, notes);
                self.serve(copies, to as usize, amount, notes);
                at = copies.device[from as usize] as usize;
            }
        }
        None
    }

    /// Finds the shortest way of tokens from a device to one that has time left; which one, or none where all that were
    /// reached have none.
    fn find_way(&self, copies: &Copies, source: usize, small: f64, notes: &mut Notes) -> Option<usize> {
        notes.way.clear();
        notes.way.resize(copies.rate.len(), [NOTHING; 2]);
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
                    if there == source || notes.way[there][0] != NOTHING || notes.is_left[there] {
                        continue;
                    }
                    notes.way[there] = [slot as u32, other];
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

/// Tokens of every device `[W, L, D]`, of loads of `experts` `[W, L, E]` and slots `[L, D, S]`: the slowest is done as soon
/// as can be, then the slowest of the others, and so on.
#[must_use]
pub fn serve(
    slots: &[i32],
    [layers, devices, width]: [usize; 3],
    load: &[f64],
    experts: usize,
    rate: &[f64],
) -> Vec<f64> {
    let copies_of = |slots: &[i32]| Copies::new(slots, width, experts, rate);
    let layer: Vec<Copies> = slots.chunks_exact(devices * width).map(copies_of).collect();
    let rows = load.par_chunks_exact(experts).enumerate();
    let divide = |notes: &mut Notes, (row, load)| {
        let copies: &Copies = &layer[row % layers];
        let mut division = Division::new(copies, load, notes);
        division.spread(copies, notes);
        division.tokens
    };
    let served: Vec<Vec<f64>> = rows.map_init(Notes::default, divide).collect();
    served.concat()
}
