//! A start for a dispatcher that divides tokens over copies: devices joined by the experts that they share.
//!
//! A set of devices is slow where much of its load can go nowhere else. So the heaviest experts have copies, on as many
//! slots of every device, no two on the same devices as long as others are left, and all devices are joined: what one has
//! too much of can go on to all others, also when loads are not what they were. Of 288 slots on 32 devices these are rings.

use super::repair::vacant;
use super::{Devices, Item, Placed, copies, longest_first, part, pin};
use crate::layer::{Site, Slots};

/// What a copy beyond the second is worth, as a part of its load: two let tokens go elsewhere, others let more do.
///
/// On DeepSeek-V3's loads (288 slots on 32 devices, each of four profiles judged on the others) the slowest device has
/// 1.113 of the mean without further copies, 1.110 with this.
const FURTHER: f64 = 0.5;

/// Slots of a layer whose loads `[E]` are divided over copies.
pub(super) fn by_partners(site: &Site, load: &[f64]) -> Placed<Slots> {
    let mut slots = Slots::empty(&site.capacity, load.len());
    pin(&mut slots, site)?;
    let weight = |load, copies| part(load, copies) * if copies > 1 { FURTHER } else { 1.0 };
    let (mut order, copies) = copies(&slots, site, load, weight)?;
    let heaviest = |item: &Item| {
        (
            copies[item.expert()] == 1,
            std::cmp::Reverse(Item::new(part(load[item.expert()], 1), item.expert())),
        )
    };
    order.sort_by_key(heaviest);
    let mut devices = ByPartners::new(&slots, site, load, &copies);
    longest_first(&mut slots, site, &order, &mut devices)?;
    Ok(slots)
}

/// Devices by whom they share experts with.
struct ByPartners<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    /// Load of every device, if copies share it evenly, and its slots that are filled `[D]`.
    loads: Vec<f64>,
    used: Vec<usize>,
    /// Experts that two devices share `[D, D]`, and the first device that every one is joined with `[D]`.
    shared: Vec<u32>,
    joined: Vec<usize>,
}

impl<'a> ByPartners<'a> {
    fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let devices = site.devices();
        let (loads, used) = (vec![0.0; devices], vec![0; devices]);
        let (shared, joined) = (vec![0; devices * devices], (0..devices).collect());
        let mut fresh = Self { site, load, copies, loads, used, shared, joined };
        for expert in 0..load.len() as u16 {
            let mut held = vec![];
            for device in slots.devices(expert).map(usize::from) {
                fresh.enter(expert, device, &held);
                held.push(device);
            }
        }
        fresh
    }

    /// Follows a copy to a device, where the others are held.
    fn enter(&mut self, expert: u16, device: usize, held: &[usize]) {
        let devices = self.loads.len();
        self.used[device] += 1;
        self.loads[device] +=
            self.load[usize::from(expert)] / f64::from(self.copies[usize::from(expert)].max(1));
        for &other in held {
            self.shared[device * devices + other] += 1;
            self.shared[other * devices + device] += 1;
            let (from, to) = (self.joined[device], self.joined[other]);
            self.joined.iter_mut().filter(|first| **first == from).for_each(|first| *first = to);
        }
    }

    /// How little a device suits one more copy of an expert that is held by others: as few as can be share two experts, are
    /// fuller or joined already, and then have more to do.
    fn burden(&self, expert: u16, device: usize, held: &[usize]) -> (u32, f64, usize, f64) {
        let time = self.loads[device] * self.site.time[device];
        if self.copies[usize::from(expert)] == 1 {
            return (0, 0.0, 0, time);
        }
        let shared = held.iter().map(|&other| self.shared[device * self.loads.len() + other]).sum();
        let filled = self.used[device] as f64 / self.site.capacity[device] as f64;
        let joined = held.iter().filter(|&&other| self.joined[other] == self.joined[device]).count();
        (shared, filled, joined, time)
    }
}

impl Devices for ByPartners<'_> {
    fn put(&mut self, slots: &mut Slots, expert: u16) {
        while slots.copies(expert) < self.copies[usize::from(expert)] {
            let held: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            let open = (0..self.loads.len())
                .filter(|&device| slots.may_take(self.site, expert, device))
                .filter_map(|device| {
                    vacant(slots, device).map(|slot| (self.burden(expert, device, &held), device, slot))
                });
            let least = open.min_by(|(a, ..), (b, ..)| {
                let first = a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
                first.then(a.2.cmp(&b.2)).then(a.3.total_cmp(&b.3))
            });
            let Some((_, device, slot)) = least else { break };
            slots.put(slot, expert);
            self.enter(expert, device, &held);
        }
    }

    fn refresh(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}
