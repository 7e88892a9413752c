//! The bound against the optimum of small instances, found by trying everything.

use proptest::prelude::*;

use super::{Certificate, Instance, Kind, Limits, bound, verify};
use crate::control::Control;

/// An instance that owns its tables.
#[derive(Debug, Clone)]
struct Small {
    layers: usize,
    experts: usize,
    devices: usize,
    transitions: Vec<u64>,
    load: Vec<u64>,
    cap: Vec<u64>,
}

impl Small {
    fn view(&self) -> Instance<'_> {
        Instance {
            layers: self.layers,
            experts: self.experts,
            devices: self.devices,
            transitions: &self.transitions,
            load: &self.load,
            cap: &self.cap,
        }
    }

    /// Device of each expert, for every way to fill at most `ceil(E / D)` slots, up to the names of the devices.
    fn partitions(&self) -> Vec<Vec<usize>> {
        let slots = self.experts.div_ceil(self.devices);
        let mut all = vec![vec![]];
        for _ in 0..self.experts {
            let mut next = Vec::new();
            for partial in all {
                let used = partial.iter().max().map_or(0, |m| m + 1);
                for device in 0..self.devices.min(used + 1) {
                    if partial.iter().filter(|&&d| d == device).count() < slots {
                        next.push([partial.as_slice(), &[device]].concat());
                    }
                }
            }
            all = next;
        }
        all
    }

    fn largest(&self, l: usize, partition: &[usize]) -> u64 {
        let mut loads = vec![0; self.devices];
        for (&device, load) in partition.iter().zip(&self.load[l * self.experts..]) {
            loads[device] += load;
        }
        loads.into_iter().max().unwrap_or(0)
    }

    /// Raises each cap to what some placement can keep.
    fn make_feasible(mut self) -> Self {
        let all = self.partitions();
        for l in 0..self.layers {
            let least = all.iter().map(|p| self.largest(l, p)).min().unwrap_or(0);
            self.cap[l] = self.cap[l].max(least);
        }
        self
    }

    /// The fewest crossing transitions of any feasible placement.
    fn optimum(&self) -> u64 {
        let (e, all) = (self.experts, self.partitions());
        let names = permutations(self.devices);
        let feasible =
            |l: usize| all.iter().filter(move |p| self.largest(l, p) <= self.cap[l]).collect::<Vec<_>>();
        let mut before: Vec<(&Vec<usize>, u64)> = feasible(0).into_iter().map(|p| (p, 0)).collect();
        for l in 1..self.layers {
            let table = &self.transitions[(l - 1) * e * e..][..e * e];
            let total: u64 = table.iter().sum();
            let step = |p: &Vec<usize>, q: &Vec<usize>| {
                let mut inside = vec![0; self.devices * self.devices];
                for (i, t) in table.iter().enumerate() {
                    inside[p[i / e] * self.devices + q[i % e]] += t;
                }
                let inside_by = |names: &Vec<usize>| -> u64 {
                    names.iter().enumerate().map(|(a, b)| inside[a * self.devices + b]).sum()
                };
                total - names.iter().map(inside_by).max().unwrap_or(0)
            };
            let best =
                |q: &Vec<usize>| before.iter().map(|(p, cost)| cost + step(p, q)).min().unwrap_or(u64::MAX);
            before = feasible(l).into_iter().map(|q| (q, best(q))).collect();
        }
        before.into_iter().map(|(_, cost)| cost).min().unwrap_or(u64::MAX)
    }
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    (0..n).fold(vec![vec![]], |all, next| {
        let insert = |p: &Vec<usize>| {
            (0..=p.len()).map(|at| [&p[..at], &[next], &p[at..]].concat()).collect::<Vec<_>>()
        };
        all.iter().flat_map(insert).collect()
    })
}

/// Sizes whose partitions can be tried one by one.
const SIZES: [(usize, usize); 10] =
    [(4, 2), (6, 2), (8, 2), (6, 3), (9, 3), (8, 4), (4, 4), (5, 2), (7, 3), (5, 4)];

fn small() -> impl Strategy<Value = Small> {
    (0..SIZES.len(), 2usize..=4, 105u64..200, prop::bool::weighted(0.8)).prop_flat_map(
        |(size, layers, percent, capped)| {
            let (experts, devices) = SIZES[size];
            // Squares make a few large counts and many small ones.
            let transitions =
                prop::collection::vec((0u64..40).prop_map(|x| x * x), (layers - 1) * experts * experts);
            let load = prop::collection::vec((1u64..30).prop_map(|x| x * x), layers * experts);
            (transitions, load).prop_map(move |(transitions, load)| {
                let cap = load.chunks(experts).map(|load| {
                    let total: u64 = load.iter().sum();
                    if capped { total * percent / (100 * devices as u64) } else { u64::MAX }
                });
                let cap = cap.collect();
                Small { layers, experts, devices, transitions, load, cap }.make_feasible()
            })
        },
    )
}

