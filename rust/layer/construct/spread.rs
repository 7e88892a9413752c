//! A start for layers in which every expert survives the loss of a domain: the heaviest copy first goes to the device
//! that is done first with what it has, and with what it gets if a domain is lost in which the expert is as well.
//!
//! Copies that follow load alone share all they have with few partners, which then get all of it.

use super::repair::vacant;
use super::{Devices, Item, Placed, copies, longest_first, part};
use crate::layer::terms::losses::AfterLosses;
use crate::layer::{Site, Slots};

/// How much what a device has after a loss counts beside what it has.
const WEIGHT: f64 = 2.0;

/// Fills slots of layers that have to survive a loss; some may be filled already.
pub(super) fn by_losses(slots: &mut Slots, site: &Site, load: &[f64]) -> Placed<()> {
    let mean = load.iter().sum::<f64>() / site.devices() as f64;
    // A device that holds a copy has the mean, or what the copy serves if that is more, and after a loss its part of the
    // copy that is gone. Copies that follow what they serve leave experts of middle loads with two, and all that is left
    // of one of these goes to one device.
    let weight = |load, copies| {
        let (part, others) = (part(load, copies), f64::from(copies.saturating_sub(1).max(1)));
        (part - mean).max(0.0) + part / others
    };
    let (mut order, copies) = copies(slots, site, load, weight)?;
    order.sort_by_key(|item| {
        std::cmp::Reverse(Item::new(part(load[item.expert()], copies[item.expert()]), item.expert()))
    });
    longest_first(slots, site, &order, &mut ByLosses::new(slots, site, load, &copies))
}

/// Devices by when they are done after the worst loss that the expert at hand adds to.
pub(super) struct ByLosses<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    after: AfterLosses,
}

impl<'a> ByLosses<'a> {
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let each: Vec<u16> = (0..site.devices() as u16).collect();
        let domain = if site.rules.domain.is_empty() { &each } else { &site.rules.domain };
        let after = AfterLosses::new(site, domain, load.iter().sum());
        let mut fresh = Self { site, load, copies, after };
        for expert in 0..load.len() as u16 {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            fresh.count(expert, &held, 1.0);
        }
        fresh
    }

    /// Counts copies of an expert, or takes them out by the sign -1.
    fn count(&mut self, expert: u16, held: &[usize], sign: f64) {
        let (load, copies) = (self.load[usize::from(expert)], self.copies[usize::from(expert)] as usize);
        self.after.count(load, copies, held, sign);
    }

    /// Load of a copy, and what the loss of one of the others adds to it, if each is in a domain of its own.
    fn parts(&self, expert: u16) -> (f64, f64) {
        let (load, copies) = (self.load[usize::from(expert)], f64::from(self.copies[usize::from(expert)]));
        (load / copies, if copies > 1.0 { load / (copies * (copies - 1.0)) } else { 0.0 })
    }

    /// When a device is done that takes an expert, which others hold, after the worst loss among these.
    fn done_then(&self, expert: u16, device: usize, held: &[usize]) -> f64 {
        let ((share, more), domain) = (self.parts(expert), &self.after.domain);
        let lost = held.iter().map(|&other| domain[other]).filter(|&lost| lost != domain[device]);
        let worst = lost.map(|lost| self.after.added_to(device)[lost] + more).fold(0.0, f64::max);
        (self.after.loads[device] + share + WEIGHT * worst) * self.site.time[device]
    }
}

impl Devices for ByLosses<'_> {
    fn put(&mut self, slots: &mut Slots, expert: u16) {
        let mut held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
        while slots.copies(expert) < self.copies[usize::from(expert)] {
            let open = (0..self.site.devices())
                .filter(|&g| slots.may_take(self.site, expert, g))
                .filter_map(|g| vacant(slots, g).map(|slot| (self.done_then(expert, g, &held), g, slot)));
            let Some((_, device, slot)) = open.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
            slots.put(slot, expert);
            self.count(expert, &held, -1.0);
            held.push(device);
            self.count(expert, &held, 1.0);
        }
    }

    fn refresh(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}
