//! Finds the nearest placement that keeps the rules: the devices of experts for which the fewest copies move.
//!
//! This is a flow of least cost: a copy goes from its expert by one of its failure domains, at most once by each, to a
//! device with a slot. It costs a move where the device does not hold the expert yet. The flow grows by one copy after the
//! other, along a shortest path on which copies of others may move on (successive shortest paths: Ford and Fulkerson,
//! *Flows in Networks*, 1962, III.3).

use std::cmp::Reverse;

use super::{NoSlot, Placed};
use crate::control::Control;
use crate::layer::Site;

/// The cost of a copy where it may not be.
const NEVER: i32 = i32::MAX / 2;

/// Returns whether devices are to hold experts `[D, E]`; as many copies as can stay remain where they are `running`.
///
/// An expert gets its pins and as many copies as it must have, each in a failure domain of its own. With `full`, slots
/// that would be empty are to be filled anyway: a copy that moves there costs nothing. A search that is stopped
/// leaves experts without a slot.
pub fn nearest(site: &Site, running: &[bool], full: bool, control: &Control) -> Placed<Vec<bool>> {
    let (devices, wanted) = (site.devices(), site.rules.min_copies as usize);
    let experts = running.len() / devices.max(1);
    let mut flow = Flow::new(site, running, full);
    // Copies that experts need beyond the failure domains where they have one.
    let served = flow.is_served.chunks_exact(flow.domains.max(1));
    let lacks =
        |served: &[bool]| wanted.saturating_sub(served.iter().filter(|is_served| **is_served).count());
    let mut lacking: Vec<usize> = served.map(lacks).collect();
    flow.add_free(&mut lacking);
    for (expert, &copies) in lacking.iter().enumerate() {
        for _ in 0..copies {
            if !control.stopped() {
                flow.add(expert)?;
            }
        }
    }
    let mut holds = vec![false; running.len()];
    for (e, g) in site.rules.pins(devices) {
        holds[g * experts + usize::from(e)] = true;
    }
    for (place, copies) in flow.copies.iter().enumerate() {
        for &expert in copies {
            holds[place % devices * experts + expert] = true;
        }
    }
    Ok(holds)
}

/// A copy on a path: its expert, the place that it leaves, and the one that it goes to.
type Hop = (usize, usize, usize);

/// A flow of copies to places. Every device is two of them: slots that need not be full, and behind those of all devices
/// the slots that would be empty and are to be full.
struct Flow {
    /// Cost of a copy of an expert in a place `[E, G]`: 1 for a move, 0 for none, [`NEVER`] where it may not be.
    cost: Vec<i32>,
    /// Places with slots in which a copy of an expert costs nothing `[E]`.
    free_places: Vec<Vec<usize>>,
    /// Number of free slots of every place `[G]`.
    free_slots: Vec<usize>,
    /// Failure domain of every place `[G]`, and how many there are.
    domain: Vec<usize>,
    domains: usize,
    /// True if an expert has a copy in a failure domain, and needs no other there `[E, F]`.
    is_served: Vec<bool>,
    /// Experts of the copies in every place, in ascending order, without pinned ones `[G]`.
    copies: Vec<Vec<usize>>,
}

impl Flow {
    /// Returns a flow without copies, in which pinned copies have taken their slots.
    fn new(site: &Site, running: &[bool], full: bool) -> Self {
        let (devices, rules) = (site.devices(), &site.rules);
        let experts = running.len() / devices.max(1);
        let domain = rules.copy_domains(devices).repeat(2);
        let domains = domain.iter().max().map_or(0, |last| last + 1);
        let mut cost = vec![NEVER; experts * 2 * devices];
        let (mut is_pinned, mut is_served) = (vec![false; experts * devices], vec![false; experts * domains]);
        let (mut pinned, mut staying) = (vec![0; devices], vec![0; devices]);
        for (e, g) in rules.pins(devices) {
            is_pinned[usize::from(e) * devices + g] = true;
            is_served[usize::from(e) * domains + domain[g]] = true;
            pinned[g] += 1;
        }
        for (e, of_expert) in cost.chunks_exact_mut(2 * devices).enumerate() {
            for g in 0..devices {
                if !is_pinned[e * devices + g] && !rules.forbids(e as u16, g, devices) {
                    let stays = running[g * experts + e];
                    staying[g] += usize::from(stays);
                    of_expert[g] = i32::from(!stays);
                    of_expert[devices + g] = if stays { NEVER } else { 0 };
                }
            }
        }
        let gaps = |g: usize| {
            if full { site.capacity[g].saturating_sub(pinned[g] + staying[g]) } else { 0 }
        };
        let other = |g: usize| site.capacity[g].saturating_sub(pinned[g] + gaps(g));
        let free_slots: Vec<usize> = (0..devices).map(other).chain((0..devices).map(gaps)).collect();
        let is_free = |costs: &[i32], place: &usize| free_slots[*place] > 0 && costs[*place] == 0;
        let free_of = |costs: &[i32]| (0..2 * devices).filter(|place| is_free(costs, place)).collect();
        let free_places = cost.chunks_exact((2 * devices).max(1)).map(free_of).collect();
        Self { cost, free_places, free_slots, domain, domains, is_served, copies: vec![vec![]; 2 * devices] }
    }

    fn places(&self) -> usize {
        self.free_slots.len()
    }