fn limits(iterations: usize, control: &Control) -> Limits<'_> {
    Limits { iterations, target: None, gap: 0.0, control }
}

fn solve(small: &Small, iterations: usize) -> super::Bound {
    let control = Control::new(None);
    bound(&small.view(), &limits(iterations, &control), |_| {}).expect("the instance is well formed")
}

/// The same where contents count as too many, as they do in large layers.
fn solve_without_contents(small: &Small, iterations: usize) -> super::Bound {
    let control = Control::new(None);
    let mut relaxation = super::Relaxation::new(&small.view());
    relaxation.has_contents = false;
    super::search(&relaxation, &limits(iterations, &control), |_| {})
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// However early the method stops, no placement is below the bound, and the certificate says the same.
    #[test]
    fn never_above_the_optimum(small in small()) {
        let optimum = small.optimum();
        for iterations in [0, 1, 10, 50] {
            let bound = solve(&small, iterations);
            prop_assert!(bound.cost <= optimum, "{} after {iterations} is above {optimum}", bound.cost);
            prop_assert_eq!(verify(&small.view(), &bound.certificate).expect("own certificate"), bound.cost);
        }
    }

    /// The same for cuts alone.
    #[test]
    fn never_above_the_optimum_without_contents(small in small()) {
        prop_assume!(small.optimum() > 0 && small.layers > 1);
        let bound = solve_without_contents(&small, 60);
        prop_assert!(bound.cost <= small.optimum());
        prop_assert!(bound.certificate.contents.is_empty());
        prop_assert_eq!(verify(&small.view(), &bound.certificate).expect("own certificate"), bound.cost);
    }

    /// Whatever is done to its numbers, a certificate that is accepted proves nothing false.
    #[test]
    fn tampering_proves_nothing_false(
        small in small(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<f64>(), -3.0f64..3.0, 0u8..6), 1..40),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0i32..9, 0i32..18, any::<u8>()), 0..10),
        scale in prop_oneof![Just(1.0), Just(1.03), Just(0.5), Just(-1.0), Just(1e6), Just(1e200)],
    ) {
        let optimum = small.optimum();
        let honest = solve(&small, 30).certificate;
        let mut forged = honest.clone();
        forged.lambda.iter_mut().for_each(|x| *x *= scale);
        forged.contents.iter_mut().for_each(|x| *x *= scale);
        for (index, wild, mild, what) in &edits {
            let array = match *what % 3 {
                0 => &mut forged.lambda,
                1 => &mut forged.multipliers,
                _ => &mut forged.contents,
            };
            if !array.is_empty() {
                let at = index.index(array.len());
                let x = &mut array[at];
                *x = if *what < 3 { *x + mild } else { *wild };
            }
        }
        let cost = verify(&small.view(), &forged).expect("shapes are intact");
        prop_assert!(cost <= optimum, "{cost} is above {optimum}");
        for (index, value, item, choice) in cuts {
            if !forged.cuts.is_empty() {
                let at = index.index(forged.cuts.len());
                forged.cuts[at] = if at % 5 == 0 { value } else { item };
            }
            if !forged.choices.is_empty() {
                let at = index.index(forged.choices.len());
                forged.choices[at] = choice;
            }
        }
        // Most of these are refused; what passes must be true.
        if let Ok(cost) = verify(&small.view(), &forged) {
            prop_assert!(cost <= optimum, "{cost} is above {optimum}");
        }
    }

    /// Every kind of cut holds at every feasible placement, whatever its choices: random ones with a large multiplier.
    #[test]
    fn single_cuts_are_true(
        small in small(),
        kind in 0i32..9,
        items in prop::array::uniform3(0i32..18),
        choices in prop::collection::vec(0u8..3, 16),
        multiplier in prop_oneof![Just(1.0), Just(100.0)],
    ) {
        let optimum = small.optimum();
        let experts = small.experts.div_ceil(small.devices) * small.devices;
        let lifted = Kind::ALL[kind as usize].is_lifted();
        let forged = Certificate {
            cuts: vec![kind, 0, items[0], items[1] % if kind < 3 && kind > 0 { 2 } else { 18 }, items[2] % 2 * i32::from(lifted) + items[2] * i32::from(!lifted)],
            multipliers: vec![multiplier],
            choices: if lifted { choices[..experts].to_vec() } else { vec![] },
            ..Certificate::default()
        };
        if let Ok(cost) = verify(&small.view(), &forged) {
            prop_assert!(cost <= optimum, "{cost} is above {optimum}");
        }
    }
}

