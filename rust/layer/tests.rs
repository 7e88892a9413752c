//! Properties of all terms and searches on random layers: terms equal their definitions, searches keep rules and improve
//! starts.

use proptest::prelude::*;

use super::adapt::LoadChange;
use super::construct::{NoSlot, QUICK, fill, fill_by_sum, fill_by_windows, nearest};
use super::terms::balance::Balance;
use super::terms::fanout;
use super::terms::losses::{Losses, SingleLosses};
use super::terms::lp_split;
use super::terms::reading::{Reading, Weights};
use super::terms::together::pairs_of;
use super::terms::windows::{Measure, Windows};
use super::terms::{DEFINITIONS, Term, Terms, share};
use super::turns::{Effort, Heat, Links, place};
use super::{EMPTY, Layer, Move, Rules, Site, Slots, Split};
use crate::control::Control;
use crate::random::Random;
use crate::urn::visits_of_load;

/// Loads `[W, E]`, weights of windows, and expert sets with their tokens.
struct Traffic {
    load: Vec<f64>,
    weight: Vec<f64>,
    ids: Vec<u16>,
    counts: Vec<u64>,
}

/// Builds devices of different sizes and speeds on nodes of two, with or without rules.
fn site(random: &mut Random, experts: usize, devices: usize, rules: bool) -> Site {
    let mut capacity = vec![experts.div_ceil(devices); devices];
    for _ in 0..random.below(4) {
        capacity[random.below(devices)] += 1;
    }
    let mut rule = |one_in: usize| -> Vec<bool> {
        let is_ruled = rules && random.below(2) == 0;
        (0..experts * devices).map(|_| is_ruled && random.below(one_in) == 0).collect()
    };
    let rules = Rules { forbidden: rule(3), pinned: rule(12), ..Rules::default() };
    let time = (0..devices).map(|_| [1.0, 0.5][random.below(2)]).collect();
    let split = [Split::Even, Split::Nearest][random.below(2)];
    let node = (0..devices as u16).map(|device| device / 2).collect();
    Site { node, split, rules, ..Site::plain(capacity, time) }
}

fn traffic(random: &mut Random, experts: usize) -> Traffic {
    let windows = 1 + random.below(30);
    let load = (0..windows * experts).map(|_| (random.below(1000) * random.below(4)) as f64).collect();
    let weight = (0..windows).map(|_| [0.0, 0.5, 1.0, 2.0][random.below(4)]).collect();
    let top_k = 1 + random.below(experts.min(4));
    let counts: Vec<u64> = (0..random.below(100)).map(|_| random.below(2000) as u64).collect();
    let mut ids = Vec::new();
    for _ in &counts {
        let mut all: Vec<u16> = (0..experts as u16).collect();
        random.shuffle(&mut all);
        ids.extend(&all[..top_k]);
    }
    Traffic { load, weight, ids, counts }
}

fn layer(site: Site, traffic: &Traffic, experts: usize, measure: Measure) -> Layer {
    let total = (0..experts).map(|e| traffic.load.iter().skip(e).step_by(experts).sum()).collect();
    let windows = Windows::new(&traffic.load, &traffic.weight, experts, &site, measure);
    Layer::plain(site, total, windows)
}

/// Adds random prices of all kinds to a layer.
fn priced(random: &mut Random, mut layer: Layer, traffic: &Traffic) -> Layer {
    let (experts, copies) = (layer.experts, layer.slots() > layer.experts);
    let mut sets = fanout::Sets::new(&traffic.ids, &traffic.counts, experts, copies);
    (sets.device_cost, sets.node_cost) = (3.0, [0.0, 7.0][random.below(2)]);
    layer.costs.sets = Some(fanout::Sets::later(move || sets));
    for definition in DEFINITIONS {
        (definition.price)(random, &mut layer, &weighted(traffic, experts));
    }
    layer
}

/// Returns the loads of windows, times their weights `[W, E]`.
fn weighted(traffic: &Traffic, experts: usize) -> Vec<f64> {
    let rows = traffic.load.chunks(experts).zip(&traffic.weight);
    rows.flat_map(|(row, weight)| row.iter().map(move |load| load * weight)).collect()
}