    /// Returns whether an expert may have another copy in a place, beside those that it has.
    fn may_enter(&self, expert: usize, place: usize) -> bool {
        !self.is_served[expert * self.domains + self.domain[place]]
    }

    fn cost(&self, expert: usize, place: usize) -> i32 {
        self.cost[expert * self.places() + place]
    }

    /// Returns the cost of another copy of an expert in every place `[G]`, if no other copy moves.
    fn entry_costs(&self, expert: usize) -> Vec<i32> {
        let cost = |place| if self.may_enter(expert, place) { self.cost(expert, place) } else { NEVER };
        (0..self.places()).map(cost).collect()
    }

    /// Returns the cheapest place with a free slot; of equals the one with the most free slots.
    fn cheapest(&self, costs: &[i32]) -> Option<usize> {
        let open = (0..costs.len()).filter(|&place| self.free_slots[place] > 0 && costs[place] < NEVER);
        open.min_by_key(|&place| (costs[place], Reverse(self.free_slots[place])))
    }

    fn insert(&mut self, expert: usize, place: usize) {
        let at = self.copies[place].partition_point(|&other| other < expert);
        self.copies[place].insert(at, expert);
        self.is_served[expert * self.domains + self.domain[place]] = true;
    }

    fn remove(&mut self, expert: usize, place: usize) {
        self.copies[place].retain(|&other| other != expert);
        self.is_served[expert * self.domains + self.domain[place]] = false;
    }

    /// Adds copies that cost nothing where a slot is free; `lacking` counts the copies that experts still need `[E]`.
    fn add_free(&mut self, lacking: &mut [usize]) {
        for (expert, copies) in lacking.iter_mut().enumerate() {
            while *copies > 0 {
                let costs = self.entry_costs(expert);
                let Some(place) = self.cheapest(&costs).filter(|&place| costs[place] == 0) else { break };
                self.free_slots[place] -= 1;
                self.insert(expert, place);
                *copies -= 1;
            }
        }
    }

    /// Adds a copy of an expert along the cheapest path, on which copies of others may move.
    fn add(&mut self, expert: usize) -> Placed<()> {
        let mut costs = self.entry_costs(expert);
        let least = costs.iter().copied().min().unwrap_or(NEVER);
        let mut via = vec![None; self.places()];
        let mut end = self.cheapest(&costs);
        // A copy of a full device moves at no gain, or it would have moved already.
        if end.is_none_or(|end| costs[end] > least) {
            self.find_shortest_paths(&mut costs, &mut via);
            end = self.cheapest(&costs);
        }
        let Some(end) = end else { return Err(NoSlot(expert)) };
        let (first, path) = self.trace_path(end, expert, &via);
        self.free_slots[end] -= 1;
        for &(other, from, _) in &path {
            self.remove(other, from);
        }
        for &(other, _, to) in &path {
            self.insert(other, to);
        }
        self.insert(expert, first);
        Ok(())
    }

    /// Lowers costs to those of shortest paths `[G]`, and records in `via` which copy moves to a place, and from where
    /// (Bellman, 1958).
    fn find_shortest_paths(&self, costs: &mut [i32], via: &mut [Option<(usize, usize)>]) {
        let holds = |place: &usize| !self.copies[*place].is_empty();
        let reached = |place: &usize| costs[*place] < NEVER;
        let mut lowered: Vec<usize> = (0..costs.len()).filter(holds).filter(reached).collect();
        while let Some(least) = lowered.iter().map(|&place| costs[place]).min() {
            let before = costs.to_vec();
            // A copy costs a move at most: with a further one there, all other places cost no less than now.
            let far: Vec<usize> = (0..costs.len()).filter(|&place| before[place] > least).collect();
            for &from in &lowered {
                for &expert in &self.copies[from] {
                    let cost_without = before[from] - self.cost(expert, from);
                    for &to in far.iter().chain(&self.free_places[expert]) {
                        // A copy stays in its domain, or goes to one in which its expert has none.
                        let may = self.domain[to] == self.domain[from] || self.may_enter(expert, to);
                        let cost = self.cost(expert, to);
                        if cost < NEVER && cost_without + cost < costs[to] && may {
                            costs[to] = cost_without + cost;
                            via[to] = Some((expert, from));
                        }
                    }
                }
            }
            let is_lower = |place: &usize| costs[*place] < before[*place];
            lowered = (0..costs.len()).filter(holds).filter(is_lower).collect();
        }
    }

    /// Returns the place that the new copy takes, and the moves of other copies along the path to `end`, the last one first.
    ///
    /// The path is read backwards, from `end` along `via` to the place where it begins.
    fn trace_path(&self, end: usize, expert: usize, via: &[Option<(usize, usize)>]) -> (usize, Vec<Hop>) {
        let changes_domain = |&(_, from, to): &Hop| self.domain[from] != self.domain[to];
        let (mut place, mut path): (_, Vec<Hop>) = (end, vec![]);
        while let Some((other, from)) = via[place] {
            let mut hop = (other, from, place);
            if changes_domain(&hop) {
                // Two copies of an expert would enter one domain, so a path moves an expert to another domain once. Moves between two
                // such moves are left out: they cost nothing.
                if other == expert {
                    break;
                }
                if let Some(later) = path.iter().position(|hop| hop.0 == other && changes_domain(hop)) {
                    hop.2 = path[later].2;
                    path.truncate(later);
                }
            }
            path.push(hop);
            place = from;
        }
        (place, path)
    }
}
