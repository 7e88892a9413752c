//! A start for layers in which every expert survives the loss of a domain: the heaviest copy first goes to the device
//! that is done first with what it has, and with what it gets if a domain is lost in which the expert is as well.
//!
//! Copies that follow load alone share all they have with few partners, which then get all of it. Then copies change
//! places as long as the device that is done last after the worst loss is done sooner.

use super::Devices;
use super::repair::vacant;
use crate::layer::{EMPTY, Move, Site, Slots};

/// How much what a loss adds counts beside what a device has.
const WEIGHT: f64 = 2.0;
/// Exchanges of a layer at most, and what each must gain, as a part of the time of the device that is done last.
const EXCHANGES: usize = 200;
const GAIN: f64 = 1e-4;

/// Devices by when they are done after the worst loss that the expert at hand adds to.
pub(super) struct ByLosses<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    /// Failure domain of every device `[D]`.
    domain: Vec<usize>,
    /// Load of every device `[D]`, and what the loss of a domain adds to it `[F, D]`.
    loads: Vec<f64>,
    added: Vec<f64>,
}

impl<'a> ByLosses<'a> {
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let devices = site.devices();
        let domain: Vec<usize> = match &site.rules.domain[..] {
            [] => (0..devices).collect(),
            domain => domain.iter().map(|&domain| usize::from(domain)).collect(),
        };
        let domains = domain.iter().max().map_or(0, |last| last + 1);
        let (loads, added) = (vec![0.0; devices], vec![0.0; domains * devices]);
        let mut fresh = Self { site, load, copies, domain, loads, added };
        for expert in 0..load.len() as u16 {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            for number in 0..held.len() {
                fresh.count(expert, held[number], &held[..number], 1.0);
            }
        }
        fresh
    }

    /// Load of a copy, and what the loss of one of the others adds to it, if each is in a domain of its own.
    fn parts(&self, expert: u16) -> (f64, f64) {
        let (load, copies) = (self.load[usize::from(expert)], f64::from(self.copies[usize::from(expert)]));
        (load / copies, if copies > 1.0 { load / (copies * (copies - 1.0)) } else { 0.0 })
    }

    /// When a device is done that takes an expert, which others hold, after the worst loss among these.
    fn done_then(&self, expert: u16, device: usize, held: &[usize]) -> f64 {
        let (share, more) = self.parts(expert);
        let lost = held.iter().map(|&other| self.domain[other]).filter(|&lost| lost != self.domain[device]);
        let worst = lost.map(|lost| self.added[lost * self.loads.len() + device] + more).fold(0.0, f64::max);
        (self.loads[device] + share + WEIGHT * worst) * self.site.time[device]
    }

    /// Counts a copy on a device beside others, or takes it out by the sign -1.
    fn count(&mut self, expert: u16, device: usize, held: &[usize], sign: f64) {
        let ((share, more), devices) = (self.parts(expert), self.loads.len());
        self.loads[device] += sign * share;
        for &other in held.iter().filter(|&&other| self.domain[other] != self.domain[device]) {
            self.added[self.domain[other] * devices + device] += sign * more;
            self.added[self.domain[device] * devices + other] += sign * more;
        }
    }

    /// When a device is done after the worst loss, and of which domain that is.
    fn worst_of(&self, device: usize) -> (f64, usize) {
        let devices = self.loads.len();
        let domains = self.added.len() / devices;
        let losses = (0..domains).filter(|&lost| lost != self.domain[device]);
        let worst = losses.map(|lost| (self.added[lost * devices + device], lost));
        let (added, lost) =
            worst.fold((0.0, 0), |worst, other| if other.0 > worst.0 { other } else { worst });
        ((self.loads[device] + added) * self.site.time[device], lost)
    }

    /// Exchanges copies as long as the device that is done last after a loss is done sooner.
    pub(super) fn settle(&mut self, slots: &mut Slots) {
        for _ in 0..EXCHANGES {
            let all = (0..self.loads.len()).map(|g| (self.worst_of(g), g));
            let Some(((time, lost), device)) = all.max_by(|a, b| a.0.0.total_cmp(&b.0.0)) else { return };
            if !self.relieve(slots, device, lost, time * (1.0 - GAIN)) {
                return;
            }
        }
    }

    /// Exchanges a copy that a device shares with a domain for one elsewhere, so that all that changes is done before a
    /// goal, and no device of the two has more to do than the busiest one has; whether there is one.
    fn relieve(&mut self, slots: &mut Slots, device: usize, lost: usize, goal: f64) -> bool {
        let time = |loads: &[f64], g: usize| loads[g] * self.site.time[g];
        let busiest = (0..self.loads.len()).map(|g| time(&self.loads, g)).fold(0.0, f64::max);
        for p in slots.of(device) {
            let a = slots.expert_in[p];
            if a == EMPTY || !slots.devices(a).any(|other| self.domain[usize::from(other)] == lost) {
                continue;
            }
            for q in 0..slots.expert_in.len() {
                let b = slots.expert_in[q];
                if b == EMPTY || !slots.allows(self.site, Move::Swap(p, q)) {
                    continue;
                }
                let other = slots.device(q);
                let more = self.parts(b).0 - self.parts(a).0;
                let loads = [(device, more), (other, -more)];
                let fits = |(g, more): (usize, f64)| (self.loads[g] + more) * self.site.time[g] <= busiest;
                if !loads.into_iter().all(fits) {
                    continue;
                }
                self.exchange(slots, [p, q]);
                let holders = slots.devices(a).chain(slots.devices(b)).map(usize::from);
                if holders.chain([device, other]).all(|g| self.worst_of(g).0 < goal) {
                    return true;
                }
                self.exchange(slots, [p, q]);
            }
        }
        false
    }

    /// Exchanges two slots that hold something, and follows.
    fn exchange(&mut self, slots: &mut Slots, [p, q]: [usize; 2]) {
        for sign in [-1.0, 1.0] {
            for slot in [p, q] {
                let (expert, device) = (slots.expert_in[slot], slots.device(slot));
                let others = slots.devices(expert).map(usize::from).filter(|&other| other != device);
                let others: Vec<usize> = others.collect();
                self.count(expert, device, &others, sign);
            }
            if sign < 0.0 {
                slots.apply(Move::Swap(p, q));
            }
        }
    }
}

impl Devices for ByLosses<'_> {
    fn put(&mut self, slots: &mut Slots, expert: u16) {
        while slots.copies(expert) < self.copies[usize::from(expert)] {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            let open = (0..self.loads.len())
                .filter(|&g| slots.may_take(self.site, expert, g))
                .filter_map(|g| vacant(slots, g).map(|slot| (self.done_then(expert, g, &held), g, slot)));
            let Some((_, device, slot)) = open.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
            slots.put(slot, expert);
            self.count(expert, device, &held, 1.0);
        }
    }

    fn refresh(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}