/// Computes the cost of windows by definition, in weighted tokens.
fn window_cost(layer: &Layer, slots: &Slots, traffic: &Traffic) -> f64 {
    let (experts, devices) = (layer.experts, layer.devices());
    let rows: Vec<Vec<f64>> = weighted(traffic, experts).chunks(experts).map(<[f64]>::to_vec).collect();
    let parts: Vec<Vec<f64>> = (0..devices)
        .map(|g| (0..experts).map(|e| share(layer, slots, e, g) * layer.site.time[g]).collect())
        .collect();
    let times = |row: &[f64]| -> Vec<f64> {
        parts.iter().map(|part| part.iter().zip(row).map(|(part, tokens)| part * tokens).sum()).collect()
    };
    let Measure::Norm { noise, mixed } = layer.windows.measure else {
        return rows.iter().map(|row| times(row).into_iter().fold(0.0, f64::max)).sum();
    };
    // Loads are divided by the mean of a device.
    let rate = layer.site.rate();
    let total = |row: &[f64]| row.iter().sum::<f64>();
    let all: f64 = rows.iter().map(|row| total(row)).sum();
    let used: Vec<&Vec<f64>> = rows.iter().filter(|row| total(row) > 0.0).collect();
    let moment = |e: usize, power: i32| -> f64 {
        used.iter().map(|row| total(row) / all * (row[e] * rate / total(row)).powi(power)).sum()
    };
    // The variance of a constant load is a rounding error, which may be negative.
    let variance: Vec<f64> = (0..experts).map(|e| (moment(e, 2) - moment(e, 1).powi(2)).max(0.0)).collect();
    let pooled = total(&variance) / experts as f64 * 4.0 / used.len().max(1) as f64;
    let norm_of = |row: &[f64]| -> f64 {
        let mean = total(row) / rate;
        let deviation = |g: usize| {
            let noise_of = |(part, variance): (&f64, &f64)| part * part * noise * (variance + pooled);
            parts[g].iter().zip(&variance).map(noise_of).sum::<f64>().sqrt()
        };
        let power = |(g, time): (usize, f64)| (time / mean + deviation(g)).min(128.0).powi(8);
        if mean > 0.0 {
            mean * times(row).into_iter().enumerate().map(power).sum::<f64>().powf(0.125)
        } else {
            0.0
        }
    };
    let bursts: f64 = rows.iter().map(|row| norm_of(row)).sum();
    if rows.len() < 2 {
        return bursts;
    }
    let mean: Vec<f64> = (0..experts).map(|e| rows.iter().map(|row| row[e]).sum()).collect();
    (bursts + mixed * norm_of(&mean)) / (1.0 + mixed)
}

/// Returns the largest of the amounts of devices, or the norm of order 8 that stands for it.
fn largest(layer: &Layer, amounts: &[f64]) -> f64 {
    match layer.windows.measure {
        Measure::Peak => amounts.iter().copied().fold(0.0, f64::max),
        Measure::Norm { .. } => amounts.iter().map(|x| x.powi(8)).sum::<f64>().powf(0.125),
    }
}

/// Computes the visits of devices per token of their load by definition, from expert sets or from pairs.
fn visits_per_load(layer: &Layer, slots: &Slots, traffic: &Traffic) -> Vec<f64> {
    let k = (traffic.ids.len() / traffic.counts.len().max(1)).max(1);
    let mut visits = vec![0.0; layer.devices()];
    for_parts(layer, slots, traffic, |devices, count| {
        for &g in devices {
            visits[usize::from(g)] += count;
        }
    });
    let tokens = traffic.counts.iter().sum::<u64>() as f64;
    let ratio = |(g, &visits): (usize, &f64)| {
        let share = |&e: &u16| share(layer, slots, usize::from(e), g);
        let (mut served, mut pairs) = (0.0, 0.0);
        for (ids, &count) in traffic.ids.chunks_exact(k).zip(&traffic.counts) {
            let (sum, squares) =
                (ids.iter().map(share).sum::<f64>(), ids.iter().map(|e| share(e).powi(2)).sum::<f64>());
            served += count as f64 * sum;
            pairs += count as f64 * (sum * sum - squares);
        }
        if layer.costs.pairs.is_some() {
            let (load, all) = (served / (tokens * k as f64), (tokens * (k * (k - 1)) as f64).max(1.0));
            visits_of_load(if tokens > 0.0 { load } else { 0.0 }, pairs / all, k as u32)
        } else if served > 0.0 {
            visits / served
        } else {
            0.0
        }
    };
    visits.iter().enumerate().map(ratio).collect()
}

