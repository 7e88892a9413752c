//! Measures by which a device is chosen for one more copy: its time, its partners, losses, or all windows.

use super::longest_first::Burden;
use super::{LEAST, time_key};
use crate::layer::terms::balance::Balance;
use crate::layer::terms::losses::AfterLosses;
use crate::layer::{EMPTY, Layer, Site, Slots};
use crate::tournament::Tournament;

/// Devices by the time that their copies take, under one load of every expert.
pub(super) struct TimeBurden<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    /// Devices with free slots.
    open: Tournament<u64>,
    /// Key of the device that was chosen last, and keys of devices that were skipped, as they may not take the expert.
    chosen: u64,
    skipped: Vec<u64>,
}

impl<'a> TimeBurden<'a> {
    /// Builds the burden of devices that hold some copies already.
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        Self { site, load, copies, open: open(slots, site, load), chosen: u64::MAX, skipped: Vec::new() }
    }
}

/// Returns devices with free slots, by the time that their copies take.
fn open(slots: &Slots, site: &Site, load: &[f64]) -> Tournament<u64> {
    let times = slots.times_and_loads(site, load).0;
    // Among idle devices the fastest comes first.
    let key = |g: usize| {
        let is_open = slots.of(g).any(|slot| slots.expert_in[slot] == EMPTY);
        if is_open { time_key(times[g] + LEAST * site.time[g], g) } else { u64::MAX }
    };
    Tournament::new((0..site.devices()).map(key), u64::MAX)
}

impl Burden for TimeBurden<'_> {
    #[inline]
    fn lightest(&mut self, _: &Slots, _: u16, may_take: impl Fn(usize) -> bool) -> Option<usize> {
        let device = loop {
            let key = self.open.get();
            let device = (key & 0xffff) as usize;
            if key == u64::MAX {
                break None;
            }
            if may_take(device) {
                self.chosen = key;
                break Some(device);
            }
            self.skipped.push(key);
            self.open.set(device, u64::MAX);
        };
        for key in self.skipped.drain(..) {
            self.open.set((key & 0xffff) as usize, key);
        }
        device
    }

    #[inline]
    fn add_copy(&mut self, _: &Slots, expert: u16, device: usize, is_full: bool) {
        let weight = self.load[usize::from(expert)] / f64::from(self.copies[usize::from(expert)]);
        let then = time_key(f64::from_bits(self.chosen) + weight * self.site.time[device], device);
        self.open.set(device, if is_full { u64::MAX } else { then });
    }

    fn recount(&mut self, slots: &Slots) {
        self.open = open(slots, self.site, self.load);
    }
}

/// Devices by their partners, the devices that hold copies of the same experts; for a dispatcher that divides tokens over
/// copies.
///
/// A set of devices is slow if much of its load is of experts that have no copy outside the set. So the heaviest experts
/// get copies, equally many on every device, and no two experts have copies on the same two devices as long as there are
/// other pairs. Partners join all devices: a device with too much load can pass it on to all others, even after loads have
/// changed. With 288 slots on 32 devices the joined devices form rings.
pub(super) struct PartnerBurden<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    /// Load of every device under an even split, and its filled slots `[D]`.
    loads: Vec<f64>,
    used: Vec<usize>,
    /// Number of experts that two devices share `[D, D]`, and the component of partners that a device is in, by the number
    /// of one of its devices `[D]`.
    shared: Vec<u32>,
    component: Vec<usize>,
}

impl<'a> PartnerBurden<'a> {
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let devices = site.devices();
        let (loads, used) = (vec![0.0; devices], vec![0; devices]);
        let (shared, component) = (vec![0; devices * devices], (0..devices).collect());
        let mut burden = Self { site, load, copies, loads, used, shared, component };
        for expert in 0..load.len() as u16 {
            for device in slots.devices(expert) {
                let earlier = slots.devices(expert).take_while(|&other| other < device);
                burden.count(expert, usize::from(device), earlier.map(usize::from));
            }
        }
        burden
    }

    /// Adds a copy on a device, given the devices that hold the other copies of the expert.
    fn count(&mut self, expert: u16, device: usize, holders: impl Iterator<Item = usize>) {
        let devices = self.loads.len();
        self.used[device] += 1;
        self.loads[device] +=
            self.load[usize::from(expert)] / f64::from(self.copies[usize::from(expert)].max(1));
        for other in holders {
            self.shared[device * devices + other] += 1;
            self.shared[other * devices + device] += 1;
            let (from, to) = (self.component[device], self.component[other]);
            self.component.iter_mut().filter(|first| **first == from).for_each(|first| *first = to);
        }
    }

    /// Returns the burden of one more copy of an expert on a device. It has four numbers, of which the first counts most:
    /// experts that the device already shares with the holders, its part of filled slots, holders in its component, and its
    /// time.
    fn key(&self, slots: &Slots, expert: u16, device: usize) -> (u32, f64, usize, f64) {
        let time = self.loads[device] * self.site.time[device];
        if self.copies[usize::from(expert)] == 1 {
            return (0, 0.0, 0, time);
        }
        let holders = || slots.devices(expert).map(usize::from);
        let shared = holders().map(|other| self.shared[device * self.loads.len() + other]).sum();
        let filled = self.used[device] as f64 / self.site.capacity[device] as f64;
        let joined = holders().filter(|&other| self.component[other] == self.component[device]).count();
        (shared, filled, joined, time)
    }
}

