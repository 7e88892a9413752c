//! What a placement of a layer keeps, whatever it costs: what a device may hold, what may leave it, how many copies there
//! must and may be, and the cap on a device's load.
//!
//! Searches know no rule: they ask [`super::Slots`], by `may_take`, `may_lose` and `may_move`, which ask [`Rules::allows`].

use super::Site;
use super::slots::{Edit, Slots};

/// The rules of a layer.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Devices where an expert must not be `[E, D]`; empty for none.
    pub forbidden: Vec<bool>,
    /// Devices where an expert must have a copy `[E, D]`; empty for none.
    pub pinned: Vec<bool>,
    /// Copies that every expert must have.
    pub min_copies: u32,
    /// Copies that an expert may have at the most, besides those that are pinned.
    pub max_copies: u32,
    /// Failure domain of every device `[D]`: an expert has copies in two of them; empty where one device may have all.
    pub domain: Vec<u16>,
    /// Largest load of a device, in time of the slowest device; infinite for none.
    pub cap: f64,
}

impl Default for Rules {
    /// Returns the rule that every expert has a copy, and no other rule.
    fn default() -> Self {
        Self {
            forbidden: vec![],
            pinned: vec![],
            min_copies: 1,
            max_copies: u32::MAX,
            domain: vec![],
            cap: f64::INFINITY,
        }
    }
}

/// Returns the value of a table of experts and devices; false if the table is empty.
#[inline(always)]
fn at(table: &[bool], expert: u16, [device, devices]: [usize; 2]) -> bool {
    !table.is_empty() && table[usize::from(expert) * devices + device]
}

impl Rules {
    /// Returns whether a change of slots keeps the rules of where an expert may be, and of how many copies it has.
    ///
    /// [`Slots`] checks that no device holds an expert twice, [`super::caps`] that loads keep the cap.
    #[inline(always)]
    pub(super) fn allows(&self, Edit { expert, from, to }: Edit, slots: &Slots, site: &Site) -> bool {
        let (copies, devices) = (slots.copies(expert), site.devices());
        let is_in = |table: &[bool], device: u16| at(table, expert, [usize::from(device), devices]);
        let may_leave = from.is_none_or(|device| !is_in(&self.pinned, device));
        let may_enter = to.is_none_or(|device| !is_in(&self.forbidden, device));
        let may_count = match (from, to) {
            (Some(_), None) => copies > self.min_copies,
            (None, Some(device)) => copies < self.max_copies || is_in(&self.pinned, device),
            _ => true,
        };
        may_leave && may_enter && may_count && self.may_spread(Edit { expert, from, to }, slots)
    }

    /// Returns whether a change of slots leaves an expert's copies in two domains, or brings it nearer to that.
    #[inline(always)]
    fn may_spread(&self, Edit { expert, from, to }: Edit, slots: &Slots) -> bool {
        if self.domain.is_empty() {
            return true;
        }
        let holders = || slots.devices(expert);
        let then = || holders().filter(move |&device| Some(device) != from).chain(to);
        if from.is_none() {
            // Further copies of an expert whose copies share a domain belong in other domains.
            return slots.copies(expert) == 0 || self.span_domains(then());
        }
        !self.span_domains(holders()) || self.span_domains(then())
    }

    /// Returns whether devices are in at least two failure domains.
    fn span_domains(&self, mut devices: impl Iterator<Item = u16>) -> bool {
        let domain = |device: u16| self.domain[usize::from(device)];
        devices.next().is_some_and(|first| devices.any(|device| domain(device) != domain(first)))
    }

    /// Returns whether an expert lacks a copy that it must have.
    #[inline(always)]
    pub(super) fn lacks_copy(&self, expert: u16, slots: &Slots) -> bool {
        let is_spread = self.domain.is_empty() || self.span_domains(slots.devices(expert));
        slots.copies(expert) < self.min_copies || !is_spread
    }

    /// Returns whether an expert must not be on a device.
    pub(super) fn forbids(&self, expert: u16, device: usize, devices: usize) -> bool {
        at(&self.forbidden, expert, [device, devices])
    }

    /// Returns a domain for every device `[D]`, each of which has at most one of the copies that an expert must have.
    pub(super) fn copy_domains(&self, devices: usize) -> Vec<usize> {
        match (self.min_copies, self.domain.is_empty()) {
            (_, false) => self.domain.iter().copied().map(usize::from).collect(),
            (0..=1, _) => vec![0; devices],
            // No device holds an expert twice.
            _ => (0..devices).collect(),
        }
    }

    /// Iterates over pinned experts and the devices where they must be.
    pub(super) fn pins(&self, devices: usize) -> impl Iterator<Item = (u16, usize)> + '_ {
        let pinned = (0..self.pinned.len()).filter(|&at| self.pinned[at]);
        pinned.map(move |at| ((at / devices) as u16, at % devices))
    }

    /// Returns how many copies each expert may have, besides those that are pinned, on devices of so many slots `[D]`.
    pub(super) fn max_copies_of<'a>(&'a self, capacity: &'a [usize]) -> impl Fn(usize) -> u32 + use<'a> {
        let devices = capacity.len();
        let used = capacity.iter().filter(|&&slots| slots > 0).count() as u32;
        move |expert| {
            if self.forbidden.is_empty() {
                return used.min(self.max_copies);
            }
            let may_hold = |&g: &usize| capacity[g] > 0 && !at(&self.forbidden, expert as u16, [g, devices]);
            ((0..devices).filter(may_hold).count() as u32).min(self.max_copies)
        }
    }
}