/// Computes the cost of windows by definition, in weighted tokens, if weights are read and rows have a price, without noise.
fn time_cost(layer: &Layer, slots: &Slots, traffic: &Traffic, weights: Weights) -> f64 {
    let (experts, devices) = (layer.experts, layer.devices());
    let parts: Vec<Vec<f64>> =
        (0..devices).map(|g| (0..experts).map(|e| share(layer, slots, e, g)).collect()).collect();
    let visits = visits_per_load(layer, slots, traffic);
    let least = layer.site.time.iter().copied().fold(f64::INFINITY, f64::min);
    let mut cost = 0.0;
    for (row, weight) in traffic.load.chunks(experts).zip(&traffic.weight) {
        if row.iter().sum::<f64>() * weight == 0.0 {
            continue;
        }
        let tokens = |g: usize| parts[g].iter().zip(row).map(|(part, tokens)| part * tokens).sum::<f64>();
        let time = |g: usize| {
            let busy = |(&part, &tokens): (&f64, &f64)| 1.0 - (1.0 - part).powf(tokens);
            let active: f64 = parts[g].iter().zip(row).filter(|expert| *expert.1 > 0.0).map(busy).sum();
            let read = weights.base + weights.expert * active + weights.exposed * tokens(g);
            tokens(g).max(read) * layer.site.time[g] + weights.start * (layer.site.time[g] - least)
        };
        let rows = |g: usize| tokens(g) * visits[g];
        let [times, rows]: [Vec<f64>; 2] =
            [(0..devices).map(time).collect(), (0..devices).map(rows).collect()];
        cost += weight * (largest(layer, &times) + layer.costs.row * largest(layer, &rows));
    }
    cost
}

/// Calls `visit` with the devices and the tokens of every part of every set's tokens.
fn for_parts(
    layer: &Layer,
    slots: &Slots,
    Traffic { ids, counts, .. }: &Traffic,
    mut visit: impl FnMut(&[u16], f64),
) {
    let mut parts = Vec::new();
    for (set, &count) in counts.iter().enumerate() {
        let cut = if layer.slots() > layer.experts { 12.min(count) } else { count.min(1) };
        parts.extend((0..cut).map(|part| (set, count / cut + u64::from(part < count % cut))));
    }
    parts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    let k = ids.len() / counts.len().max(1);
    for (n, (set, count)) in parts.into_iter().enumerate() {
        let serves = |&e: &u16| slots.devices(e).nth(n % slots.copies(e) as usize).unwrap_or_default();
        let mut devices: Vec<u16> = ids[set * k..][..k].iter().map(serves).collect();
        devices.sort_unstable();
        devices.dedup();
        visit(&devices, count as f64);
    }
}

/// Computes the cost of visits by definition, for every part of every set's tokens.
fn visit_cost(layer: &Layer, slots: &Slots, traffic: &Traffic) -> f64 {
    let (sets, mut cost) = (layer.costs.sets.as_ref().expect("visits are priced"), 0.0);
    for_parts(layer, slots, traffic, |devices, count| {
        let mut nodes: Vec<u16> = devices.iter().map(|&g| layer.site.node[usize::from(g)]).collect();
        nodes.dedup();
        let per_token = devices.len() as f64 * sets.device_cost + nodes.len() as f64 * sets.node_cost;
        cost += per_token * count;
    });
    cost
}

/// Returns whether every expert has a slot where it may be and where it must be, and no device has two copies of it.
fn keeps_rules(site: &Site, slots: &Slots) -> bool {
    let (experts, devices) = (slots.copies.len(), site.devices());
    let rule =
        |table: &[bool], e: u16, g: usize| table.get(usize::from(e) * devices + g).copied().unwrap_or(false);
    let is_once = |e: u16, g: usize| {
        let copies = slots.expert_in[slots.of(g)].iter().filter(|&&other| other == e).count();
        copies == usize::from(slots.holds(e, g))
            && (copies == 0 || !rule(&site.rules.forbidden, e, g))
            && (copies == 1 || !rule(&site.rules.pinned, e, g))
    };
    let domains = |e: u16| {
        let mut domains: Vec<u16> =
            slots.devices(e).filter_map(|g| site.rules.domain.get(usize::from(g)).copied()).collect();
        domains.sort_unstable();
        domains.dedup();
        domains.len()
    };
    (0..experts as u16).all(|e| {
        let is_spread = site.rules.domain.is_empty() || domains(e) >= 2;
        slots.copies(e) >= site.rules.min_copies && is_spread && (0..site.devices()).all(|g| is_once(e, g))
    })
}

