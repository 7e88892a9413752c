use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;

/// A layer's arrays.
#[derive(Debug, Clone)]
struct Case {
    ids: Vec<u16>,
    counts: Vec<u64>,
    top_k: usize,
    load: Vec<u64>,
    cap: u64,
    slots: Vec<usize>,
}

impl Case {
    fn layer(&self) -> Layer<'_> {
        let Self { ids, counts, top_k, load, cap, slots } = self;
        Layer { ids, counts, top_k: *top_k, load, cap: *cap, slots }
    }

    fn visits(&self, content: u32) -> u64 {
        let meets = |set: &[u16]| set.iter().any(|&e| content >> e & 1 == 1);
        let sets = self.ids.chunks_exact(self.top_k).zip(&self.counts);
        sets.filter(|(set, _)| meets(set)).map(|(_, count)| count).sum()
    }

    fn load_of(&self, content: u32) -> u64 {
        (0..self.load.len()).filter(|e| content >> e & 1 == 1).map(|e| self.load[e]).sum()
    }

    /// The fewest visits by trying every placement, and one that has them; None if none keeps the cap.
    fn optimum(&self, device: usize, rest: u32) -> Option<(u64, Vec<u16>)> {
        let experts = self.load.len();
        if device == self.slots.len() {
            return (rest == 0).then(|| (0, vec![0; experts]));
        }
        let mut best: Option<(u64, Vec<u16>)> = None;
        // All subsets of what is left.
        let mut content = rest;
        loop {
            let fits =
                content.count_ones() as usize <= self.slots[device] && self.load_of(content) <= self.cap;
            if let Some((visits, mut placed)) =
                fits.then(|| self.optimum(device + 1, rest & !content)).flatten()
            {
                let visits = visits + self.visits(content);
                if best.as_ref().is_none_or(|best| visits < best.0) {
                    (0..experts).filter(|e| content >> e & 1 == 1).for_each(|e| placed[e] = device as u16);
                    best = Some((visits, placed));
                }
            }
            if content == 0 {
                return best;
            }
            content = (content - 1) & rest;
        }
    }
}

prop_compose! {
    fn cases()(experts in 2usize..8, devices in 1usize..4)(
        top_k in 1..=experts.min(4),
        sets in prop::collection::vec((prop::collection::vec(0u32..1000, experts), 1u64..50), 1..12),
        extra in prop::collection::vec(0usize..2, devices),
        slack in prop_oneof![Just(10.0), 1.0f64..1.6],
        experts in Just(experts),
        devices in Just(devices),
    ) -> Case {
        let mut ids = Vec::new();
        let mut load = vec![0; experts];
        for (keys, count) in &sets {
            let mut order: Vec<u16> = (0..experts as u16).collect();
            order.sort_by_key(|&e| (keys[e as usize], e));
            order.truncate(top_k);
            order.sort_unstable();
            for &e in &order {
                load[e as usize] += count;
            }
            ids.extend(order);
        }
        let counts: Vec<u64> = sets.iter().map(|set| set.1).collect();
        let mean = load.iter().sum::<u64>() as f64 / devices as f64;
        let slots = extra.iter().map(|extra| experts.div_ceil(devices) + extra).collect();
        Case { ids, counts, top_k, load, cap: (slack * mean).ceil() as u64, slots }
    }
}

fn limits(rounds: usize, control: &Control) -> Limits<'_> {
    Limits { rounds, work: f64::INFINITY, gap: 0.0, control }
}

/// Cases that are drawn to count how many bounds are near.
const CASES: usize = 300;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// The table holds the visits of every content, and the least of what is below zero is found.
    #[test]
    fn table_is_exact(case in cases(), prices in prop::collection::vec(-60i32..60, 8)) {
        let layer = case.layer();
        let table = Table::new(&layer);
        let (experts, (first, most)) = (case.load.len(), layer.range());
        let total: u64 = case.load.iter().sum();
        let lower = total.saturating_sub(case.cap.saturating_mul(case.slots.len() as u64 - 1));
        let prices: Vec<f64> = prices[..experts].iter().map(|&price| f64::from(price) * UNIT).collect();
        let (least, harvest) = table.price(&prices, 1000);
        let mut expected = vec![f64::INFINITY; most + 1 - first];
        let mut below = 0;
        for content in 0..1u32 << experts {
            let size = content.count_ones() as usize;
            if !(first..=most).contains(&size) { continue; }
            let members: Vec<u16> = (0..experts as u16).rev().filter(|e| content >> e & 1 == 1).collect();
            let fits = (lower..=case.cap).contains(&case.load_of(content));
            prop_assert_eq!(table.visits(&members), fits.then(|| case.visits(content)));
            if fits {
                let priced = case.visits(content) as f64 * UNIT - members.iter().map(|&e| prices[usize::from(e)]).sum::<f64>();
                expected[size - first] = expected[size - first].min(priced);
                below += usize::from(priced < 0.0 && size > 0);
                prop_assert!(priced >= 0.0 || size == 0 || harvest.iter().any(|proven| *proven == (priced, members.clone())));
            }
        }
        prop_assert_eq!(harvest.len(), below);
        prop_assert_eq!(least, expected);
    }

    /// No bound is above the optimum, a certificate proves the same, and any prices prove something true.
    #[test]
    fn bound_is_below_the_optimum(case in cases(), noise in prop::collection::vec(-1e3f64..1e3, 8), rounds in 1usize..12) {
        let layers = [case.layer(), case.layer()];
        let Some((optimum, placed)) = case.optimum(0, (1 << case.load.len()) - 1) else { return Ok(()) };
        let start = [placed.clone(), placed].concat();
        let proven = bound(&layers, &start, &limits(rounds, &Control::new(None)), |_| ()).expect("the case is well formed");
        prop_assert!(proven.visits[0] <= optimum, "{} is above {optimum}", proven.visits[0]);
        prop_assert_eq!(proven.visits[0], proven.visits[1]);
        prop_assert_eq!(&verify(&layers, &proven.prices).expect("the case is well formed"), &proven.visits);
        let wild: Vec<f64> = proven.prices.iter().zip(noise.iter().cycle()).map(|(price, noise)| price + noise).collect();
        prop_assert!(verify(&layers, &wild).expect("the case is well formed")[0] <= optimum);
    }
}

/// Where devices are alike and there is no cap, the bound is nearly always near the optimum; nothing promises it.
#[test]
fn bound_is_near() {
    let mut runner = TestRunner::deterministic();
    let near = (0..CASES).filter(|_| {
        let case = cases().new_tree(&mut runner).expect("a case can be drawn").current();
        let width = case.load.len().div_ceil(case.slots.len());
        let case = Case { cap: u64::MAX, slots: vec![width; case.slots.len()], ..case };
        let (optimum, placed) = case.optimum(0, (1 << case.load.len()) - 1).expect("the case is well formed");
        let proven = bound(&[case.layer()], &placed, &limits(60, &Control::new(None)), |_| ())
            .expect("the case is well formed");
        proven.visits[0] as f64 >= 0.85 * optimum as f64
    });
    let near = near.count();
    assert!(near * 100 >= CASES * 98, "{near} of {CASES} bounds are near");
}