impl Burden for PartnerBurden<'_> {
    fn lightest(&mut self, slots: &Slots, expert: u16, may_take: impl Fn(usize) -> bool) -> Option<usize> {
        let open = (0..self.loads.len()).filter(|&device| may_take(device));
        let keys = open.map(|device| (self.key(slots, expert, device), device));
        let least = keys.min_by(|(a, _), (b, _)| {
            let first = a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
            first.then(a.2.cmp(&b.2)).then(a.3.total_cmp(&b.3))
        });
        least.map(|(_, device)| device)
    }

    fn add_copy(&mut self, slots: &Slots, expert: u16, device: usize, _: bool) {
        let holders = slots.devices(expert).map(usize::from).filter(|&other| other != device);
        self.count(expert, device, holders);
    }

    fn recount(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}

/// Weight of a device's load after a loss, beside its load before.
const WEIGHT: f64 = 2.0;

/// Devices by the time of their load, and of what they get if a domain with another copy of the expert is lost.
///
/// If copies went by load alone, a device would share all of its experts with few partners, which would get all of its load.
pub(super) struct LossBurden<'a> {
    site: &'a Site,
    load: &'a [f64],
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    after: AfterLosses,
}

impl<'a> LossBurden<'a> {
    pub(super) fn new(slots: &Slots, site: &'a Site, load: &'a [f64], copies: &'a [u32]) -> Self {
        let devices: Vec<u16> = (0..site.devices() as u16).collect();
        let domain = if site.rules.domain.is_empty() { &devices } else { &site.rules.domain };
        let after = AfterLosses::all_served(&site.time, domain, load.iter().sum());
        let mut burden = Self { site, load, copies, after };
        for expert in 0..load.len() as u16 {
            let holders: Vec<usize> = slots.devices(expert).map(usize::from).collect();
            burden.count(expert, &holders, 1.0);
        }
        burden
    }

    /// Adds copies of an expert, or removes them with the sign -1.
    fn count(&mut self, expert: u16, holders: &[usize], sign: f64) {
        let (load, copies) = (self.load[usize::from(expert)], self.copies[usize::from(expert)] as usize);
        self.after.count(load, copies, holders, sign);
    }

    /// Returns the time of a device that takes a copy with a share of the load, after the worst loss of a domain with another
    /// copy, which adds `added` to the share.
    fn time_after_loss(&self, slots: &Slots, expert: u16, device: usize, (share, added): (f64, f64)) -> f64 {
        let domain = &self.after.domain;
        let lost = slots.devices(expert).map(|other| domain[usize::from(other)]);
        let lost = lost.filter(|&lost| lost != domain[device]);
        let worst = lost.map(|lost| self.after.added_to(device)[lost] + added).fold(0.0, f64::max);
        (self.after.loads[device] + share + WEIGHT * worst) * self.site.time[device]
    }
}

impl Burden for LossBurden<'_> {
    fn lightest(&mut self, slots: &Slots, expert: u16, may_take: impl Fn(usize) -> bool) -> Option<usize> {
        let (load, copies) = (self.load[usize::from(expert)], f64::from(self.copies[usize::from(expert)]));
        let shares = (load / copies, if copies > 1.0 { load / (copies * (copies - 1.0)) } else { 0.0 });
        let open = (0..self.site.devices()).filter(|&device| may_take(device));
        let times = open.map(|device| (self.time_after_loss(slots, expert, device, shares), device));
        times.min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, device)| device)
    }

    fn add_copy(&mut self, slots: &Slots, expert: u16, device: usize, _: bool) {
        let holders: Vec<usize> = slots.devices(expert).map(usize::from).collect();
        let others: Vec<usize> = holders.iter().copied().filter(|&other| other != device).collect();
        self.count(expert, &others, -1.0);
        self.count(expert, &holders, 1.0);
    }

    fn recount(&mut self, slots: &Slots) {
        *self = Self::new(slots, self.site, self.load, self.copies);
    }
}

/// Devices by the powers of their loads in all windows: a copy goes where the other windows leave capacity for it.
pub(super) struct NormBurden<'a> {
    layer: &'a Layer,
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    balance: Balance<'a>,
    /// Devices that may take the expert at hand `[D]`.
    may: Vec<bool>,
}

impl<'a> NormBurden<'a> {
    pub(super) fn new(slots: &Slots, layer: &'a Layer, copies: &'a [u32]) -> Self {
        let may = vec![false; layer.devices()];
        Self { layer, copies, balance: Balance::new(layer, slots, copies), may }
    }
}

impl Burden for NormBurden<'_> {
    fn lightest(&mut self, _: &Slots, expert: u16, may_take: impl Fn(usize) -> bool) -> Option<usize> {
        for (device, may) in self.may.iter_mut().enumerate() {
            *may = may_take(device);
        }
        self.balance.best_device(expert, &self.may)
    }

    fn add_copy(&mut self, _: &Slots, expert: u16, device: usize, _: bool) {
        self.balance.add_copy(device, expert);
    }

    fn recount(&mut self, slots: &Slots) {
        self.balance = Balance::new(self.layer, slots, self.copies);
    }
}