/// Returns the fewest moves to any placement that keeps the rules, by enumeration; so many moves to every device `[D]` as it has
/// `gaps` cost nothing.
fn fewest_moves(site: &Site, running: &[bool], gaps: &[usize]) -> Option<usize> {
    let devices = site.devices();
    let experts = running.len() / devices;
    let domain = |g: usize| match site.rules.domain.get(g) {
        Some(&domain) => 1 << domain,
        None => 1 << if site.rules.min_copies > 1 { g } else { 0 },
    };
    let mut states = vec![(site.capacity.clone(), vec![0; devices])];
    for e in 0..experts {
        let has = |table: &[bool], g: usize| table.get(e * devices + g).is_some_and(|&is_ruled| is_ruled);
        let may = |copies: &usize| {
            let holds = |g: usize| copies >> g & 1 == 1;
            let domains = (0..devices).filter(|&g| holds(g)).fold(0u32, |all, g| all | domain(g));
            let keeps = |g: usize| {
                if holds(g) { !has(&site.rules.forbidden, g) } else { !has(&site.rules.pinned, g) }
            };
            (0..devices).all(keeps) && domains.count_ones() >= site.rules.min_copies
        };
        let mut then = vec![];
        for copies in (1..1usize << devices).filter(may) {
            for (free_slots, arrivals) in &states {
                let (mut free_slots, mut arrivals, mut fits) = (free_slots.clone(), arrivals.clone(), true);
                for g in (0..devices).filter(|&g| copies >> g & 1 == 1) {
                    fits &= free_slots[g] > 0;
                    free_slots[g] = free_slots[g].saturating_sub(1);
                    arrivals[g] += usize::from(!running[g * experts + e] && !has(&site.rules.pinned, g));
                }
                if fits {
                    then.push((free_slots, arrivals));
                }
            }
        }
        then.sort();
        then.dedup();
        states = then;
    }
    let moves =
        |arrivals: &[usize]| arrivals.iter().zip(gaps).map(|(count, gaps)| count.saturating_sub(*gaps)).sum();
    states.iter().map(|(_, arrivals)| moves(arrivals)).min()
}

/// Returns the time of the slowest device, summed over windows.
fn slowest(layer: &Layer, slots: &Slots) -> f64 {
    Balance::new(layer, slots, &slots.copies).slowest()
}

fn any_move(random: &mut Random, slots: usize, experts: usize) -> Move {
    if random.below(2) == 0 {
        return Move::Swap(random.below(slots), random.below(slots));
    }
    let e = random.below(experts + 1);
    Move::Put(random.below(slots), if e == experts { EMPTY } else { e as u16 })
}

fn close(a: f64, b: f64, part: f64) -> bool {
    (a - b).abs() <= part * a.abs().max(b.abs()).max(1.0)
}

/// Makes moves at random: what terms say of a move is what a fresh count says, to so small a part; for a norm, no less.
fn follow(
    random: &mut Random,
    layer: &Layer,
    slots: &mut Slots,
    terms: &mut Terms<'_>,
    exact: Option<f64>,
) -> Result<(), TestCaseError> {
    for _ in 0..40 {
        let step = any_move(random, layer.slots(), layer.experts);
        if !slots.allows(&layer.site, step) {
            continue;
        }
        let (before, change) = (terms.cost(), terms.change(slots, step, f64::INFINITY).expect("no cap"));
        let limit = 1e-9f64.mul_add(before.abs() + 1.0, change);
        prop_assert!(terms.change(slots, step, limit).is_some(), "{change} is no more than itself");
        let by_shares = terms.change_by_shares(slots, step);
        // Powers are single precision, and rise from what they are to what they become.
        let rounding = if exact.is_some() { 1e-9 } else { 1e-6 };
        let sizes = before.abs() + change.abs() + 1.0;
        prop_assert!((change - by_shares).abs() <= rounding * sizes, "{change} {by_shares}");
        terms.apply(slots, step);
        let fresh = Terms::new(layer, slots).cost();
        prop_assert!(close(terms.cost(), fresh, 1e-9), "{} {fresh}", terms.cost());
        if let Some(part) = exact {
            prop_assert!(close(before + change, fresh, part), "{} {fresh}", before + change);
        } else {
            // The powers are single precision.
            prop_assert!(fresh <= before + change + 1e-3 * fresh.abs(), "{} {fresh}", before + change);
        }
    }
    Ok(())
}

