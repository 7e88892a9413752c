//! What devices serve where a dispatcher divides every window's tokens over copies so that the slowest device is done as
//! soon as can be, as a linear programme does.
//!
//! The least time is `max over sets of devices of (load of experts whose copies are all in the set) / (rate of the set)`
//! (Hall, 1935). It is found from below (Newton's steps on the parameter, Dinkelbach 1967): at a time that is too short a
//! flow from experts to devices leaves tokens over, and the least cut names a set that needs longer.

use rayon::prelude::*;

/// Parts of the load by which sums of floats may be off.
const ROUNDING: f64 = 1e-12;
/// Steps of Newton's method at most; each names a set that needs strictly longer, and few are met.
const STEPS: usize = 100;

/// The copies of a layer: devices of every expert `[E]`, each once.
#[derive(Debug)]
pub struct Copies {
    devices: Vec<Vec<u32>>,
    /// What a device does in a time `[D]`.
    rate: Vec<f64>,
}

impl Copies {
    /// Reads slots `[D, S]`; what is no expert is nothing.
    #[must_use]
    pub fn new(slots: &[i32], width: usize, experts: usize, rate: &[f64]) -> Self {
        let mut devices: Vec<Vec<u32>> = vec![vec![]; experts];
        for (device, held) in (0..).zip(slots.chunks_exact(width)) {
            for &expert in held {
                if let Some(holders) = usize::try_from(expert).ok().and_then(|e| devices.get_mut(e))
                    && holders.last() != Some(&device)
                {
                    holders.push(device);
                }
            }
        }
        Self { devices, rate: rate.to_vec() }
    }

    /// Tokens of every device `[D]`, of loads of experts `[E]`: the slowest is done as soon as can be.
    #[must_use]
    pub fn serve(&self, load: &[f64]) -> Vec<f64> {
        let mut alone = vec![0.0; self.rate.len()];
        let mut shared = vec![];
        for (devices, &load) in self.devices.iter().zip(load) {
            match devices[..] {
                [] => {}
                [device] => alone[device as usize] += load,
                _ if load > 0.0 => shared.push((load, &devices[..])),
                _ => {}
            }
        }
        let total: f64 = alone.iter().sum::<f64>() + shared.iter().map(|(load, _)| load).sum::<f64>();
        let slowest = alone.iter().zip(&self.rate).map(|(load, rate)| load / rate).fold(0.0, f64::max);
        let mut time = (total / self.rate.iter().sum::<f64>()).max(slowest);
        let mut flow = Flow::new(&shared, self.rate.len());
        for _ in 0..STEPS {
            let room = alone.iter().zip(&self.rate).map(|(load, rate)| (time * rate - load).max(0.0));
            let left = flow.fill(&shared, room);
            if left <= total * ROUNDING {
                break;
            }
            let needed = flow.time_of_cut(&shared, &alone, &self.rate);
            if needed <= time * (1.0 + ROUNDING) {
                break;
            }
            time = needed;
        }
        for ((_, devices), served) in shared.iter().zip(&flow.served) {
            for (&device, tokens) in devices.iter().zip(served) {
                alone[device as usize] += tokens;
            }
        }
        alone
    }
}

/// A flow of tokens from experts to devices, of Dinic's algorithm (1970).
struct Flow {
    /// Tokens that every copy of an expert serves `[expert][copy]`, and tokens that none serves yet `[expert]`.
    served: Vec<Vec<f64>>,
    left: Vec<f64>,
    /// What devices can do still `[D]`.
    room: Vec<f64>,
    /// Experts, with the number of the copy, by device.
    holds: Vec<Vec<(u32, u32)>>,
    /// Steps from a token that is left, of experts and of devices; none where there is no way.
    level: [Vec<u32>; 2],
}

/// Where there is no way.
const FAR: u32 = u32::MAX;
const EXPERT: usize = 0;
const DEVICE: usize = 1;

impl Flow {
    fn new(shared: &[(f64, &[u32])], devices: usize) -> Self {
        let mut holds = vec![vec![]; devices];
        for (expert, (_, held)) in (0..).zip(shared) {
            for (copy, &device) in (0..).zip(*held) {
                holds[device as usize].push((expert, copy));
            }
        }
        Self {
            served: shared.iter().map(|(_, held)| vec![0.0; held.len()]).collect(),
            left: vec![0.0; shared.len()],
            room: vec![],
            holds,
            level: [vec![FAR; shared.len()], vec![FAR; devices]],
        }
    }