/// Numbers from a fixed generator.
fn noise(count: usize, below: u64, seed: u64) -> Vec<u64> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn medium(layers: usize, experts: usize, devices: usize) -> Small {
    let load = noise(layers * experts, 1000, 7);
    let cap = load.chunks(experts).map(|w| w.iter().sum::<u64>() * 11 / (10 * devices as u64)).collect();
    let transitions = noise((layers - 1) * experts * experts, 1000, 9);
    Small { layers, experts, devices, transitions, load, cap }
}

/// The same bits on any number of threads.
#[test]
fn threads_do_not_matter() {
    let small = medium(7, 16, 4);
    let solve_on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| solve(&small, 45))
    };
    let one = solve_on(1);
    assert!(one.cost > 0);
    for threads in [2, 5] {
        let other = solve_on(threads);
        assert_eq!(one.cost, other.cost);
        assert!(one.certificate == other.certificate, "{threads} threads");
    }
}

/// The progress reports rise, and the last is the result.
#[test]
fn reports_rise() {
    let small = medium(5, 12, 3);
    let control = Control::new(None);
    let mut seen = Vec::new();
    let result = bound(&small.view(), &limits(60, &control), |cost| seen.push(cost)).expect("well formed");
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&result.cost));
}

/// One layer, one device, empty tables: nothing to prove, and no fault.
#[test]
fn trivial() {
    for mut small in [medium(1, 8, 2), medium(3, 6, 1), medium(3, 6, 2)] {
        if small.devices == 2 && small.layers == 3 {
            small.transitions.fill(0);
        }
        let result = solve(&small, 20);
        assert_eq!(result.cost, 0);
        assert_eq!(verify(&small.view(), &result.certificate), Ok(0));
    }
}

/// One expert per device: the relaxation's optimum is that of the assignment problems.
#[test]
fn one_expert_per_device() {
    let mut small = medium(3, 4, 4);
    small.cap.fill(u64::MAX);
    let optimum = small.optimum();
    let result = solve(&small, 300);
    assert!(
        result.cost <= optimum && result.cost as f64 > 0.98 * optimum as f64,
        "{} {optimum}",
        result.cost
    );
}

/// A layer without traffic, loads of zero, dummies and giant counts pass through.
#[test]
fn degenerate() {
    let mut quiet = medium(4, 6, 3);
    quiet.transitions[36..72].fill(0);
    quiet.load[6..12].fill(0);
    quiet.cap[1] = 0;
    let mut uneven = medium(3, 7, 3);
    uneven.cap.fill(u64::MAX);
    let mut giant = medium(3, 6, 2);
    giant.transitions[5] = 1 << 62;
    giant.load[3] = 1 << 62;
    giant.cap[0] = u64::MAX - 1;
    for small in [quiet, uneven, giant] {
        let small = small.make_feasible();
        let (optimum, result) = (small.optimum(), solve(&small, 60));
        assert!(result.cost <= optimum, "{} {optimum}", result.cost);
        assert_eq!(verify(&small.view(), &result.certificate), Ok(result.cost));
    }
}

/// A set flag ends the search, with a valid result.
#[test]
fn stops_when_asked() {
    let small = medium(3, 8, 2);
    let control = Control::new(None);
    control.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let result = bound(&small.view(), &limits(1000, &control), |_| {}).expect("well formed");
    assert_eq!((result.end, result.iterations), ("interrupted", 0));
}

/// Wrong shapes are said, not crashed on.
#[test]
fn shapes_are_checked() {
    let small = medium(3, 8, 2);
    let control = Control::new(None);
    let short = Instance { cap: &[], ..small.view() };
    assert!(bound(&short, &limits(1, &control), |_| {}).is_err());
    let many = Instance { devices: 9, ..small.view() };
    assert!(bound(&many, &limits(1, &control), |_| {}).is_err());
    let result = solve(&small, 20);
    let broken = Certificate { lambda: vec![0.0; 3], ..result.certificate.clone() };
    assert!(verify(&small.view(), &broken).is_err());
    let mut broken = result.certificate;
    broken.choices.clear();
    broken.cuts[0] = 99;
    assert!(verify(&small.view(), &broken).is_err());
}