proptest! {
    /// The cost of every term equals its definition, and its change by a move equals that of a fresh count; for a
    /// norm, no less.
    #[test]
    fn terms_are_as_defined(experts in 1usize..9, devices in 1usize..6, norm: bool, seed: u64) {
        let mut random = Random::new(seed, 0);
        let (site, traffic) = (site(&mut random, experts, devices, false), traffic(&mut random, experts));
        let (noise, mixed) = ([0.0, 0.25][random.below(2)], [0.0, 0.7][random.below(2)]);
        let measure = if norm { Measure::Norm { noise, mixed } } else { Measure::Peak };
        let plain = layer(site, &traffic, experts, measure);
        let layer = priced(&mut random, plain.clone(), &traffic);
        let mut slots = fill(&layer.site, &layer.load, QUICK).expect("slots suffice");
        let mut terms = Terms::new(&layer, &slots);
        follow(&mut random, &layer, &mut slots, &mut terms, if norm { None } else { Some(1e-9) })?;
        let (all, windows) = (terms.cost(), Terms::new(&plain, &slots).cost());
        let (of_windows, scale) = (window_cost(&plain, &slots, &traffic), plain.windows.scale);
        let exact = if norm { 1e-3 } else { 1e-5 };
        prop_assert!(close(windows / scale, of_windows, exact), "{} {}", windows / scale, of_windows);
        let others = DEFINITIONS.iter().map(|definition| (definition.cost)(&layer, &slots)).sum::<f64>();
        let rest = visit_cost(&layer, &slots, &traffic) + others;
        prop_assert!(close(all, windows + rest, 1e-9), "{} {}", all - windows, rest);
    }

    /// The cost of reading weights and of the busiest port equals its definition, and its change by a move that of a fresh count
    /// says; for a norm, no less.
    #[test]
    fn times_are_as_defined(experts in 1usize..9, devices in 1usize..6, norm: bool, visits in 0usize..3, seed: u64) {
        let mut random = Random::new(seed, 0);
        let (site, traffic) = (site(&mut random, experts, devices, false), traffic(&mut random, experts));
        let (noise, mixed) = [(0.0, 0.0), (0.25, 0.7)][random.below(2)];
        let measure = if norm { Measure::Norm { noise, mixed } } else { Measure::Peak };
        let mut layer = layer(site, &traffic, experts, measure);
        let weights = Weights {
            base: [-50.0, 0.0, 300.0][random.below(3)],
            expert: [0.0, 40.0, 700.0][random.below(3)],
            exposed: [0.0, 0.4][random.below(2)],
            // No device takes more than 128 times the mean, beyond which a norm counts it as so much.
            start: [0.0, 20.0][random.below(2)],
        };
        layer.costs.row = [0.0, 0.7][random.below(2)];
        layer.costs.reading = Reading::new(weights, &layer.windows, experts, &layer.site);
        let is_read = layer.costs.reading.is_some();
        let copies = layer.slots() > experts;
        if visits == 1 {
            layer.costs.pairs = Some(pairs_of(&traffic.ids, &traffic.counts, experts));
        } else if visits == 2 {
            let sets = fanout::Sets::new(&traffic.ids, &traffic.counts, experts, copies);
            layer.costs.sets = Some(fanout::Sets::later(move || sets));
        }
        let mut slots = fill(&layer.site, &layer.load, QUICK).expect("slots suffice");
        let mut terms = Terms::new(&layer, &slots);
        follow(&mut random, &layer, &mut slots, &mut terms, if norm { None } else { Some(1e-6) })?;
        if (visits > 0 || layer.costs.row == 0.0) && (!norm || noise == 0.0) {
            let nothing = Weights { base: 0.0, expert: 0.0, exposed: 0.0, start: 0.0 };
            let defined = time_cost(&layer, &slots, &traffic, if is_read { weights } else { nothing });
            let cost = terms.cost() / layer.windows.scale;
            prop_assert!(close(cost, defined, 1e-3), "{cost} {defined}");
        }
        // Reading is left out where it does not change the slowest device.
        if !is_read && !norm && layer.costs.row == 0.0 {
            let least = layer.site.time.iter().copied().fold(f64::INFINITY, f64::min);
            if least >= 1.0 {
                let (cost, defined) = (terms.cost() / layer.windows.scale, time_cost(&layer, &slots, &traffic, weights));
                prop_assert!(close(cost, defined, 1e-3), "{cost} {defined}");
            }
        }
    }

    /// If the running slots were balanced, the variance of loads since is estimated from the imbalance of devices, whatever loads
    /// and speeds are.
    #[test]
    fn the_variance_of_loads_is_seen(experts in 4usize..9, part in 0.0f64..0.5, unit in 1.0f64..1e6, seed: u64) {
        let mut random = Random::new(seed, 0);
        let (layers, devices) = (400, 2 * experts);
        let even = |_| f64::from([-1, 1][random.below(2)]).mul_add(part, 1.0) * unit;
        let load: Vec<f64> = (0..layers * devices * experts).map(even).collect();
        let site = Site::plain(vec![experts; devices], vec![0.5; devices]);
        let running = Slots::new(&site.capacity, devices * experts, &(0..(devices * experts) as u16).collect::<Vec<_>>());
        let layers = load.chunks_exact(devices * experts).map(|load| ((load, &site), &running));
        let seen = LoadChange::estimate_from_imbalance(layers, 0.0).variance;
        let least = 1.0 - 1.0 / devices as f64;
        let expected = part * part / (1.0 + part * part) * least;
        prop_assert!((seen - expected).abs() <= 0.15 * expected + 1e-12, "{seen} {expected}");
    }

    /// The lasting part of the differences between devices is what counts do not explain by chance: n / (n + m) of n tokens, where
    /// loads have changed by a part whose square is 1 / m; nothing where they have not.
    #[test]
    fn chance_is_no_change(tokens in 50.0f64..1e5, part in 0.0f64..0.3, seed: u64) {
        let mut random = Random::new(seed, 0);
        let (layers, devices, experts) = (200, 16, 4);
        let mut sign = || f64::from([-1, 1][random.below(2)]);
        let load = (0..layers * devices * experts)
            .map(|_| tokens + sign() * tokens.sqrt() + sign() * part * tokens);
        let load: Vec<f64> = load.collect();
        let site = Site::plain(vec![experts; devices], vec![0.5; devices]);
        let running = Slots::new(&site.capacity, devices * experts, &(0..(devices * experts) as u16).collect::<Vec<_>>());
        let part_at = |deviations| {
            LoadChange::estimate_from_imbalance(load.chunks_exact(devices * experts).map(|load| ((load, &site), &running)), deviations).lasting_part
        };
        let expected = tokens / (tokens + 1.0 / part.powi(2));
        let seen = part_at(1.0);
        prop_assert!((seen - expected).abs() <= 0.12, "{seen} {expected}");
        prop_assert!(part_at(0.0) >= 1.0);
    }

    /// A start for a dispatcher that divides tokens joins all devices by copies, if there are enough, and keeps the rules; a
    /// quick search from there does not make the slowest devices slower.
    #[test]
    fn devices_are_joined(experts in 1usize..24, devices in 1usize..7, more in 0usize..4, rules: bool, seed: u64) {
        let mut random = Random::new(seed, 0);
        let (time, split) = (vec![1.0; devices], Split::Even);
        let mut site = Site { time, split, ..site(&mut random, experts, devices, rules) };
        site.capacity.iter_mut().for_each(|slots| *slots = experts.div_ceil(devices) + more);
        let traffic = traffic(&mut random, experts);
        let mut layer = layer(site, &traffic, experts, Measure::Peak);
        let weightless = vec![0.0; traffic.weight.len()];
        layer.windows = Windows::new(&traffic.load, &weightless, experts, &layer.site, Measure::Peak);
        layer.costs.lp_split = Some(lp_split::Loads(weighted(&traffic, experts)));
        let Ok(start) = fill_by_sum(&layer) else { return Ok(()) };
        prop_assert!(keeps_rules(&layer.site, &start));
        let shared = (0..experts as u16).filter(|&e| start.copies(e) > 1).count();
        if !rules && more > 1 && shared >= devices {
            let mut joined = vec![0u16];
            while let Some(next) = (0..experts as u16).filter(|&e| start.devices(e).any(|g| joined.contains(&g)))
                .flat_map(|e| start.devices(e)).find(|g| !joined.contains(g)) {
                joined.push(next);
            }
            prop_assert_eq!(joined.len(), devices);
        }
        let effort = Effort { trials: 300, empties: false, restarts: 1, rounds: 1, quick: true, heat: Heat::InTurn, parallel: false };
        let links = Links { transitions: &[], cost: &[] };
        let time = |layer: &Layer, slots: &Slots| (lp_split::DEFINITION.cost)(layer, slots);
        let before = time(&layer, &start);
        let slots = place(std::slice::from_mut(&mut layer), vec![start], links, effort, None, seed, &Control::new(None)).remove(0);
        prop_assert!(keeps_rules(&layer.site, &slots));
        prop_assert!(time(&layer, &slots) <= before * (1.0 + 1e-9));
    }

    /// A start that has to survive a loss spreads copies: with equal experts, two devices share at most two of them. So does the
    /// result of a search from slots in which pairs of devices share all experts.
    #[test]
    fn what_is_lost_goes_to_many_devices(half in 4usize..7, load in 1.0f64..1e6, seed: u64) {
        let (devices, experts) = (2 * half, 4 * half);
        let rules = Rules { min_copies: 2, ..Rules::default() };
        let site = Site { rules, ..Site::plain(vec![4; devices], vec![1.0; devices]) };
        let load = vec![load; experts];
        let domain: Vec<u16> = (0..devices as u16).collect();
        // A device has four halves of a load, and after a loss at most two more.
        let limit = 3.0 * (devices - 1) as f64 / experts as f64;
        let worst = |slots: &Slots| {
            let losses = SingleLosses::new(slots, &load, &domain, &site.time);
            losses.imbalance.into_iter().fold(0.0, f64::max)
        };
        let start = fill(&site, &load, QUICK).expect("slots suffice");
        prop_assert!(worst(&start) <= limit * (1.0 + 1e-9), "{} {limit}", worst(&start));
        let windows = Windows::new(&load, &[1.0], experts, &site, Measure::Peak);
        let mut layer = Layer::plain(site.clone(), load.clone(), windows);
        layer.costs.losses = Some(Losses { domain: domain.clone(), cost: layer.windows.scale * load[0] });
        let pairs: Vec<u16> = (0..devices).flat_map(|g| (0..4).map(move |slot| (g / 2 * 4 + slot) as u16)).collect();
        let pairs = Slots::new(&site.capacity, experts, &pairs);
        prop_assert!(worst(&pairs) > limit * (1.0 + 1e-9));
        let effort = Effort { trials: 2_000, empties: false, restarts: 1, rounds: 1, quick: false, heat: Heat::InTurn, parallel: false };
        let links = Links { transitions: &[], cost: &[] };
        let slots = place(std::slice::from_mut(&mut layer), vec![pairs], links, effort, None, seed, &Control::new(None)).remove(0);
        prop_assert!(worst(&slots) <= limit * (1.0 + 1e-9), "{} {limit}", worst(&slots));
    }

    /// Starts keep the rules, and so does a quick search. By the slowest devices and the prices of copies the search is no worse
    /// than its start, and the start is no worse than a packing of the sum.
    #[test]
    fn starts_and_searches_keep_their_promises(
        experts in 1usize..16, devices in 1usize..6, trials in prop::sample::select(vec![0u64, 300, 3000]),
        copies: bool, fewest in 1u32..3, seed: u64,
    ) {
        let mut random = Random::new(seed, 0);
        let mut site = Site { split: Split::Even, ..site(&mut random, experts, devices, true) };
        site.rules.min_copies = fewest;
        let is_spread = fewest == 2 && random.below(2) == 0;
        site.rules.domain = if is_spread { site.node.clone() } else { vec![] };
        site.capacity.iter_mut().for_each(|slots| *slots *= fewest as usize);
        site.rules.max_copies = if copies { u32::MAX } else { fewest };
        let traffic = traffic(&mut random, experts);
        let mut layer = layer(site.clone(), &traffic, experts, Measure::Norm { noise: 0.25, mixed: 0.0 });
        let packed = fill(&site, &layer.load, random.below(40));
        let started = fill_by_windows(&layer);
        prop_assert_eq!(started.is_ok(), packed.is_ok());
        let (Ok(packed), Ok(start)) = (packed, started) else { return Ok(()) };
        prop_assert!(keeps_rules(&site, &packed) && keeps_rules(&site, &start));
        let pins = |e: usize| (0..devices).filter(|&g| site.rules.pinned.get(e * devices + g).copied().unwrap_or(false)).count() as u32;
        prop_assert!(copies || is_spread || (0..experts).all(|e| packed.copies[e] == pins(e).max(fewest)));
        let summed = fill(&site, &layer.load, QUICK).expect("slots suffice");
        if !summed.expert_in.contains(&EMPTY) {
            prop_assert!(slowest(&layer, &start) <= slowest(&layer, &summed));
        }
        let price = 0.01 * layer.load.iter().sum::<f64>() * layer.windows.scale;
        let cells = (0..experts as u16).flat_map(|e| (0..devices).map(move |g| (e, g)));
        layer.costs.copy_cost = cells.map(|(e, g)| if start.holds(e, g) { 0.0 } else { price }).collect();
        let effort = Effort { trials, empties: false, restarts: 1, rounds: 1, quick: true, heat: Heat::InTurn, parallel: false };
        let links = Links { transitions: &[], cost: &[] };
        let layers = std::slice::from_mut(&mut layer);
        let slots = &place(layers, vec![start.clone()], links, effort, None, seed, &Control::new(None))[0];
        prop_assert!(keeps_rules(&site, slots));
        let moved = slots.moved_from(&start) as f64 * price;
        prop_assert!(slowest(&layer, slots) + moved <= slowest(&layer, &start) * (1.0 + 1e-9));
    }
    /// The nearest placement is found wherever one keeps the rules, and no placement that does costs fewer moves.
    #[test]
    fn the_nearest_holders_cost_the_fewest_moves(
        experts in 1usize..5, devices in 1usize..6, copies in 1u32..3, full: bool, seed: u64,
    ) {
        let mut random = Random::new(seed, 0);
        let mut site = site(&mut random, experts, devices, true);
        site.rules.min_copies = copies;
        site.rules.domain = if copies > 1 && random.below(2) == 0 { site.node.clone() } else { vec![] };
        site.capacity.iter_mut().for_each(|slots| *slots = (*slots * copies as usize).saturating_sub(random.below(2)));
        let Rules { forbidden, pinned, .. } = &mut site.rules;
        forbidden.iter_mut().zip(pinned).for_each(|(is_forbidden, is_pinned)| *is_forbidden &= !*is_pinned);
        let running: Vec<bool> = (0..devices * experts).map(|_| random.below(3) == 0).collect();
        let has = |table: &[bool], g: usize, e: usize| table.get(e * devices + g).is_some_and(|&is_ruled| is_ruled);
        let stays = |g: usize, e: usize| {
            has(&site.rules.pinned, g, e) || running[g * experts + e] && !has(&site.rules.forbidden, g, e)
        };
        let pins = |g: usize| (0..experts).filter(|&e| has(&site.rules.pinned, g, e)).count();
        prop_assume!((0..devices).all(|g| pins(g) <= site.capacity[g]));
        let gap = |g: usize| site.capacity[g].saturating_sub((0..experts).filter(|&e| stays(g, e)).count());
        let gaps: Vec<usize> = (0..devices).map(|g| if full { gap(g) } else { 0 }).collect();
        let fewest = fewest_moves(&site, &running, &gaps);
        match nearest(&site, &running, full, &Control::new(None)) {
            Err(NoSlot(_)) => prop_assert_eq!(fewest, None),
            Ok(holds) => {
                // Only this placement is allowed, so that its moves are the fewest.
                let mut fixed = site.clone();
                fixed.rules.forbidden = (0..experts * devices).map(|at| !holds[at % devices * experts + at / devices]).collect();
                let cost = fewest_moves(&fixed, &running, &gaps);
                prop_assert!(cost.is_some() && cost == fewest, "{:?} of {:?}", cost, fewest);
            }
        }
    }
}