    /// Sends as many tokens as devices have room for; the sum of those that are left.
    fn fill(&mut self, shared: &[(f64, &[u32])], room: impl Iterator<Item = f64>) -> f64 {
        for served in &mut self.served {
            served.fill(0.0);
        }
        self.left.clear();
        self.left.extend(shared.iter().map(|(load, _)| load));
        self.room.clear();
        self.room.extend(room);
        while self.find_levels(shared) {
            let mut next = [vec![0; self.left.len()], vec![0; self.room.len()]];
            for expert in 0..self.left.len() {
                let rest = self.left[expert];
                if self.level[EXPERT][expert] == 0 {
                    self.left[expert] -= self.send(shared, EXPERT, expert, rest, &mut next);
                }
            }
        }
        // What rounding leaves is nobody's; else it would be lost.
        let left = self.left.iter().sum();
        for (served, left) in self.served.iter_mut().zip(&self.left) {
            served[0] += left;
        }
        left
    }

    /// Finds the steps to all; whether some device has room that can be reached.
    fn find_levels(&mut self, shared: &[(f64, &[u32])]) -> bool {
        self.level.iter_mut().for_each(|level| level.fill(FAR));
        let mut queue: Vec<(usize, usize)> = vec![];
        for (expert, (&left, (load, _))) in self.left.iter().zip(shared).enumerate() {
            if left > load * ROUNDING {
                self.level[EXPERT][expert] = 0;
                queue.push((EXPERT, expert));
            }
        }
        let (mut at, mut found) = (0, false);
        while let Some(&(kind, node)) = queue.get(at) {
            at += 1;
            let level = self.level[kind][node] + 1;
            if kind == EXPERT {
                for &device in shared[node].1 {
                    let device = device as usize;
                    if self.level[DEVICE][device] == FAR {
                        self.level[DEVICE][device] = level;
                        found |= self.room[device] > 0.0;
                        queue.push((DEVICE, device));
                    }
                }
            } else {
                for &(expert, copy) in &self.holds[node] {
                    let expert = expert as usize;
                    let has = self.served[expert][copy as usize] > shared[expert].0 * ROUNDING;
                    if has && self.level[EXPERT][expert] == FAR {
                        self.level[EXPERT][expert] = level;
                        queue.push((EXPERT, expert));
                    }
                }
            }
        }
        found
    }

    /// Sends so many tokens at most on from an expert, or a device; how many.
    fn send(
        &mut self,
        shared: &[(f64, &[u32])],
        kind: usize,
        node: usize,
        tokens: f64,
        next: &mut [Vec<usize>; 2],
    ) -> f64 {
        let (mut sent, level) = (0.0, self.level[kind][node].saturating_add(1));
        if kind == DEVICE {
            sent = tokens.min(self.room[node]);
            self.room[node] -= sent;
        }
        let ways = if kind == EXPERT { shared[node].1.len() } else { self.holds[node].len() };
        while sent < tokens && next[kind][node] < ways {
            let way = next[kind][node];
            let rest = tokens - sent;
            let more = if kind == EXPERT {
                let device = shared[node].1[way] as usize;
                let is_on = self.level[DEVICE][device] == level;
                let more = if is_on { self.send(shared, DEVICE, device, rest, next) } else { 0.0 };
                self.served[node][way] += more;
                more
            } else {
                let (expert, copy) = self.holds[node][way];
                let (expert, copy) = (expert as usize, copy as usize);
                let has = self.served[expert][copy];
                let is_on = self.level[EXPERT][expert] == level && has > shared[expert].0 * ROUNDING;
                let limit = rest.min(has);
                let more = if is_on { self.send(shared, EXPERT, expert, limit, next) } else { 0.0 };
                self.served[expert][copy] -= more;
                more
            };
            sent += more;
            if sent < tokens {
                next[kind][node] += 1;
            }
        }
        sent
    }

    /// The time that the devices need which the tokens that are left can reach: theirs alone are all that come there.
    fn time_of_cut(&self, shared: &[(f64, &[u32])], alone: &[f64], rate: &[f64]) -> f64 {
        let reached = |device: &usize| self.level[DEVICE][*device] != FAR;
        let devices = (0..rate.len()).filter(reached);
        let (load, rate) =
            devices.fold((0.0, 0.0), |(load, sum), device| (load + alone[device], sum + rate[device]));
        let inside = shared.iter().zip(&self.level[EXPERT]).filter(|(_, level)| **level != FAR);
        let shared: f64 = inside.map(|((load, _), _)| load).sum();
        (load + shared) / rate
    }
}

/// Tokens of every device `[W, L, D]`, of loads of `experts` `[W, L, E]` and slots `[L, D, S]`.
#[must_use]
pub fn serve(
    slots: &[i32],
    [layers, devices, width]: [usize; 3],
    load: &[f64],
    experts: usize,
    rate: &[f64],
) -> Vec<f64> {
    let of_layer = |slots: &[i32]| Copies::new(slots, width, experts, rate);
    let layer: Vec<Copies> = slots.chunks_exact(devices * width).map(of_layer).collect();
    let rows = load.par_chunks_exact(experts).enumerate();
    let served: Vec<Vec<f64>> = rows.map(|(row, load)| layer[row % layers].serve(load)).collect();
    served.concat()
}
