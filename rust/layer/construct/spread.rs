//! A start for layers in which every expert survives the loss of a domain: the heaviest copy first goes to the device
//! that is done first with what it has, and with what it gets if a domain is lost in which the expert is as well.
//!
//! Copies that follow load alone share all they have with few partners, which then get all of it.

use super::Devices;
use crate::layer::{EMPTY, Site, Slots};

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
    /// Empty slots of every device, the first one last `[D]`.
    empty: Vec<Vec<usize>>,
}

impl<'a> ByLosses<'a> {
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let devices = site.devices();
        let domain: Vec<usize> = match &site.rules.domain[..] {
            [] => (0..devices).collect(),
            domain => domain.iter().map(|&domain| usize::from(domain)).collect(),
        };
        let domains = domain.iter().max().map_or(0, |last| last + 1);
        let empty_slots = |g| slots.of(g).rev().filter(|&slot| slots.expert_in[slot] == EMPTY).collect();
        let empty = (0..devices).map(empty_slots).collect();
        let (loads, added) = (vec![0.0; devices], vec![0.0; domains * devices]);
        let mut fresh = Self { site, load, copies, domain, loads, added, empty };
        for expert in 0..load.len() as u16 {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            for number in 0..held.len() {
                fresh.enter(expert, held[number], &held[..number]);
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
        (self.loads[device] + share + worst) * self.site.time[device]
    }

    fn enter(&mut self, expert: u16, device: usize, held: &[usize]) {
        let ((share, more), devices) = (self.parts(expert), self.loads.len());
        self.loads[device] += share;
        for &other in held.iter().filter(|&&other| self.domain[other] != self.domain[device]) {
            self.added[self.domain[other] * devices + device] += more;
            self.added[self.domain[device] * devices + other] += more;
        }
    }
}

impl Devices for ByLosses<'_> {
    fn put(&mut self, slots: &mut Slots, expert: u16) {
        while slots.copies(expert) < self.copies[usize::from(expert)] {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            let open = (0..self.loads.len())
                .filter(|&g| !self.empty[g].is_empty() && slots.may_take(self.site, expert, g))
                .map(|g| (self.done_then(expert, g, &held), g));
            let Some((_, device)) = open.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
            slots.put(self.empty[device].pop().unwrap_or_default(), expert);
            self.enter(expert, device, &held);
        }
    }

    fn refresh(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}
